"""LoRAs for transformers: every class of the host, every dialect that its key map has."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.tests.host.flow_models import (
    CONFIGS,
    NAMES,
    WITHOUT_NUMBERS,
    by_host,
    dialects,
    file_of,
    flow_model,
)
from lcm_lora.tests.host.tiny_lora import patched_weights


def assert_same_weights(one, other, limit: float = 1e-5) -> None:
    one, other = patched_weights(one), patched_weights(other)
    assert one.keys() == other.keys() and one
    for key, weight in one.items():
        assert (weight - other[key]).norm() <= limit * other[key].norm(), key


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_dialect_does_what_the_hosts_own_loader_does(comfy, kind):
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.lora.host import apply

    model = flow_model(kind)
    for dialect, names in dialects(model).items():
        file = file_of(model, names)
        expected = by_host(model, file)
        vector = parse(file, {}, dialect)
        for one in (vector, from_wire(to_wire(vector))):
            patched, _, coverage = apply(model, None, one, 1.0, 0.0)
            assert coverage.taken == coverage.total and not coverage.left_over, str(coverage)
            assert_same_weights(patched, expected)
        # What is saved is taken by the host's own loader, and does the same.
        assert_same_weights(by_host(model, to_wire(vector)), expected)


FUSED = {
    "Flux": ("double_blocks.1.img_attn.qkv", "transformer_blocks.1.attn.to_{}"),
    "SD3": ("joint_blocks.1.x_block.attn.qkv", "transformer_blocks.1.attn.to_{}"),
    "ZImage": ("layers.1.attention.qkv", "layers.1.attention.to_{}"),
    "PixArtSigma": ("blocks.1.attn.qkv", "transformer_blocks.1.attn1.to_{}"),
}


@pytest.mark.parametrize("method", ["exact", "svd"])
@pytest.mark.parametrize("kind", FUSED)
def test_split_and_fused_names_of_one_weight_are_one_lora(comfy, kind, method):
    """The sum of the dense changes in float64, which one patch of the host then gives."""
    from lcm_lora.lora.combine import exact
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.lora.host import apply
    from lcm_lora.lora.methods import Settings, combine

    model = flow_model(kind)
    names = dialects(model)
    fused = parse(file_of(model, names["kohya"], seed=1), {}, "fused")
    split = parse(file_of(model, names["diffusers"], seed=2), {}, "split")
    assert any(name.startswith("transformer.") for name in split.deltas)
    total, _ = combine([fused, split], [1.0, -0.5], Settings(method), torch.device("cpu"))
    native, halves = FUSED[kind]
    name = f"lora_unet_{native.replace('.', '_')}"
    rows = torch.cat(
        [split.deltas[f"transformer.{halves.format(part)}"].matrix().double() for part in "qkv"]
    )
    expected = fused.deltas[name].matrix().double() - 0.5 * rows
    assert (total.deltas[name].matrix() - expected).norm() <= 1e-6 * expected.norm()
    assert not any(name.startswith("transformer.") and "to_q" in name for name in total.deltas)
    both = by_host(
        model, file_of(model, names["kohya"], seed=1), file_of(model, names["diffusers"], seed=2),
        weights=[1.0, -0.5],
    )  # fmt: skip
    assert_same_weights(by_host(model, to_wire(total)), both, 1e-5)
    patched, _, coverage = apply(model, None, total, 1.0, 0.0)
    assert coverage.taken == coverage.total
    assert_same_weights(patched, both)
    # Two split files stay split: nothing grows.
    twice, _ = exact([split, split], [1.0, 1.0])
    assert twice.deltas.keys() == split.deltas.keys()


@pytest.mark.parametrize("method", ["ties", "dare", "della", "magnitude"])
def test_rules_merge_a_split_weight_as_one(comfy, method):
    """The same file split and fused: a rule gives what it gives for two fused files."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.methods import Settings, combine

    model = flow_model("Flux")
    names = dialects(model)
    qkv = {n: t for n, t in names["kohya"].items() if n.endswith("_img_attn_qkv")}
    fused = parse(file_of(model, qkv, seed=1), {}, "fused")
    other = parse(file_of(model, qkv, rank=6, seed=2), {}, "other")
    split_file = {}
    for name, delta in other.deltas.items():
        number = name.removeprefix("lora_unet_double_blocks_")[0]
        for part, up in zip("qkv", delta.up.chunk(3), strict=True):
            key = f"transformer.transformer_blocks.{number}.attn.to_{part}"
            split_file |= {f"{key}.lora_A.weight": delta.down, f"{key}.lora_B.weight": up}
            split_file[f"{key}.alpha"] = torch.tensor(delta.alpha)
    ends = {f"lora_transformer_single_transformer_blocks_{i}_proj_out" for i in (0, 1)}
    extra = file_of(model, {n: names["OneTrainer"][n] for n in ends}, seed=3)
    split = parse(split_file | extra, {}, "split")
    assert len(split.deltas) == 8 and all(
        n.startswith("transformer.") for n in split.deltas if "to_" in n
    )
    settings = Settings(method, rank=16, density=0.5, seed=3)
    cpu = torch.device("cpu")
    one, _ = combine([fused, other], [1.0, 0.7], settings, cpu)
    two, _ = combine([fused, split], [1.0, 0.7], settings, cpu)
    for name, delta in one.deltas.items():
        expected = delta.matrix()
        assert (two.deltas[name].matrix() - expected).norm() <= 1e-4 * expected.norm(), name


def test_a_bias_of_a_part_is_added(comfy):
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.lora.host import apply

    model = flow_model("Flux")
    names = dialects(model)["diffusers"]
    file = file_of(model, names)
    key = "transformer.transformer_blocks.0.attn.to_k"
    file[f"{key}.diff_b"] = bias = torch.randn(128)
    vector = parse(file, {}, "biased")
    before = model.model.state_dict()["diffusion_model.double_blocks.0.img_attn.qkv.bias"]
    expected = before.clone()
    expected[128:256] += 0.5 * bias
    patched, _, coverage = apply(model, None, vector, 0.5, 0.0)
    assert not coverage.left_over
    for one in (patched, by_host(model, to_wire(vector), weights=[0.5])):
        weight = patched_weights(one)["diffusion_model.double_blocks.0.img_attn.qkv.bias"]
        assert torch.allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [*CONFIGS, *WITHOUT_NUMBERS])
def test_each_class_is_named_and_its_files_are_recognised(comfy, kind):
    from lcm_lora.lora.architecture import architecture_of
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.transformers import is_known
    from lcm_lora.lora.host import apply
    from lcm_lora.lora.weights.host import detect

    model = flow_model(kind, "meta")
    actual = detect(model)
    assert actual.name == NAMES.get(kind, kind)
    for dialect, names in dialects(model).items():
        vector = parse(file_of(model, names, device="meta"), {}, dialect)
        made_for = architecture_of(vector.shapes)
        if is_known(actual.name) and dialect in ("kohya", "diffusers"):
            assert made_for, (kind, dialect)
        if made_for and is_known(actual.name):
            assert made_for.fits(actual), (dialect, made_for, actual)
        _, _, coverage = apply(model, None, vector, 1.0, 0.0)
        assert coverage.taken == coverage.total and not coverage.left_over, (dialect, str(coverage))
