"""LoHa, LoKr and LoCon files made by LyCORIS, against the weights that LyCORIS itself makes."""

import pytest
import torch
from lcm_lora.lora.wire import from_wire, parse, to_wire

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
    found = vector.deltas[NAME]
    assert not vector.ignored
    assert found.rank <= min(delta.shape[0], delta[0].numel())
    torch.testing.assert_close(found.matrix().reshape(delta.shape), delta, rtol=1e-5, atol=1e-6)
    again = from_wire(to_wire(vector)).deltas[NAME]
    torch.testing.assert_close(again.matrix(), found.matrix())


@pytest.mark.parametrize(
    ("kind", "hurt", "says"),
    [
        ("loha", {"hada_w2_b": None}, "has no hada_w2_b"),
        ("loha", {"hada_w1_a": torch.ones(24, 5)}, "do not multiply"),
        ("loha", {"hada_w1_a": torch.ones(9, 4)}, "expected the same shape"),
        ("loha", {"hada_t1": torch.ones(3, 4, 3, 3)}, r"expected \[24, 4, kh, kw\]"),
        ("lokr", {"lokr_w2_a": None}, "has no lokr_w2_a"),
        ("lokr", {"lokr_w2_b": torch.ones(0, 3)}, "expected a matrix"),
    ],
)
def test_broken_factors_are_told_by_name(kind, hurt, says):
    tensors, _ = made(kind, LINEAR, lora_dim=4 if kind == "loha" else 2)
    for part, tensor in hurt.items():
        tensors.pop(f"{NAME}.{part}", None)
        if tensor is not None:
            tensors[f"{NAME}.{part}"] = tensor
    with pytest.raises(ValueError, match=f"a, module {NAME}: .*{says}"):
        parse(tensors, {}, "a")
