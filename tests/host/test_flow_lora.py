"""LoRAs for transformers: every class of the host, every dialect that its key map has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lcm_lora.dev.environment import ROOT
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


SPELLED = [
    # Comfy-Org/ComfyUI #4347: TheLastBen's trainer.
    ("Flux", "lora_unet_proj_out_", "final_layer.linear"),
    ("Flux", "lora_unet_transformer_blocks_0_attn_to_out_0_", "double_blocks.0.img_attn.proj"),
    ("Flux", "transformer.base_model.model.proj_out", "final_layer.linear"),
    # kohya-ss/musubi-tuner #905.
    ("Flux2", "diffusion_model.double_blocks.0.img_attn_proj", "double_blocks.0.img_attn.proj"),
    # Tencent-Hunyuan/HunyuanVideo-I2V #61.
    (
        "HunyuanVideo", "Hunyuan_video_I2V_lora_double_blocks_0_img_mlp_fc1",
        "double_blocks.0.img_mlp.0",
    ),
    # Comfy-Org/ComfyUI #8285, and what diffusers itself saves.
    ("WAN21_T2V", "lycoris_blocks_1_attn1_to_k", "blocks.1.self_attn.k"),
    ("WAN21_T2V", "transformer.blocks.1.ffn.net.0.proj", "blocks.1.ffn.0"),
    ("WAN21_T2V", "pipe.dit.blocks.1.self_attn.k", "blocks.1.self_attn.k"),
    (
        "QwenImage", "lora_transformer_transformer_blocks_1_attn_to_k",
        "transformer_blocks.1.attn.to_k",
    ),
    (
        "PixArtSigma", "lora_transformer_transformer_blocks_0_attn2_to_q",
        "blocks.0.cross_attn.q_linear",
    ),
    ("LTXV", "transformer.transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),
    ("LTXV", "transformer.proj_in", "patchify_proj"),
    (
        "CosmosT2IPredict2", "base_model.model.blocks.0.self_attn.q_proj",
        "blocks.0.self_attn.q_proj",
    ),
    # Comfy-Org/ComfyUI #7502.
    ("Lumina2", "transformer.layers.1.feed_forward.linear_1", "layers.1.feed_forward.w1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "path"), SPELLED, ids=[name for _, name, _ in SPELLED])
def test_a_layer_is_found_that_only_the_model_shows(comfy, kind, name, path):
    """Files of one layer, which do not show their architecture. Expected: what the host makes of
    the same factors under its own name."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    model = flow_model(kind)
    own = f"diffusion_model.{path}"
    file = file_of(model, {own: f"{own}.weight"})
    vector = parse({key.replace(own, name): tensor for key, tensor in file.items()}, {}, name)
    patched, _, coverage = apply(model, None, vector, 0.7, 0.0)
    assert coverage.taken == coverage.total == 1 and not coverage.left_over, str(coverage)
    assert_same_weights(patched, by_host(model, file, weights=[0.7]))


def test_parts_that_the_host_does_not_know_are_applied_as_one_layer(comfy):
    """HunyuanVideo as OneTrainer and diffusers name it (Comfy-Org/ComfyUI #6531). Expected: the
    products of the parts, one below the other, in float64."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    model, generator, file, rows = (
        flow_model("HunyuanVideo"),
        torch.Generator().manual_seed(2),
        {},
        [],
    )
    at = "lora_transformer_single_transformer_blocks_1"
    for part, out in {
        "attn_to_q": 128,
        "attn_to_k": 128,
        "attn_to_v": 128,
        "proj_mlp": 512,
    }.items():
        up, down = (
            torch.randn(out, 2, generator=generator),
            torch.randn(2, 128, generator=generator),
        )
        file |= {f"{at}_{part}.lora_up.weight": up, f"{at}_{part}.lora_down.weight": down}
        file[f"{at}_{part}.alpha"] = torch.tensor(1.0)
        rows.append(up.double() @ down.double() / 2)
    key = "diffusion_model.single_blocks.1.linear1.weight"
    expected = model.model.state_dict()[key].double() + 0.5 * torch.cat(rows)
    vector = parse(file, {}, "parts")
    patched, _, coverage = apply(model, None, vector, 0.5, 0.0)
    assert not coverage.left_over
    found = patched_weights(patched)[key].double()
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_the_modulation_of_wan_is_changed(comfy):
    """Kijai's name for it, in Lightx2v's LoRAs, which the host does not load (ComfyUI #8922)."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.lora.host import apply

    model = flow_model("WAN21_T2V")
    own = "diffusion_model.blocks.1"
    file = file_of(model, {f"{own}.self_attn.q": f"{own}.self_attn.q.weight"})
    change = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(1))
    expected = by_host(model, file | {f"{own}.modulation.diff": change})
    assert len(expected.patches) == 2
    vector = parse(file | {f"{own}.diff_m": change}, {}, "kijai")
    for one in (vector, from_wire(to_wire(vector))):
        patched, _, coverage = apply(model, None, one, 1.0, 0.0)
        assert coverage.taken == 2 and not coverage.left_over
        assert_same_weights(patched, expected)
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
    total, *_ = combine([fused, split], [1.0, -0.5], Settings(method), torch.device("cpu"))
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
    one, *_ = combine([fused, other], [1.0, 0.7], settings, cpu)
    two, *_ = combine([fused, split], [1.0, 0.7], settings, cpu)
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


FULL = {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38}


def _whole(kind: str, **changes) -> dict:
    model = flow_model(kind, "meta", **changes)
    return file_of(model, dialects(model)["kohya"], device="meta")


def test_a_lora_of_another_architecture_is_refused_by_both_names(comfy):
    from lcm_lora.lora.combine import exact
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply
    from lcm_lora.tests.host.tiny_lora import dialects as sd_dialects
    from lcm_lora.tests.host.tiny_lora import tiny_model

    unet = tiny_model()
    sd = parse(sd_dialects(unet)["kohya"], {}, "sd.safetensors")
    sizes = {"Flux": FULL, "HunyuanVideo": FULL | {"depth": 20, "depth_single_blocks": 40}}
    kinds = ("Flux", "WAN21_T2V", "LongCatImage", "HunyuanVideo")
    vectors = {k: parse(_whole(k, **sizes.get(k, {})), {}, f"{k}.safetensors") for k in kinds}
    flux = flow_model("Flux", "meta", **FULL)
    for model, vector, words in (
        (flux, sd, r"sd.safetensors was made for SD1.5 .* the model is Flux"),
        (unet, vectors["Flux"], r"was made for Flux .* the model is SD1.5"),
        (flow_model("QwenImage", "meta"), vectors["Flux"], r"was made for Flux .* Qwen-Image"),
        (flow_model("QwenImage", "meta"), vectors["WAN21_T2V"], r"was made for Wan .* Qwen-Image"),
        (flux, vectors["HunyuanVideo"], r"was made for HunyuanVideo .* the model is Flux"),
    ):
        with pytest.raises(ValueError, match=words):
            apply(model, None, vector, 1.0, 0.0)
    with pytest.raises(ValueError, match="made for SD1.5 .* for Flux .*same architecture"):
        exact([sd, vectors["Flux"]], [1.0, 1.0])
    # Flux' and Chroma's blocks are alike, but for the modulation.
    chroma = flow_model("Chroma", "meta", **FULL)
    _, _, coverage = apply(chroma, None, vectors["Flux"], 1.0, 0.0)
    assert coverage.doubt == ("Flux", "Chroma") and coverage.left_over
    assert "made for Flux; on Chroma" in str(coverage)
    assert not any("_attn_" in name for name in coverage.left_over)
    # Files for classes that share all names with a known one are not refused.
    longcat = flow_model("LongCatImage", "meta")
    _, _, coverage = apply(longcat, None, vectors["LongCatImage"], 1.0, 0.0)
    assert coverage.taken and not coverage.doubt


def test_a_model_of_another_size_is_named(comfy):
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    vector = parse(_whole("Flux", **FULL), {}, "large.safetensors")
    words = r"Flux \(width 3072\), but the model is Flux \(width 128\)"
    with pytest.raises(ValueError, match=words):
        apply(flow_model("Flux", "meta"), None, vector, 1.0, 0.0)


def test_a_lora_for_no_known_model_says_what_the_model_is(comfy):
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    up, down = torch.zeros(8, 2), torch.zeros(2, 8)
    strange = {"lora_unet_strange_0_layer.lora_up.weight": up,
               "lora_unet_strange_0_layer.lora_down.weight": down}  # fmt: skip
    with pytest.raises(ValueError, match="an unknown architecture, the model is Z-Image"):
        apply(flow_model("ZImage", "meta"), None, parse(strange, {}, "strange"), 1.0, 0.0)


@pytest.mark.parametrize("kind", ["SD3", "Flux", "QwenImage", "ZImage", "WAN21_T2V"])
def test_the_difference_of_two_models_is_a_lora_that_the_host_takes(comfy, kind):
    from lcm_lora.lora.extract import extract
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.lora.weights.host import differences

    base = flow_model(kind)
    names = dialects(base)["kohya"]
    file = file_of(base, names)
    distilled = by_host(base, file)
    vector, report = extract(differences(distilled, base), 4, 0, "difference")
    expected = parse(file, {}, "file")
    assert vector.deltas.keys() == expected.deltas.keys()
    for name, delta in expected.deltas.items():
        dense = delta.matrix()
        assert (vector.deltas[name].matrix() - dense).norm() <= 1e-4 * dense.norm(), name
    assert_same_weights(by_host(base, to_wire(vector)), distilled, 1e-4)
    assert "blocks attention" in report or "layers attention" in report


def test_blocks_of_a_transformer_have_their_own_names(comfy):
    from lcm_lora.lora.blocks import parse_weights, weighted
    from lcm_lora.lora.formats.parse import parse

    model = flow_model("Flux")
    for dialect in ("kohya", "diffusers"):
        lora = parse(file_of(model, dialects(model)[dialect]), {}, dialect)
        weights = parse_weights("double_blocks_1=0.5, single_blocks=0, attention=2, rest=1")
        weights.require_blocks(lora)
        result = weighted(lora, weights.of(lora), "w")
        assert result.deltas.keys() < lora.deltas.keys()
        for name, delta in lora.deltas.items():
            kept = result.deltas.get(name)
            flat = name.replace(".", "_")
            if "single_" in flat:
                assert kept is None, name
            else:
                factor = (0.5 if "_blocks_1_" in flat else 1) * (2 if "attn" in flat else 1)
                assert torch.allclose(kept.matrix(), factor * delta.matrix(), rtol=1e-5), name
    with pytest.raises(ValueError, match="its nearest blocks are double_blocks_"):
        parse_weights("double_blocks_7=1").require_blocks(lora)


def test_an_acceleration_is_protected_in_a_split_weight(comfy):
    """With all of the share, the style does nothing to the acceleration's main directions."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.protect import protected
    from lcm_lora.lora.reduce import decomposed

    model = flow_model("Flux")
    names = dialects(model)
    fused = parse(file_of(model, names["kohya"], rank=1, seed=1), {}, "fused")
    split = parse(file_of(model, names["diffusers"], rank=3, seed=2), {}, "split")
    result, report = protected(split, fused, 1.0)
    for name in (f"lora_unet_double_blocks_{i}_txt_attn_qkv" for i in (0, 1)):
        style = result.deltas[name].matrix()
        main = decomposed(fused.deltas[name]).right[:1]
        assert (style @ main.T).norm() <= 1e-4 * style.norm() and style.norm() > 1
    assert "split" in report


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "dora"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_products_and_magnitudes_change_parts_of_a_weight(comfy, algorithm, dialect):
    """LoHa and LoKr as the host applies them; DoRA as peft merges it, on the rows of the part."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.lora.host import apply

    model = flow_model("Flux")
    ends = ("_img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v", "norm_out.linear")
    names = {n: t for n, t in dialects(model)[dialect].items() if n.endswith(ends)}
    file, merged = {}, {}
    generator = torch.Generator().manual_seed(4)
    there = model.model.state_dict()

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    for name, target in names.items():
        key, rows, *function = (target, None) if isinstance(target, str) else target
        whole = there[key] if key not in merged else merged[key]
        part = whole if rows is None else whole.narrow(*rows)
        turn = function[0] if function else lambda weight: weight
        out, columns = part.shape
        if algorithm == "lokr":
            file[f"{name}.lokr_w1"], file[f"{name}.lokr_w2"] = (
                random(4, 4),
                random(out // 4, columns // 4),
            )
        elif algorithm == "loha":
            for i in (1, 2):
                file[f"{name}.hada_w{i}_a"], file[f"{name}.hada_w{i}_b"] = (
                    random(out, 2),
                    random(2, columns),
                )
            file[f"{name}.alpha"] = torch.tensor(1.0)
        else:
            up, down, size = random(out, 2), random(2, columns), random(out, 1).abs()
            file[f"{name}.lora_B.weight"], file[f"{name}.lora_A.weight"] = up, down
            file[f"{name}.lora_magnitude_vector"] = size.flatten()
            own = turn(part) + up @ down
            merged[key] = whole.clone()
            place = merged[key] if rows is None else merged[key].narrow(*rows)
            place.copy_(turn(own * size / own.norm(dim=1, keepdim=True)))
    vector = parse(file, {}, algorithm)
    assert len(names) == len(vector.modules()) > 1
    for one in (vector, from_wire(to_wire(vector))):
        patched, _, coverage = apply(model, None, one, 1.0, 0.0)
        assert coverage.taken == coverage.total, str(coverage)
        weights = patched_weights(patched)
        expected = merged or patched_weights(by_host(model, file))
        assert weights.keys() == expected.keys()
        for key, weight in expected.items():
            assert (weights[key] - weight).norm() <= 1e-5 * weight.norm(), key


def test_slices_change_as_pefts_own_merge_does(comfy):
    """peft on the split layers of diffusers, whose rows are those of the host's fused ones."""
    peft = pytest.importorskip("peft", reason="peft is a developer's package")
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    model = flow_model("Flux")
    names = dialects(model)["diffusers"]
    there = model.model.state_dict()
    # One name for each layer, without those whose halves diffusers swaps, and without Flux2's.
    names = {
        target: name
        for name, target in names.items()
        if len(target) != 3 and not name.endswith("to_qkv_mlp_proj")
    }
    names = {name: target for target, name in names.items()}
    plain = torch.nn.Module()
    for name, target in names.items():
        key, rows = (target, None) if isinstance(target, str) else target
        weight = there[key] if rows is None else there[key].narrow(*rows)
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        plain.add_module(name.replace(".", "_"), layer)
    layers = [name for name, _ in plain.named_children()]
    network = peft.LoraModel(
        plain, {"default": peft.LoraConfig(r=3, lora_alpha=2, target_modules=layers)}, "default"
    )
    file = {}
    for name in names:
        layer = getattr(plain, name.replace(".", "_"))
        layer.lora_B["default"].weight.data.normal_(0, 0.1)
        file[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach().clone()
        file[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight.detach().clone()
        file[f"{name}.alpha"] = torch.tensor(2.0)
    network.merge_and_unload()
    patched, _, coverage = apply(model, None, parse(file, {}, "peft"), 1.0, 0.0)
    assert coverage.taken == coverage.total == len(names)
    weights = patched_weights(patched)
    for name, target in names.items():
        key, rows = (target, None) if isinstance(target, str) else target
        weight = weights[key] if rows is None else weights[key].narrow(*rows)
        expected = getattr(plain, name.replace(".", "_")).weight
        assert (weight - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_width_of_a_packed_model_is_that_of_its_layers(comfy):
    """nvfp4 keeps two numbers in a byte, and the state dict has the bytes."""
    from lcm_lora.lora.weights.host import detect

    model = flow_model("Flux")
    before = detect(model)
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            bytes_ = torch.zeros(layer.out_features, layer.in_features // 2, dtype=torch.uint8)
            layer.weight = torch.nn.Parameter(bytes_, requires_grad=False)
    assert detect(model) == before and before.width == 128


def test_the_weights_of_a_model_are_listed_once(comfy, monkeypatch):
    """A large transformer takes long for its state dict."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    model = flow_model("Flux")
    vector = parse(file_of(model, dialects(model)["kohya"]), {}, "a")
    asked = []
    own = model.model.state_dict

    def counted(*settings, **more):
        path = Path(sys._getframe(1).f_code.co_filename)
        asked.append("ours" if path.is_relative_to(ROOT) else path.name)
        return own(*settings, **more)

    monkeypatch.setattr(model.model, "state_dict", counted)
    apply(model, None, vector, 1.0, 0.0)
    assert (asked.count("ours"), asked.count("model_patcher.py")) == (1, 1), asked
