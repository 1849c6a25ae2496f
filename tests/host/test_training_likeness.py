"""How like the data's pictures the student's are, on the demo model and a flow model."""

import json
from pathlib import Path

import pytest
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.data import bank, sources
from lcm_lora.training.ranks import Ranks
from lcm_lora.training.spec import Data, Spec

PROMPTS = tuple(
    f"a photo of a {name} on a {colour} background"
    for name in ("fox", "rocket", "panda", "teapot") for colour in ("teal", "pink", "blue", "grey")
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(comfy, toy_checkpoint):
    from lcm_lora.training.host import load_teacher

    return load_teacher(Path(toy_checkpoint))


def spec_of(folder, **changes):
    settings = {
        "host": "/", "checkpoint": "/c.safetensors", "output": "/o.safetensors",
        "banks": str(folder), "resolution": 96, "guidance": (3.0,), "rank": 8, "steps": 3,
        "batch": 2, "sample_every": 1, "seed": 5,
        "data": Data(prompts=PROMPTS, count=16, draw_steps=5),
    }  # fmt: skip
    return Spec(**settings | changes)


@pytest.fixture(scope="module")
def rows(teacher, tmp_path_factory):
    """A bank of 16 pictures."""
    folder = tmp_path_factory.mktemp("bank")
    source = sources.source(spec_of(folder), teacher)
    bank.build(folder, source, teacher.text, 0.0, Ranks(), lambda *progress: None)
    return bank.Bank(folder)


@pytest.fixture
def lcm(teacher):
    """The demo's LCM-LoRA as an adapter."""
    from lcm_lora.dev.toy import assemble
    from lcm_lora.training.start import start_from

    adapter = Adapter(teacher.network, 24, 24.0, 5)
    start_from(adapter, teacher, assemble.lora(assemble.LCM_LORA))
    yield adapter
    adapter.detach()


def test_an_lcm_lora_is_nearer_to_the_data_than_nothing_at_every_number_of_steps(
    teacher, rows, lcm
):
    from lcm_lora.training.state.likeness import Likeness

    likeness, called = Likeness(teacher, rows, "lcm", 5), []
    expected = likeness.calls
    learned = likeness.measure(lcm, called.append)
    assert sum(called) == expected == 16 * (7 + 3 + 1) and likeness.calls == expected - 16
    lcm.on = False
    bare = likeness.measure(lcm)
    assert learned["distance"]["1"] < 0.7 * bare["distance"]["1"]
    assert learned["distance"]["2"] < 0.5 * bare["distance"]["2"]
    assert learned["distance"]["4"] < bare["distance"]["4"]
    assert sum(learned["recall"].values()) > sum(bare["recall"].values())


@pytest.fixture
def run(teacher, rows, monkeypatch, tmp_path):
    """run(**settings) -> a Run of a few steps with 4 pictures to compare, and its metrics file."""
    from lcm_lora.training.state import likeness, samples
    from lcm_lora.training.state.journal import Journal
    from lcm_lora.training.state.loop import Run

    monkeypatch.setattr(likeness, "PICTURES", 4)
    monkeypatch.setattr(samples, "TEACHER_STEPS", 2)
    adapters = []

    def make(**changes):
        spec = spec_of(tmp_path, **changes)
        adapters.append(Adapter(teacher.network, spec.rank, spec.lora_alpha, spec.seed))
        shown = samples.Samples(tmp_path, teacher, PROMPTS[:1], 96, 5, "lcm")
        shown.likeness = likeness.Likeness(teacher, rows, "lcm", 5)
        made = Run(
            spec, tmp_path, teacher, adapters[-1], rows, Ranks(), Journal(tmp_path), shown,
            lambda: "",
        )  # fmt: skip
        return made, tmp_path / "metrics.jsonl"

    yield make
    for adapter in adapters:
        adapter.detach()


def test_the_nearest_checkpoint_is_the_best(run):
    made, file = run(steps=2)
    made.progress.best, made.progress.best_step = -100.0, 0  # of an earlier version
    assert made.train() == "done"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    sampled = {line["step"]: line for line in lines if "endpoint_error" in line}
    assert sampled.keys() == {1, 2}
    distances = {step: sum(line["distance"].values()) for step, line in sampled.items()}
    assert made.progress.best == min(distances.values()) == distances[made.progress.best_step]
    recalls = [sum(line["recall"].values()) / 3 for line in sampled.values()]
    assert made.progress.best_recall == pytest.approx(max(recalls))


def test_a_collapse_ends_matching_and_names_the_last_good_checkpoint(run):
    from lcm_lora.training.state.loop import Diverged

    made, _ = run(steps=4, objective="dmd", sample_every=3)
    made.progress.best_recall, made.progress.best_step = 10.0, 1
    words = "step 3 their recall is 0.* was 10.00 before. The best checkpoint, of step 1, is kept"
    with pytest.raises(Diverged, match=words):
        made.train()


def test_a_bank_of_few_pictures_is_not_compared(teacher, rows, monkeypatch):
    from lcm_lora.training.state import likeness

    monkeypatch.setattr(likeness, "LEAST", 17)
    with pytest.raises(ValueError, match="16 latents of one shape, expected 17 or more"):
        likeness.Likeness(teacher, rows, "lcm", 5)
