"""The loop on the toy in this process: what memory, precision and patience change."""

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.data import bank, sources
from lcm_lora.training.ranks import Ranks
from lcm_lora.training.spec import Data, Spec
from torch.optim.optimizer import register_optimizer_step_pre_hook

PROMPTS = ("a photo of a bag", "a photo of a dress", "a photo of an ankle boot")


def spec_of(base, checkpoint, **changes) -> Spec:
    settings = {
        "host": "/", "checkpoint": str(checkpoint), "output": "/o.safetensors",
        "banks": str(base), "resolution": 64, "steps": 3, "batch": 4, "rank": 4,
        "guidance": (2.5,), "lr": 1e-3, "sample_every": 0, "seed": 5,
        "data": Data(prompts=PROMPTS, count=8, draw_steps=2),
    }  # fmt: skip
    return Spec(**settings | changes)


@pytest.fixture(scope="module")
def teacher(comfy, toy_checkpoint):
    from lcm_lora.training.host import load_teacher

    return load_teacher(Path(toy_checkpoint))


@pytest.fixture(scope="module")
def latents(teacher, toy_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    source = sources.source(spec_of(folder, toy_checkpoint), teacher)
    bank.build(folder, source, teacher.text, 0.0, Ranks(), lambda *progress: None)
    return bank.Bank(folder)


@pytest.fixture
def trained(teacher, latents, toy_checkpoint, tmp_path):
    """trained(**settings) -> (the run, its adapter's tensors) after all steps. by: the teacher."""
    from lcm_lora.training.state.loop import Run

    count = iter(range(100))

    def run(by=teacher, **changes):
        job = tmp_path / str(next(count))
        spec = spec_of(job, toy_checkpoint, **changes)
        adapter = Adapter(by.network, spec.rank, spec.lora_alpha, spec.seed)
        try:
            made = Run(spec, job, by, adapter, latents, Ranks(), None, None, lambda: "")
            assert made.train() == "done"
        finally:
            adapter.detach()
        return made, {name: tensor.clone() for name, tensor in adapter.state_dict().items()}

    return run


def moved(tensors):
    """How far the trained half of the adapter is from its start, which is zero."""
    return torch.cat([value.flatten() for name, value in tensors.items() if name.endswith("up")])


def test_the_same_settings_give_the_same_bits(trained):
    (_, one), (_, two) = trained(), trained()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert moved(one).abs().max() > 1e-4


def test_micro_batches_add_up_to_the_batch(trained):
    (_, at_once), (_, parts) = trained(), trained(micro_batch=1)
    assert (moved(parts) - moved(at_once)).norm() < 1e-2 * moved(at_once).norm()


def test_the_next_batch_is_read_before_a_step_is_waited_for(trained, latents, monkeypatch):
    events, read = [], latents.batch
    monkeypatch.setattr(latents, "batch", lambda rows: events.append(len(rows)) or read(rows))
    seen = register_optimizer_step_pre_hook(lambda *_: events.append("step"))
    try:
        trained(micro_batch=3)
    finally:
        seen.remove()
    assert events == [3, 1, 3, 1, "step", 3, 1, "step", "step"]


def test_it_goes_on_with_less_when_memory_runs_out(trained, teacher, caplog):
    def at_most_two(_module, inputs):
        # The teacher's two answers to one picture run as one batch.
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("this network holds four latents at a time")

    limit = teacher.network.register_forward_pre_hook(at_most_two)
    try:
        run, factors = trained()
    finally:
        limit.remove()
    assert run.progress.micro_batch == 2 and not run.progress.recompute
    assert "2 pictures at a time, 2 times a step" in caplog.text
    _, expected = trained(micro_batch=2)
    assert all(torch.equal(factors[name], expected[name]) for name in expected)


def test_memory_that_does_not_hold_one_picture_is_reported(trained, teacher):
    def never(_module, _inputs):
        raise torch.OutOfMemoryError("this network holds nothing")

    limit = teacher.network.register_forward_pre_hook(never)
    forwards = {m: m.__dict__.get("forward") for m in teacher.network.modules()}
    try:
        with pytest.raises(MemoryError, match="too small for a training step with one picture"):
            trained()
    finally:
        limit.remove()
        restore(forwards)


def test_a_plan_says_what_the_job_does_when_memory_runs_out(teacher, toy_checkpoint, monkeypatch):
    from lcm_lora.training.plan import plan
    from lcm_lora.training.state import progress

    again = []

    def only_one_that_is_recomputed(_module, inputs):
        if torch.is_grad_enabled() and not (again and len(inputs[0]) == 1):
            raise torch.OutOfMemoryError("too large for a gradient")

    monkeypatch.setattr(progress, "recompute_blocks", again.append)
    adapter = Adapter(teacher.network, 4, 4.0)
    limit = teacher.network.register_forward_pre_hook(only_one_that_is_recomputed)
    try:
        report = plan(spec_of("/b", toy_checkpoint, passes=2), teacher, adapter, 8)
        with pytest.raises(MemoryError, match="too small for a training step with one picture"):
            again.clear()
            plan(spec_of("/b", toy_checkpoint, checkpointing="off"), teacher, adapter, 8)
    finally:
        limit.remove()
        adapter.detach()
    assert "measured here, 1 pictures at a time, blocks computed again in backward" in report


def test_weights_leave_the_device_when_nothing_else_helps(toy_checkpoint, monkeypatch):
    from lcm_lora.training.host import load_teacher
    from lcm_lora.training.plan import plan
    from lcm_lora.training.state import progress

    monkeypatch.setattr(progress, "has_own_memory", lambda _: True)  # not so on a CPU
    own = load_teacher(Path(toy_checkpoint))

    def only_without_weights(_module, _inputs):
        if torch.is_grad_enabled() and not own.offloaded:
            raise torch.OutOfMemoryError("too large for a gradient")

    own.network.register_forward_pre_hook(only_without_weights)
    adapter = Adapter(own.network, 4, 4.0)
    with pytest.raises(MemoryError, match="too small for a training step with one picture"):
        plan(spec_of("/b", toy_checkpoint, offload="off"), own, adapter, 8)
    report = plan(spec_of("/b", toy_checkpoint, checkpointing="on"), own, adapter, 8)
    assert "blocks computed again in backward, their weights in the computer's memory" in report


@pytest.mark.parametrize(
    ("device", "free", "off"),
    [("cuda", 0, True), ("cuda", 1 << 40, False), ("cpu", 0, False), ("mps", 0, False)],
)
def test_weights_stay_off_a_device_that_has_no_room(teacher, monkeypatch, device, free, off):
    from lcm_lora.training import host

    monkeypatch.setattr(host, "free_memory", lambda: free)
    patcher = teacher._patcher
    assert host._must_offload("auto", patcher, torch.device(device)) == off
    assert host._must_offload("on", patcher, torch.device(device))
    assert not host._must_offload("off", patcher, torch.device(device))


def test_recomputing_blocks_changes_nothing_but_memory(trained, teacher):
    _, plain = trained()
    forwards = {m: m.__dict__.get("forward") for m in teacher.network.modules()}
    try:
        _, again = trained(checkpointing="on")
    finally:
        restore(forwards)
    assert (moved(again) - moved(plain)).norm() < 1e-3 * moved(plain).norm()


def restore(forwards):
    for module, forward in forwards.items():
        if forward is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = forward


def test_it_goes_on_with_less_when_memory_runs_out_in_backward(trained, teacher, caplog):
    """Half of the gradients are there already: none of them may be counted twice."""
    parts = []

    def at_most_two(_module, _inputs, outputs):
        if torch.is_grad_enabled() and outputs.requires_grad:
            outputs.register_hook(lambda gradient: parts.append(len(gradient)))
            if len(outputs) > 2:
                outputs.register_hook(full)

    def full(_gradient):
        raise torch.OutOfMemoryError("this device holds two gradients at a time")

    limit = teacher.network.output_blocks[0][0].register_forward_hook(at_most_two)
    try:
        run, factors = trained()
    finally:
        limit.remove()
    assert parts[:3] == [4, 2, 2] and run.progress.micro_batch == 2
    assert "2 pictures at a time, 2 times a step" in caplog.text
    _, expected = trained(micro_batch=2)
    assert all(torch.equal(factors[name], expected[name]) for name in expected)


def test_memory_that_runs_out_as_gradients_are_averaged_is_tried_again(
    trained, teacher, monkeypatch
):
    averaged = Ranks.mean_
    calls = []

    def full_at_first(self, tensors):
        calls.append(len(tensors))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room for a copy of all gradients")
        return averaged(self, tensors)

    monkeypatch.setattr(Ranks, "mean_", full_at_first)
    run, factors = trained()
    assert run.progress.micro_batch == 2 and len(calls) == 4
    _, expected = trained(micro_batch=2)
    assert all(torch.equal(factors[name], expected[name]) for name in expected)


class Graphs(list):
    """A backend of torch.compile that keeps the graphs, and runs them as they are."""

    def __call__(self, graph, _inputs):
        self.append(graph)
        return graph.forward


def test_compiled_blocks_change_nothing_and_stay_compiled(trained, teacher, monkeypatch):
    """Two blocks, each adapter off, on, and on with gradients; torch's limit of variants is lower,
    as the usual limit is for a whole UNet."""
    import comfy.ldm.modules.attention as attention
    from lcm_lora.training import memory
    from lcm_lora.training.state import loop

    # The trainer's process uses this one; the one for CPUs asks the system for free memory.
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    _, plain = trained(steps=1)
    blocks, graphs = memory.blocks_of(teacher.network)[:2], Graphs()
    monkeypatch.setattr(memory, "blocks_of", lambda _: blocks)
    monkeypatch.setattr(loop, "compile_blocks", partial(memory.compile_blocks, backend=graphs))
    for limit in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):
            monkeypatch.setattr(torch._dynamo.config, limit, 2)
    forwards = {block: block.__dict__.get("forward") for block in blocks}
    torch._dynamo.reset()
    try:
        _, compiled = trained(steps=1, compile=True)
        count = len(graphs)
        assert count > 2 * len(blocks)  # more than the limit
        _, again = trained(steps=1)  # the blocks are still compiled
        assert len(graphs) == count
    finally:
        restore(forwards)
        torch._dynamo.reset()
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_the_fused_optimiser_of_cuda_goes_on_after_its_checkpoint_too(
    trained, teacher, latents, toy_checkpoint, tmp_path, monkeypatch
):
    from lcm_lora.training.state.loop import Run

    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **o: plain(p, **o | {"fused": True}))
    _, expected = trained(steps=2)
    spec = spec_of(tmp_path / "job", toy_checkpoint, steps=2)
    adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
    try:
        for outcome in ("pause", "done"):
            run = Run(
                spec, tmp_path / "job", teacher, adapter, latents, Ranks(), None, None,
                lambda: "pause" if outcome == "pause" and run.step == 1 else "",  # noqa: B023
            )  # fmt: skip
            assert run.train() == outcome
        factors = adapter.state_dict()
        assert all(torch.equal(factors[name], expected[name]) for name in expected)
    finally:
        adapter.detach()


class Interrupting:
    """Asks for an action at one call, and again until it is followed."""

    def __init__(self, at, action="pause"):
        self.at, self.action, self.calls = at, action, 0

    def __call__(self):
        self.calls += 1
        return self.action if self.calls >= self.at else ""


def test_a_pause_is_followed_at_the_next_call_of_the_network(
    teacher, latents, toy_checkpoint, tmp_path, monkeypatch
):
    """In the middle of a step or of sample pictures, which are then begun anew: every resumed job
    has the same bits, measurements and pictures as one that ran through."""
    from lcm_lora.training.state import checkpoints, samples
    from lcm_lora.training.state.journal import Journal
    from lcm_lora.training.state.loop import Run

    monkeypatch.setattr(samples, "TEACHER_STEPS", 6)
    changes = {"sample_every": 1, "steps": 2, "batch": 2, "micro_batch": 1, "log_every": 5}

    def run(name, request):
        job = tmp_path / name
        job.mkdir(exist_ok=True)
        spec = spec_of(job, toy_checkpoint, **changes)
        adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
        drawn = samples.Samples(job, teacher, PROMPTS[:2], 64, 5, "lcm")
        calls = []
        watched = teacher.network.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            made = Run(spec, job, teacher, adapter, latents, Ranks(), Journal(job), drawn, request)
            outcome = made.train()
        finally:
            watched.remove()
            adapter.detach()
        lines = (job / "metrics.jsonl").read_text().splitlines() if outcome == "done" else ()
        sampled = [json.loads(line) for line in lines if "endpoint_error" in line]
        measured = [(line["step"], line["endpoint_error"]) for line in sampled]
        newest = checkpoints.newest(made.folder)
        return outcome, len(calls), newest.adapter, measured, made.progress.best

    whole = run("whole", lambda: "")
    assert whole[0] == "done" and [step for step, _ in whole[3]] == [1, 2]
    for at in (3, 12, 36):  # in step 1, for the teacher's pictures, for those after step 2
        asked = Interrupting(at)
        outcome, calls, *_ = run(f"paused-{at}", asked)
        assert (outcome, asked.calls) == ("pause", at) and calls < at
        outcome, _, again, *measured = run(f"paused-{at}", lambda: "")
        assert outcome == "done" and whole[2].keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in whole[2].items())
        assert whole[3:] == (*measured,), f"after a pause at call {at}"


def test_a_finish_waits_for_the_first_step(teacher, latents, toy_checkpoint, tmp_path):
    from lcm_lora.training.state.loop import Run

    spec = spec_of(tmp_path, toy_checkpoint, batch=1)
    adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
    try:
        run = Run(spec, tmp_path, teacher, adapter, latents, Ranks(), None, None, lambda: "finish")
        assert (run.train(), run.step) == ("finish", 1)
    finally:
        adapter.detach()


def test_distribution_matching_goes_on_with_the_same_bits(
    teacher, latents, toy_checkpoint, tmp_path
):
    """Paused in the consistency part, while the fake score learns alone, after a step of matching
    and after an anchor: factors, average, fake score and optimiser are those of an unbroken run."""
    from lcm_lora.training.state import checkpoints
    from lcm_lora.training.state.loop import Run

    def run(name, pauses):
        spec = spec_of(tmp_path / name, toy_checkpoint, objective="dmd", steps=20, batch=1)
        hooks = {m: len(m._forward_hooks) for m in teacher.network.modules()}
        for pause in (*pauses, None):
            adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
            try:
                made = Run(
                    spec, tmp_path / name, teacher, adapter, latents, Ranks(), None, None,
                    lambda: "pause" if pause is not None and made.step >= pause else "",  # noqa: B023
                )  # fmt: skip
                assert made.train() == ("done" if pause is None else "pause")
            finally:
                adapter.detach()
            assert hooks == {m: len(m._forward_hooks) for m in teacher.network.modules()}
        made.save()
        written = checkpoints.newest(made.folder)
        return made, adapter.state(), written

    whole, result, expected = run("whole", ())
    assert (whole.gradients.begins, whole.gradients.judges_from) == (10, 11)
    for name, tensor in result.items():  # the file gets the average
        assert torch.equal(tensor, expected.adapter[name])
        assert not torch.equal(tensor, expected.more[f"student.{name}"]) or not tensor.any()
    _, again, resumed = run("broken", (5, 11, 12, 13, 18))
    assert resumed.more.keys() == expected.more.keys()
    for part in ("adapter", "optimiser", "more"):
        ours, theirs = getattr(resumed, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    assert all(torch.equal(again[name], result[name]) for name in result)
    # Trained on, it goes on with matching, though a job of so many steps would begin it later.
    spec = spec_of(tmp_path / "whole", toy_checkpoint, objective="dmd", steps=60, batch=1)
    adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
    try:
        more = Run(spec, tmp_path / "whole", teacher, adapter, latents, Ranks(), None, None, str)
        more.resume()
        assert more.step == 20 and more.gradients.begins == 10
        assert more.gradients.is_matching(21)
    finally:
        more.gradients.close()
        adapter.detach()


def test_micro_batches_match_as_the_batch_does(trained):
    changes = {"objective": "dmd", "steps": 12, "batch": 2}
    (_, at_once), (_, parts) = trained(**changes), trained(**changes, micro_batch=1)
    assert (moved(parts) - moved(at_once)).norm() < 2e-2 * moved(at_once).norm()


def test_phased_trains_as_well(trained):
    (_, phased), (_, lcm) = trained(objective="phased", phases=4), trained()
    assert moved(phased).isfinite().all() and moved(phased).abs().max() > 1e-4
    assert not torch.equal(moved(phased), moved(lcm))


def test_warm_up_and_decay():
    from lcm_lora.training.state.progress import learning_rate

    spec = spec_of("/b", "/c", steps=100, warmup=10, decay="cosine", lr=1.0)
    rates = [learning_rate(spec, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.01
    linear = spec_of("/b", "/c", steps=100, warmup=0, decay="linear", lr=1.0)
    assert learning_rate(linear, 25) == pytest.approx(0.75)


def test_kept_answers_of_the_teacher_are_those_it_gives(trained, monkeypatch):
    """2 steps a pass: with 3 passes, steps 0 to 5 need the teacher twice, and 6 and 7 twice."""
    from lcm_lora.training.data import answers
    from lcm_lora.training.state import gradients

    asked = []
    ask = gradients.teacher_step
    monkeypatch.setattr(gradients, "teacher_step", lambda *batch: asked.append(1) or ask(*batch))
    _, reusing = trained(steps=8, passes=3)
    assert len(asked) == 4
    monkeypatch.setattr(answers.Answers, "read", lambda *_: None)
    _, asking = trained(steps=8, passes=3)
    assert len(asked) == 12
    assert all(torch.equal(reusing[name], asking[name]) for name in reusing)


def test_answers_of_earlier_passes_go(trained):
    run, _ = trained(steps=7, passes=3)
    assert sorted(file.name for file in run.gradients.answers.folder.iterdir()) == [
        "0-6.safetensors"
    ]


@pytest.fixture
def sampled(teacher, tmp_path):
    """sampled(name, objective) -> the errors of a job's sample pictures of three prompts."""
    from lcm_lora.training.state.samples import Samples

    adapter = Adapter(teacher.network, 4, 4.0, 5)

    def draw(name, objective="lcm"):
        job = tmp_path / name
        job.mkdir()
        errors = Samples(job, teacher, PROMPTS, 64, 5, objective).draw(adapter, 1, 2.5)
        assert (job / "samples" / "step-00000001.png").stat().st_size > 1000
        return errors

    yield draw
    adapter.detach()


def test_sample_pictures_are_drawn_one_by_one_where_memory_is_short(sampled, teacher):
    def at_most_two(_module, inputs):
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("this network holds two latents at a time")

    expected = sampled("at once")
    limit = teacher.network.register_forward_pre_hook(at_most_two)
    try:
        assert sampled("in parts") == pytest.approx(expected, rel=1e-3)
    finally:
        limit.remove()


@pytest.mark.parametrize(("objective", "fresh"), [("lcm", {0, 1, 2, 3}), ("phased", {0})])
def test_sample_pictures_get_the_noise_that_the_objective_wants(
    sampled, monkeypatch, objective, fresh
):
    from lcm_lora.training.state import samples

    asked, real = set(), samples.picture_noise

    def noise(*about):
        draw = real(*about)
        return lambda step: asked.add(step) or draw(step)

    monkeypatch.setattr(samples, "picture_noise", noise)
    monkeypatch.setattr(samples, "TEACHER_STEPS", 2)
    sampled(objective, objective)
    assert asked == fresh


@pytest.fixture(params=["bf16", "fp16"])
def half_teacher(comfy, toy_checkpoint, request):
    from lcm_lora.training.host import load_teacher

    return load_teacher(Path(toy_checkpoint), request.param)


@pytest.mark.gpu
def test_weights_off_the_gpu_take_no_room_there(toy_checkpoint, teacher):
    from lcm_lora.training.host import load_teacher

    before = torch.cuda.memory_allocated()
    lent = load_teacher(Path(toy_checkpoint), offload="on")
    lent.free_text_encoders()
    lent.free_vae()
    assert torch.cuda.memory_allocated() - before < 0.2 * teacher.weight_bytes
    z, t = torch.randn(2, 4, 8, 8, device=lent.device), torch.tensor([999, 19], device=lent.device)
    context = torch.cat([lent.uncond["context"][None]] * 2)
    with torch.no_grad():
        torch.testing.assert_close(lent(z, t, context=context), teacher(z, t, context=context))


@pytest.mark.gpu
def test_half_precision_learns_and_steps_over_what_overflows(trained, half_teacher, monkeypatch):
    from lcm_lora.training.state import progress

    monkeypatch.setattr(progress, "FIRST_SCALE", 2.0**40)  # beyond float16, so that it is halved
    run, factors = trained(by=half_teacher, steps=40)
    assert all(tensor.dtype == torch.float32 for tensor in factors.values())
    assert moved(factors).isfinite().all() and moved(factors).abs().max() > 1e-4
    assert (1 < run.progress.scale < 2.0**40) == run.half


@pytest.mark.gpu
def test_a_step_waits_for_the_device_once(trained, monkeypatch):
    """The first step of a process prepares more, such as tables and the libraries."""
    from lcm_lora.training.state.loop import Run

    step, places = Run.one_step, []

    def watched(run):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if run.step else "default")
            try:
                result = step(run)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchroniz" in str(w.message)]
        places.append([f"{Path(w.filename).name}:{w.lineno}" for w in waits])
        return result

    monkeypatch.setattr(Run, "one_step", watched)
    trained()
    assert [len(step) for step in places[1:]] == [1, 1], places


@pytest.mark.gpu
def test_it_goes_on_with_less_when_a_cards_memory_runs_out(trained, teacher):
    """Half of this batch fits, and all of it does not."""
    free, total = torch.cuda.mem_get_info()
    peaks = []
    for size in (128, 256):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _, expected = trained(batch=256, micro_batch=size, steps=2)
        peaks.append(torch.cuda.max_memory_reserved())
        if size == 128:
            in_halves = expected
    if max(peaks) > free / 2 or peaks[1] < 1.3 * peaks[0]:
        pytest.skip(f"the peaks of {peaks} bytes do not suit a card with {free} free")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total)
    try:
        run, factors = trained(batch=256, steps=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.progress.micro_batch == 128 and not run.progress.recompute
    assert (moved(factors) - moved(in_halves)).norm() < 1e-2 * moved(in_halves).norm()


@pytest.mark.gpu
def test_blocks_compiled_for_the_device_learn_what_plain_ones_learn(trained, teacher):
    forwards = {m: m.__dict__.get("forward") for m in teacher.network.modules()}
    _, plain = trained(steps=2)
    try:
        _, compiled = trained(steps=2, compile=True)
    finally:
        restore(forwards)
        torch._dynamo.reset()
    difference = moved(compiled) - moved(plain)
    assert difference.norm() < 2e-2 * moved(plain).norm()


@pytest.mark.gpu
def test_a_pause_while_the_device_computes_loses_nothing(
    trained, teacher, latents, toy_checkpoint, tmp_path
):
    from lcm_lora.training.state.loop import Run

    _, expected = trained()
    spec = spec_of(tmp_path / "job", toy_checkpoint)
    adapter = Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed)
    outcome = ""

    def after_two():
        if outcome != "pause" or run.step != 2:
            return ""
        torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
        with torch.no_grad():  # what a step would do last
            for factor in adapter.parameters():
                factor.add_(1).sub_(1)
        assert not torch.cuda.current_stream().query(), "the device is still busy"
        return "pause"

    try:
        for outcome in ("pause", "done"):
            run = Run(
                spec, tmp_path / "job", teacher, adapter, latents, Ranks(), None, None, after_two
            )
            assert run.train() == outcome
            assert run.step == (2 if outcome == "pause" else 3)
        difference = moved(adapter.state_dict()) - moved(expected)
        assert difference.norm() < 1e-2 * moved(expected).norm()
    finally:
        adapter.detach()
