"""Distilling a flow model: SD3's class of the host, on a small checkpoint of random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lcm_lora.lora.formats import files
from lcm_lora.tests.host import sd3_file
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.data.bank import square_sizes, together
from lcm_lora.training.spec import Data

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red fox", "a blue car", "a cup of tea")


@pytest.fixture(scope="module")
def checkpoint(comfy, tmp_path_factory):
    return sd3_file.write(tmp_path_factory.mktemp("sd3") / "sd3.safetensors")


@pytest.fixture(scope="module")
def teacher(checkpoint):
    import comfy.model_management as management
    from lcm_lora.training.host import load_teacher

    before = management.in_training
    yield load_teacher(checkpoint)
    management.in_training = before


@pytest.fixture
def adapter(teacher):
    made = Adapter(teacher.network, 4, 4.0, 0, teacher.targets)
    yield made
    made.detach()


def test_the_line_is_the_hosts(teacher):
    """SD3 shifts its times by 3, and ends in pure noise."""
    times = (torch.arange(840) + 1) / 840
    expected = 3 * times / (1 + 2 * times)
    t = torch.arange(840)
    torch.testing.assert_close(teacher.schedule.sigma(t).flatten(), expected)
    torch.testing.assert_close(teacher.schedule.alpha(t).flatten(), 1 - expected)
    assert (teacher.architecture, teacher.prediction) == ("SD3", "flow")
    assert teacher.latent_shape(128) == (16, 16, 16)


def conditions(teacher, *prompts):
    texts = together([teacher.text(prompt) for prompt in prompts])
    return teacher.conditions(texts, torch.tensor([square_sizes(64)] * len(prompts)))


def test_it_is_called_as_the_host_samples(teacher, comfy):
    """The host's own conditions and its own guidance give the same clean pictures."""
    import comfy.sample
    import comfy.samplers
    from lcm_lora.training.objectives.solver import predict_guided

    z = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([839, 385])
    ours, _ = predict_guided(
        teacher, teacher.schedule, z, t, *conditions(teacher, *PROMPTS[:2]), 3.5
    )

    def encode(text):
        return teacher._clip.encode_from_tokens_scheduled(teacher._clip.tokenize(text))

    for i in range(2):
        answers = []

        def call(network, x, levels, extra_args, i=i, answers=answers, **_):
            answers.append(
                network(z[i : i + 1], teacher.schedule.sigmas[t[i : i + 1]], **extra_args)
            )
            return x

        with torch.no_grad():
            comfy.sample.sample_custom(
                teacher._patcher, z[:1], 3.5, comfy.samplers.KSAMPLER(call),
                torch.tensor([1.0, 0.0]), encode(PROMPTS[i]), encode(""), torch.zeros_like(z[:1]),
                disable_pbar=True,
            )  # fmt: skip
        torch.testing.assert_close(ours[i : i + 1], answers[0], rtol=1e-4, atol=1e-4)


def test_its_layers_are_all_of_the_blocks(adapter):
    # The last block has no more of the text than its qkv and its modulation.
    assert len(adapter.names) == 13 + 4
    assert all("joint_blocks" in name for name in adapter.names)
    assert sum("adaLN_modulation" in name for name in adapter.names) == 4


def test_its_file_tells_what_an_estimate_needs(checkpoint, adapter):
    from lcm_lora.training.checkpoint_file import CheckpointFile

    file = CheckpointFile.read(checkpoint)
    assert (file.architecture, file.resolution, file.latent_channels) == ("SD3", 1024, 16)
    assert file.lora_parameters(4) == sum(p.numel() for p in adapter.parameters())


def test_a_resumed_run_has_the_same_bits(teacher, checkpoint, tmp_path):
    from lcm_lora.training.data import bank, sources
    from lcm_lora.training.ranks import Ranks
    from lcm_lora.training.spec import Spec
    from lcm_lora.training.state.loop import Run

    def spec_of(folder):
        return Spec(
            host="/", checkpoint=str(checkpoint), output="/o.safetensors", banks=str(folder),
            resolution=64, steps=4, batch=2, rank=4, guidance=(2.5,), lr=1e-3, sample_every=0,
            data=Data(prompts=PROMPTS, count=4, draw_steps=2),
        )  # fmt: skip

    source = sources.source(spec_of(tmp_path), teacher)
    bank.build(tmp_path / "bank", source, teacher.text, 0.0, Ranks(), lambda *_: None)

    def trained(name, *pauses):
        for pause in (*pauses, None):
            adapter = Adapter(teacher.network, 4, 4.0, 0, teacher.targets)
            try:
                made = Run(
                    spec_of(tmp_path / name), tmp_path / name, teacher, adapter,
                    bank.Bank(tmp_path / "bank"), Ranks(), None, None,
                    lambda: "pause" if pause is not None and made.step >= pause else "",  # noqa: B023
                )  # fmt: skip
                assert made.train() == ("done" if pause is None else "pause")
            finally:
                adapter.detach()
        return adapter.state()

    whole, broken = trained("whole"), trained("broken", 1, 3)
    assert max(float(tensor.abs().max()) for name, tensor in whole.items() if "up" in name) > 1e-4
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


def test_gradients_are_right_and_the_check_leaves_no_trace(teacher, adapter):
    from lcm_lora.training.gradient_check import gradient_error, require_right_gradients
    from lcm_lora.training.memory import recompute_blocks

    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    forwards = {m: m.__dict__.get("forward") for m in teacher.network.modules()}
    assert gradient_error(teacher, adapter) < 1e-3
    undo = recompute_blocks(teacher.network)
    assert gradient_error(teacher, adapter) < 1e-3
    undo()
    require_right_gradients(teacher, adapter)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state().items())
    assert forwards == {m: m.__dict__.get("forward") for m in teacher.network.modules()}
    assert all(p.grad is None for p in adapter.parameters())


def test_a_wrong_gradient_is_caught(teacher, adapter):
    from lcm_lora.training.gradient_check import require_right_gradients

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(_ctx, gradient):
            return gradient * 1.03

    layer = teacher.network.get_submodule("joint_blocks.0.x_block.mlp.fc2")
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: Off.apply(output))
    try:
        with pytest.raises(ValueError, match="SD3 network gives wrong gradients here: they"):
            require_right_gradients(teacher, adapter)
    finally:
        hook.remove()
    require_right_gradients(teacher, adapter)


def test_a_gradient_that_is_wrong_only_where_blocks_are_recomputed_is_caught(teacher, adapter):
    """As of a block that keeps something from its call: computed again, it begins elsewhere."""
    from lcm_lora.training.gradient_check import gradient_error, require_right_gradients

    block = teacher.network.get_submodule("joint_blocks.1")
    forward = block.forward

    def drifting(context, x, *args, **kwargs):
        is_again = torch._C._current_graph_task_id() != -1  # in backward
        return forward(context, x.roll(1, -1) if is_again else x, *args, **kwargs)

    block.forward = drifting
    try:
        assert gradient_error(teacher, adapter) < 1e-3
        with pytest.raises(ValueError, match="wrong gradients here with blocks recomputed"):
            require_right_gradients(teacher, adapter)
    finally:
        block.forward = forward


def test_captions_of_other_lengths_are_called_as_they_would_be_alone(teacher):
    z, t = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1)), [839, 385, 15]
    prompts = PROMPTS[0], "word " * 90, PROMPTS[1]

    def drawn(rows):
        cond, uncond = conditions(teacher, *(prompts[row] for row in rows))
        times = torch.tensor([t[row] for row in rows])
        with torch.no_grad():
            return torch.stack([teacher(z[rows], times, **inputs) for inputs in (cond, uncond)])

    assert conditions(teacher, *prompts)[0]["cross_attn"].shape == (3, 1, 154, 4096)
    together_, alone = drawn([0, 1, 2]), torch.cat([drawn([row]) for row in range(3)], 1)
    torch.testing.assert_close(together_, alone, rtol=1e-5, atol=1e-5)


def run(spec, folder, *launcher):
    file = folder / "spec.json"
    folder.mkdir(exist_ok=True)
    file.write_text(spec.to_json(), encoding="utf-8")
    command = [sys.executable, *launcher, str(ROOT / "training" / "run.py"), str(file)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Path(spec.output), ended.stderr


def test_a_job_makes_a_lora_that_the_host_takes_and_samples(job, checkpoint, tmp_path):
    import comfy.sd
    from lcm_lora.lora.host import apply
    from lcm_lora.nodes.sampling import LCMKSampler
    from lcm_lora.samplers.host import patch_sampling

    data = Data(prompts=PROMPTS, count=4, draw_steps=2)
    spec = job(
        "flow", checkpoint=str(checkpoint), data=data, steps=4, rank=4, batch=2, sample_every=4,
        checkpoint_every=2, host_flags=("--cpu",),
    )  # fmt: skip
    output, log = run(spec, tmp_path / "flow")
    assert "gradients of SD3" in log
    made = files.read(output)
    metadata = made.metadata
    assert metadata["lcm_lora.family"] == "lcm" and metadata["lcm_lora.prediction"] == "flow"
    assert metadata["lcm_lora.base_family"] == "SD3"
    patcher, clip, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    model, _, coverage = apply(patcher, None, made, 1.0, 0.0)
    assert coverage.taken == coverage.total == 17 and not coverage.left_over
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPTS[0], "")]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    output = LCMKSampler.execute(patch_sampling(model, "lcm"), 1, 4, 1.0, *texts, latent, 1.0)
    assert output.result[0]["samples"].isfinite().all()
    assert (tmp_path / "flow" / "samples" / "step-00000004.png").exists()


def test_two_processes_are_one_with_twice_the_batch(job, checkpoint, tmp_path, monkeypatch):
    """With captions of other lengths, which the processes call by themselves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {
        "checkpoint": str(checkpoint), "steps": 6, "rank": 4, "host_flags": ("--cpu",),
        "data": Data(prompts=(*PROMPTS, "word " * 90), count=4, draw_steps=2),
    }  # fmt: skip
    two = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    made = []
    for name, batch, launcher in (("one", 2, ()), ("two", 1, two)):
        output, _ = run(job(name, batch=batch, **settings), tmp_path / name, *launcher)
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        made.append(([json.loads(line)["loss"] for line in lines], files.read(output).deltas))
    (losses, one), (others, both) = made
    assert len(losses) == 6 and losses == pytest.approx(others, abs=1e-4)
    for name, delta in one.items():
        torch.testing.assert_close(delta.up, both[name].up, rtol=0.05, atol=2e-4)
    assert max(float(delta.up.abs().max()) for delta in one.values()) > 2e-3
