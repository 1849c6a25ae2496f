"""Angles between vectors, and a style kept off the acceleration's main directions."""

import re

import pytest
import torch
from lcm_lora.lora.combine import exact
from lcm_lora.lora.delta import Delta, Opaque, Vector
from lcm_lora.lora.formats.metadata import METHOD
from lcm_lora.lora.protect import ENERGY, protected

IN = "lora_unet_down_blocks_0_attentions_0_proj_in"
OUT = "lora_unet_up_blocks_0_resnets_0_conv1"


def delta(rank, seed, kernel=(), alpha=None, fall=0.5) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(20, rank, *[1] * len(kernel), generator=generator)
    down = torch.randn(rank, 12, *kernel, generator=generator)
    falling = (fall ** torch.arange(rank)).view(1, -1, *[1] * len(kernel))
    return Delta(up * falling, down, None, alpha)


LCM = Vector({IN: delta(6, 0), OUT: delta(6, 1, (3, 3))}, source="lcm")
STYLE = Vector({IN: delta(4, 2, alpha=2.0), OUT: delta(4, 3, (3, 3)), "other": delta(2, 4)},
               source="style")  # fmt: skip


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_the_inner_product_needs_no_matrix():
    tucker = Delta(torch.randn(20, 3, 1, 1), torch.randn(3, 12, 1, 1), torch.randn(3, 3, 3, 3), 1.0)
    for other in (LCM.deltas[OUT], tucker):
        expected = float((STYLE.deltas[OUT].matrix() * other.matrix()).sum())
        assert STYLE.deltas[OUT].inner(other) == pytest.approx(expected, rel=1e-4)


def test_the_report_names_the_angles():
    _, report = exact([LCM, STYLE], [1.0, -0.5])
    line = next(line for line in report.splitlines() if line.startswith("Cosine of 1 and 2"))
    cosines = [float(number) for number in re.findall(r"[-+]\d\.\d+", line)]
    a = [-LCM.deltas[name].matrix().flatten() for name in (IN, OUT)]
    b = [STYLE.deltas[name].matrix().flatten() for name in (IN, OUT)]
    norm = sum(float(d.matrix().square().sum()) for d in STYLE.deltas.values()) ** 0.5
    expected = float((torch.cat(a) * torch.cat(b)).sum()) / (float(torch.cat(a).norm()) * norm)
    assert cosines[0] == pytest.approx(expected, abs=1e-3)
    expected = [cosine(*pair) for pair in zip(a, b, strict=True)]
    assert cosines[1:3] == pytest.approx(expected, abs=1e-3)
    assert "input" in line and "output" in line


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_of_what_meets_the_main_directions_is_gone(share):
    remaining, report = protected(STYLE, LCM, share)
    assert remaining.deltas["other"] is STYLE.deltas["other"]
    lost = total = 0.0
    for name in (IN, OUT):
        before, after = (v.deltas[name].matrix().flatten(1).double() for v in (STYLE, remaining))
        _, values, right = torch.linalg.svd(LCM.deltas[name].matrix().flatten(1).double())
        energy = values.square().cumsum(0) / values.square().sum()
        main = right[: int((energy < ENERGY).sum()) + 1]
        beside = torch.eye(len(right)) - main.T @ main
        for directions, factor in ((main.T, 1 - share), (beside, 1.0)):
            pair = after @ directions, factor * before @ directions
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
        assert remaining.deltas[name].rank == STYLE.deltas[name].rank
        lost += float(before.square().sum() - after.square().sum())
    assert remaining.metadata[METHOD] == f"protected from lcm, share {share:g}"
    total = sum(float(d.matrix().square().sum()) for d in STYLE.deltas.values())
    assert float(report.split()[0]) == pytest.approx(100 * lost / total, abs=0.01)


def test_an_acceleration_of_zeros_takes_nothing():
    zero = Vector({IN: Delta(torch.zeros(20, 3), torch.ones(3, 12))}, source="zero")
    remaining, report = protected(STYLE, zero, 1.0)
    torch.testing.assert_close(remaining.deltas[IN].matrix(), STYLE.deltas[IN].matrix())
    assert report.startswith("0.00 % of the energy of style removed, in 1 of 3 modules")


def test_what_is_held_without_factors_is_reported():
    assert "\n" not in protected(STYLE, LCM, 1.0)[1]
    full = Vector({}, {f"{IN}.diff": torch.ones(20, 12)}, source="whole",
                   opaque={OUT: Opaque({"dora_scale": torch.ones(20)}, (20,))})  # fmt: skip
    remaining, report = protected(STYLE, full, 1.0)
    assert remaining.deltas == STYLE.deltas
    assert "In 2 modules, whole holds full differences and DoRA instead of factors, so" in report
    styles = Vector({}, {f"{IN}.diff": torch.ones(20, 12), "norm.diff": torch.ones(4)}, source="s")
    both = Vector(LCM.deltas, {"norm.diff": torch.ones(4)})
    report = protected(styles, both, 1.0)[1]
    assert "In 1 modules, s holds full differences instead of factors, which stay" in report


CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def test_what_cannot_be_protected_is_refused():
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        protected(STYLE, LCM, 1.5)
    sd15, sdxl = (
        Vector({module: Delta(torch.ones(20, 2), torch.ones(2, width))}, source=source)
        for module, width, source in ((CROSS, 768, "a"), (f"{CROSS[:-1]}v", 2048, "b"))
    )
    with pytest.raises(ValueError, match="a was made for SD1.5 .* and b for SDXL"):
        protected(sd15, sdxl, 1.0)
    for shape in ((20, 13), (21, 12)):
        other = Delta(torch.ones(shape[0], 2), torch.ones(2, shape[1]))
        wide = Vector({IN: other, **sd15.deltas}, source="wide")
        here = rf"\[{shape[0]}, {shape[1]}\] in wide \(made for SD1.5 .*"
        words = rf"{IN} has different shapes: {here}, \[20, 12\] in lcm"
        with pytest.raises(ValueError, match=words):
            protected(wide, LCM, 1.0)
    scale = Opaque({"dora_scale": torch.ones(20)}, (20,))
    dora = Vector(STYLE.deltas, opaque={"x": scale}, source="dora")
    with pytest.raises(ValueError, match="dora holds DoRA weights.* with Apply LoRA Vector"):
        protected(dora, LCM, 1.0)
    up = LCM.deltas[IN].up.index_fill(0, torch.tensor([1]), torch.nan)
    broken = Vector({IN: Delta(up, LCM.deltas[IN].down)}, source="broken")
    with pytest.raises(ValueError, match=f"broken contains NaN or infinity in {IN}"):
        protected(STYLE, broken, 1.0)
