"""LoHa, LoKr and LoCon files made by LyCORIS, against the weights that LyCORIS itself makes."""

from dataclasses import replace

import pytest
import torch
from lcm_lora.lora.formats.parse import parse
from lcm_lora.lora.formats.wire import from_wire, to_wire

pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"
LINEAR, CONV = (24, 40), (24, 16, 3, 3)


def made(kind: str, shape: tuple[int, ...], seed: int = 0, **options):
    """A module of LyCORIS with random factors; -> (its tensors as a file has them, its delta)."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    out, columns, *kernel = shape
    layer = torch.nn.Conv2d(columns, out, kernel) if kernel else torch.nn.Linear(columns, out)
    torch.manual_seed(seed)
    kinds = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
    module = kinds[kind](NAME, layer, 1.0, alpha=3, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
        if kind == "locon":
            delta = module.get_diff_weight()[0]
        else:
            # What its forward adds; get_diff_weight has alpha / rank twice here (LyCORIS 4.1.3).
            delta = module.get_weight(shape) * module.scalar
    return {f"{NAME}.{key}": value for key, value in module.state_dict().items()}, delta


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("locon", LINEAR, {"lora_dim": 4}),
        ("locon", CONV, {"lora_dim": 4}),
        ("locon", CONV, {"lora_dim": 4, "use_tucker": True}),
        ("loha", LINEAR, {"lora_dim": 4}),
        ("loha", LINEAR, {"lora_dim": 8}),
        ("loha", CONV, {"lora_dim": 4}),
        ("loha", CONV, {"lora_dim": 4, "use_tucker": True}),
        ("loha", CONV, {"lora_dim": 6, "use_tucker": True}),
        ("lokr", LINEAR, {"lora_dim": 2, "factor": 4}),
        ("lokr", LINEAR, {"lora_dim": 2, "factor": 4, "decompose_both": True}),
        ("lokr", LINEAR, {"lora_dim": 100, "factor": 4}),
        ("lokr", CONV, {"lora_dim": 2, "factor": 4}),
        ("lokr", CONV, {"lora_dim": 2, "factor": 4, "use_tucker": True}),
        ("lokr", CONV, {"lora_dim": 100, "factor": 4}),
    ],
)
def test_a_file_of_lycoris_is_read_exactly(kind, shape, options):
    tensors, delta = made(kind, shape, **options)
    vector = parse(tensors, {}, "a")
    parsed = vector.deltas[NAME]
    assert not vector.ignored
    assert parsed.rank <= min(delta.shape[0], delta[0].numel())
    torch.testing.assert_close(parsed.matrix().reshape(delta.shape), delta, rtol=1e-5, atol=1e-6)
    again = from_wire(to_wire(vector)).deltas[NAME]
    torch.testing.assert_close(again.matrix(), parsed.matrix())


def test_a_product_is_kept_as_its_factors_and_scaled_with_them():
    """LoKr is not expanded before the sum: expanded it is a thousand times as large."""
    tensors = {f"{NAME}.lokr_w1": torch.randn(64, 64), f"{NAME}.lokr_w2": torch.randn(128, 128)}
    vector = parse(tensors, {}, "a")
    delta = vector.deltas[NAME]
    assert delta.up.is_meta and delta.down.is_meta and delta.shape == (8192, 8192)
    half = to_wire(replace(vector, deltas={NAME: delta.scaled(0.5)}))
    assert sum(tensor.numel() for tensor in half.values()) == 64**2 + 128**2
    torch.testing.assert_close(half[f"{NAME}.lokr_w1"], tensors[f"{NAME}.lokr_w1"] / 2)
    for part in (1, 2):
        tensors[f"{NAME}.lokr_w{part}"] = torch.ones(500, 500)
    with pytest.raises(ValueError, match=r"product is \[250000, 250000\]; no layer"):
        parse(tensors, {}, "a")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("loha", {"use_tucker": True}), ("lokr", {"use_tucker": True, "factor": 4}), ("lokr", {})],
)
def test_a_kernel_is_kept_where_parts_or_name_show_it(kind, options):
    """Other programs expect a convolution's factors with their kernel."""
    tensors, delta = made(kind, CONV, lora_dim=2, **options)
    name = NAME.replace("attentions_0_proj_in", "resnets_0_conv1")
    tensors = {key.replace(NAME, name): tensor for key, tensor in tensors.items()}
    parsed = parse(tensors, {}, "a").deltas[name]
    assert parsed.shape == parsed.plain().shape == CONV
    torch.testing.assert_close(parsed.matrix(), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "hurt", "says"),
    [
        ("loha", {"hada_w2_b": None}, "has no hada_w2_b"),
        ("loha", {"hada_w1_a": torch.ones(24, 5)}, "do not multiply"),
        ("loha", {"hada_w1_a": torch.ones(9, 4)}, "expected the same shape"),
        ("loha", {"hada_t1": torch.ones(3, 4, 3, 3)}, r"expected \[24, 4, kh, kw\]"),
        ("lokr", {"lokr_w2_a": None}, "has no lokr_w2_a"),
        ("lokr", {"lokr_w2_b": torch.ones(0, 3)}, "expected a matrix"),
        ("loha", {"hada_t1": torch.ones(24, 4, 0, 3)}, "expected a matrix"),
    ],
)
def test_broken_factors_are_refused_by_name(kind, hurt, says):
    tensors, _ = made(kind, LINEAR, lora_dim=4 if kind == "loha" else 2)
    for part, tensor in hurt.items():
        tensors.pop(f"{NAME}.{part}", None)
        if tensor is not None:
            tensors[f"{NAME}.{part}"] = tensor
    with pytest.raises(ValueError, match=f"a, module {NAME}: .*{says}"):
        parse(tensors, {}, "a")
