"""The two subjects of `dev bench distill` on a small network: the same step, told the same way."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is a developer's package")
pytest.importorskip("peft", reason="peft is a developer's package")


def test_the_engine_and_the_rebuilt_recipe_take_the_same_steps(comfy, tmp_path):
    from lcm_lora.dev.bench import distill, networks

    settings = distill.worker_settings(tmp_path / "cost", "SD1.5", 8, "fp32")
    settings |= {"config": networks.SMALL, "rank": 4, "threads": 1}
    told, start = distill.compare(settings, 2, {"diffusers": networks.SMALL_DIFFUSERS})
    assert [len(steps) for steps in told.values()] == [3, 3]
    for ours, theirs in zip(told["ours"], told["reference"], strict=True):
        # After the first step both have also been moved by their optimisers.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert (ours["calls"], theirs["calls"]) == (3, 4)
    for name, steps in told.items():
        assert len({step["loss"] for step in steps}) == 3
        for step in steps:
            assert 0 < step["network_seconds"] < step["seconds"]
            assert step["peak"] >= start[name] * 0.9
    found = distill.report(told, start, "small")
    assert [bar["name"].split(",")[0] for bar in found.bars]
