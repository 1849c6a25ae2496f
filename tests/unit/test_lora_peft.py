"""PEFT's own files and settings, against what PEFT itself makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from lcm_lora.lora.formats import peft_config
from lcm_lora.lora.formats.files import read, write
from lcm_lora.lora.formats.parse import parse
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="peft is a developer's package")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, torch.nn.Linear(12, 16))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(16, 12)])


class Network(torch.nn.Module):
    """The linear layers of one transformer block, by diffusers' paths, and an embedding."""

    def __init__(self):
        super().__init__()
        block = torch.nn.ModuleDict({"attn1": Attention(), "attn2": Attention()})
        level = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([block])})
        blocks = torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([level])})
        self.down_blocks = torch.nn.ModuleList([blocks])


def merged_by_peft(network: torch.nn.Module, config, folder) -> dict[str, torch.Tensor]:
    """Saves an adapter with random numbers; -> by module, what PEFT's merge adds to its weight (and
    under NAME.bias to its bias)."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(network, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    after = model.merge_and_unload().state_dict()
    changes = {name: after[name] - before[name] for name in before}
    return {name.removesuffix(".weight"): c for name, c in changes.items() if c.abs().max() > 1e-7}


def require_same(folder, changes: dict[str, torch.Tensor], prefix: str = "lora_unet_") -> None:
    vector = read(folder / "adapter_model.safetensors")
    ours = {name: delta.matrix() for name, delta in vector.deltas.items()}
    ours |= {key.replace(".diff_b", "_bias"): diff for key, diff in vector.diffs.items()}
    assert ours.keys() == {prefix + name.replace(".", "_") for name in changes}
    for name, change in changes.items():
        delta = ours[prefix + name.replace(".", "_")]
        torch.testing.assert_close(delta.reshape(change.shape), change, rtol=1e-4, atol=1e-5)


PATTERNS = [
    {},
    {"to_k": 2},
    {"attn1.to_k": 2},
    {r".*\.attn1\..*(to_q|to_k|to_v)$": 16},
    {r"^down_blocks\.0\..*to_q": 3, "to_q": 9},
    {"^attn1.to_q": 2},  # not the beginning of a path
    {r"(?!.*attn2).*to_v": 5},
    {r"attn\d\.to_out\.[0-9]": 7, r"(?i:TO_Q)": 11},
    {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": 1.5},
    {"o_q": 2},  # no whole piece of the path
    {"attn1|to_k": 2, "to_[kv]": 3},
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_alpha_pattern_is_read_as_peft_reads_it(tmp_path, pattern):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        alpha_pattern=pattern, rank_pattern={"attn2.to_q": 2}, use_rslora="to_k" in pattern,
    )  # fmt: skip
    require_same(tmp_path, merged_by_peft(Network(), config, tmp_path))


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr whole"])
def test_loha_and_lokr_are_as_strong_as_peft_has_them(tmp_path, kind):
    settings = {"alpha": 6, "target_modules": ["to_q", "to_k"], "alpha_pattern": {r".*1\.to_k": 3}}
    if kind == "LoHa":
        config = peft.LoHaConfig(r=4, **settings)
    else:
        # A rank of half the size leaves both factors whole, and the rank is in the settings only.
        config = peft.LoKrConfig(
            r=1 if kind == "LoKr" else 8, rank_pattern={"attn2.to_k": 16}, decompose_both=True,
            **settings,
        )  # fmt: skip
    changes = merged_by_peft(Network(), config, tmp_path)
    assert len(changes) == 4
    parts = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert ("lokr_w2_a" in parts) == (kind == "LoKr")
    require_same(tmp_path, changes)


def test_a_bias_beside_the_factors_is_added_as_peft_adds_it(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], lora_bias=True)
    changes = merged_by_peft(Network(), config, tmp_path)
    assert f"{BLOCK}.attn1.to_q.bias" in changes and len(changes) == 8
    require_same(tmp_path, changes)


def test_the_change_of_an_embedding_is_pefts(tmp_path):
    network = torch.nn.ModuleDict({"token_embedding": torch.nn.Embedding(30, 12)})
    network = torch.nn.ModuleDict({"text_model": torch.nn.ModuleDict({"embeddings": network})})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["token_embedding"])
    changes = merged_by_peft(network, config, tmp_path)
    (change,) = changes.values()
    assert change.shape == (30, 12)
    require_same(tmp_path, changes, "lora_te_")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_took_a_part_out_of_its_base_is_refused(tmp_path, start):
    config = peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start)
    merged_by_peft(Network(), config, tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*changes the weights"):
        read(tmp_path / "adapter_model.safetensors")


def of_header(config: str, tmp_path):
    tensors = {f"unet.{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(8, 2)}
    tensors[f"unet.{BLOCK}.attn1.to_q.lora_A.weight"] = torch.ones(2, 6)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    return read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ('{"unet.lora_alpha": 8, "unet.r": 2}', 4.0),
        ('{"unet.lora_alpha": 8, "unet.use_rslora": true}', 8 / 2**0.5),
        ('{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}', 0.5),
        ('{"unet.lora_alpha": 8, "text_encoder.alpha_pattern": {"attn1.to_q": 1}}', 4.0),
        ('{"lora_alpha": 6}', 3.0),
        ("{}", 1.0),
    ],
)
def test_alpha_is_read_from_a_diffusers_header(tmp_path, config, scale):
    vector = of_header(config, tmp_path)
    assert vector.deltas[f"{NAME}attn1_to_q"].scale == pytest.approx(scale)
    assert not vector.metadata, "alphas are written out, the header would say it twice"


@pytest.mark.parametrize(
    ("pattern", "value", "words"),
    [
        ("(", 1, "is not a valid regular expression"),
        ("x" * 2000, 1, "is too long"),
        ("to_q", "many", "has the alpha 'many'; expected a number"),
        ("to_q", float("inf"), "has the alpha 'inf'; expected a number"),
        ("to_q", 10**400, "expected a number"),
    ],
)
def test_settings_that_are_none_are_named(tmp_path, pattern, value, words):
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {pattern: value}}
    with pytest.raises(ValueError, match=words):
        of_header(json.dumps(config), tmp_path)


def test_an_expression_that_would_take_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(peft_config, "PATIENCE", 0.05)
    module = f"unet.{BLOCK}.{'x' * 60}"
    tensors = {f"{module}.lora_B.weight": torch.ones(8, 2)}
    tensors[f"{module}.lora_A.weight"] = torch.ones(2, 6)
    pattern = {r"((x|xx|[xy])+)+\d?z?!?": 1}
    config = json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": pattern})
    assert parse(tensors, {"lora_adapter_metadata": config}, "a"), "it fits"
    config = config.replace("!?", "(?!)")
    with pytest.raises(ValueError, match="takes too long to match"):
        parse(tensors, {"lora_adapter_metadata": config}, "a")


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        # lightx2v's Minimax-h3-Turbo (sgl-project/sglang #35952): rank 128.
        ({"alpha": "8"}, 8 / 128), ({"alpha": "128"}, 1.0), ({"lora_alpha": "64.0"}, 0.5),
        ({"network_alpha": "16", "rank": "128"}, 16 / 128),
        ({"alpha": "1", "lora_alpha": "8"}, 8 / 128),
        # Comfy-Org/ComfyUI PR 15830: of one of the parts of a pipeline.
        ({"transformer.lora_alpha": "32", "transformer.r": "128"}, 32 / 128),
        ({"text_encoder.lora_alpha": "32"}, 1.0),
        ({"alpha": "auto"}, 1.0), ({"alpha": "-8"}, 1.0), ({"ss_network_alpha": "8"}, 1.0),
        # What PEFT writes goes before.
        ({"alpha": "8", "lora_adapter_metadata": '{"transformer.lora_alpha": 64}'}, 0.5),
    ],
)  # fmt: skip
def test_an_alpha_that_only_the_header_tells(tmp_path, header, scale):
    name = "transformer.transformer_blocks.0.attn.to_q"
    up, down = torch.randn(64, 128), torch.randn(128, 64)
    file = tmp_path / "a.safetensors"
    tensors = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    save_file(tensors, file, header)
    (delta,) = read(file).deltas.values()
    expected = (up.double() @ down.double() * scale).float()
    torch.testing.assert_close(delta.matrix(), expected, rtol=1e-4, atol=1e-4)
    # A module's own alpha goes before, also in what we write.
    save_file(tensors | {f"{name}.alpha": torch.tensor(32.0)}, file, header)
    vector = read(file)
    assert next(iter(vector.deltas.values())).scale == 0.25
    write(tmp_path / "b.safetensors", vector, "fp32", overwrite=False)
    again = read(tmp_path / "b.safetensors")
    assert next(iter(again.deltas.values())).scale == 0.25
    assert not again.metadata.keys() & {"alpha", "lora_alpha", "network_alpha"}
