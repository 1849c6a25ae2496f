"""Half broken adapters of every kind on plain and packed models: a module is applied, and then the
host changes its weight by numbers and logs no error, or it is named, and its weight has no patch.

`python3 dev faults` tries 20,000 files.
"""

from __future__ import annotations

import logging
import random

import pytest
import torch
from lcm_lora.tests.host import packed
from lcm_lora.tests.host.tiny_lora import modules, some_layers, tiny_model

KINDS = ("LoRA", "DoRA", "DoRA of a LoKr", "OFT", "BOFT", "GLoRA", "LoHa", "LoKr", "diff")
TYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64)


@pytest.fixture(scope="module")
def models(comfy):
    """A plain model, and one in each packed format."""
    plain = tiny_model()
    return [plain, *(packed.packed(plain, name) for name in packed.formats())]


def parts_of(kind: str, shape, chance: random.Random) -> dict[str, list[int]]:
    """Shapes of a module's parts that are right for a weight of this shape."""
    out, columns, *kernel = shape
    ones, flat = [1] * len(kernel), columns * shape[2:].numel()
    pair = {"lora_up.weight": [out, 2, *ones], "lora_down.weight": [2, columns, *kernel]}
    lokr = {"lokr_w1": [4, 4], "lokr_w2_a": [out // 4, 2],
            "lokr_w2_b": [2, columns // 4 * shape[2:].numel()]}  # fmt: skip
    magnitude = chance.choice(([out, 1, *ones], [1, columns, *ones], [out], [1, out]))
    return {
        "LoRA": pair,
        "DoRA": pair | {chance.choice(("dora_scale", "magnitude")): magnitude},
        "DoRA of a LoKr": lokr | {"dora_scale": magnitude},
        "OFT": {"oft_blocks": [out // 8, 8, 8], "rescale": [out, 1, *ones]},
        "BOFT": {"oft_blocks": [2, out // 8, 8, 8]},
        "GLoRA": {"a1.weight": [columns, 2, *ones], "a2.weight": [2, columns, *ones],
                  "b1.weight": [out, 2, *ones], "b2.weight": [2, columns, *kernel]},
        "LoHa": {"hada_w1_a": [out, 2], "hada_w1_b": [2, flat],
                 "hada_w2_a": [out, 2], "hada_w2_b": [2, flat]},
        "LoKr": lokr,
        "diff": {"diff": list(shape)},
    }[kind]  # fmt: skip


def hurt(parts: dict[str, list[int]], chance: random.Random) -> None:
    """A part fewer, or one in another shape."""
    part = chance.choice(list(parts))
    way = chance.randrange(4)
    if way == 0 and len(parts) > 1:
        del parts[part]
    elif way == 1:
        parts[part] = parts[part][::-1]
    elif way == 2:
        parts[part] = parts[part][1:] or [1]
    else:
        place = chance.randrange(len(parts[part]))
        parts[part][place] = chance.choice((1, 2, 8, 320))


def file_of(model, chance: random.Random) -> dict[str, torch.Tensor]:
    """Some modules of the model in kohya names."""
    tensors, there = {}, some_layers(model)
    for path in chance.sample(list(there), chance.randint(1, 3)):
        shape = model.model.get_parameter(there[path]).shape
        parts = parts_of(chance.choice(KINDS), shape, chance)
        if chance.random() < 0.3:
            hurt(parts, chance)
        generator = torch.Generator().manual_seed(chance.randrange(2**31))
        name = f"lora_unet_{path.replace('.', '_')}"
        for part, sides in parts.items():
            tensor = 0.1 * torch.randn(sides, generator=generator)
            if part in ("dora_scale", "magnitude", "rescale"):
                tensor = 1 + tensor
            kind = chance.choice(TYPES) if chance.random() < 0.1 else torch.float32
            tensors[f"{name}.{part}"] = tensor.to(kind)
        if chance.random() < 0.5:
            tensors[f"{name}.alpha"] = torch.tensor(chance.choice((1.0, 2.0, 1e-3)))
    return tensors


def try_one(model, tensors, strength: float, caplog) -> str:
    """Applies a file and looks at every weight; -> what became of it."""
    import comfy.lora
    from comfy.model_patcher import get_key_weight
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    try:
        patched, _, coverage = apply(model, None, parse(tensors, {}, "a"), strength, 0.0)
    except ValueError as error:
        assert len(str(error)) > 20
        return "refused"
    keys = {f"lora_unet_{path.replace('.', '_')}": f"diffusion_model.{native}.weight"
            for path, native in modules(model).items()}  # fmt: skip
    assert patched.patches.keys() == {keys[name] for name in coverage.applied}
    assert coverage.taken + len(coverage.left_over) >= coverage.total
    caplog.clear()
    for key, patches in patched.patches.items():
        weight, _, convert = get_key_weight(model.model, key)
        before = weight.to(torch.float32, copy=True)
        before = convert(before, inplace=True) if convert else before
        after = comfy.lora.calculate_weight(patches, before.clone(), key)
        assert after.shape == before.shape and after.isfinite().all()
        assert not torch.equal(after, before), key
    assert not caplog.records, caplog.text
    return "applied in part" if coverage.left_over else "applied"


def fuzz(count: int, models, caplog) -> dict[str, int]:
    outcomes: dict[str, int] = {}
    with caplog.at_level(logging.WARNING):
        for seed in range(count):
            chance = random.Random(seed)
            model = models[seed % len(models)]
            tensors = file_of(model, chance)
            try:
                way = try_one(model, tensors, chance.choice((1.0, 0.5, -0.5, 2.0)), caplog)
            except Exception as error:
                shapes = {key: (list(t.shape), t.dtype) for key, t in tensors.items()}
                raise AssertionError(f"file {seed}: {shapes}") from error
            outcomes[way] = outcomes.get(way, 0) + 1
    return outcomes


def test_what_is_applied_changes_the_weight(models, caplog):
    outcomes = fuzz(150, models, caplog)
    assert min(outcomes[way] for way in ("applied", "applied in part", "refused")) > 5, outcomes


@pytest.mark.faults
def test_what_is_applied_changes_the_weight_for_many_files(models, caplog):
    assert sum(fuzz(20_000, models, caplog).values()) == 20_000
