"""Both subjects of `dev bench distill` take the same steps, here of a small network."""

from dataclasses import replace

import pytest

pytest.importorskip("diffusers", reason="diffusers is a developer's package")
pytest.importorskip("peft", reason="peft is a developer's package")


def test_the_engine_and_the_rebuilt_recipe_take_the_same_steps(comfy, tmp_path):
    from lcm_lora.dev.bench import distill, networks

    small = {"config": networks.SMALL, "diffusers": networks.SMALL_DIFFUSERS, "rank": 4}
    case = replace(distill.new_case(tmp_path / "cost", "SD1.5", 8), **small)
    turns, start = distill.compare(case, 2, threads=1)
    for ours, theirs in zip(turns.runs["ours"], turns.runs["reference"], strict=True):
        # After the first step, both optimisers have changed their LoRA.
        assert ours.result.loss == pytest.approx(theirs.result.loss, rel=1e-3)
        assert (ours.result.calls, theirs.result.calls) == (3, 4)
    assert [len(runs) for runs in turns.runs.values()] == [3, 3]
    for name, runs in turns.runs.items():
        assert len({run.result.loss for run in runs}) == 3
        for run in runs:
            assert 0 < run.result.seconds < run.seconds
            assert run.peak >= start[name] * 0.9
    assert distill.report(turns, start, "small").bars
