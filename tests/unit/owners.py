"""Modules of other adapters than LoRA, made by the libraries that own their formats, with what they
make of a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

LYCORIS = {
    "DoRA": {"algo": "locon", "lora_dim": 4, "weight_decompose": True},
    "DoRA of inputs": {
        "algo": "locon", "lora_dim": 4, "weight_decompose": True, "wd_on_out": False
    },
    "DoRA of a LoHa": {"algo": "loha", "lora_dim": 3, "weight_decompose": True},
    "DoRA of a LoKr": {
        "algo": "lokr", "lora_dim": 2, "factor": 4, "weight_decompose": True, "wd_on_out": False
    },
    "OFT": {"algo": "oft", "lora_dim": 4, "constraint": 0.0},
    "OFT, bound and rescaled": {"algo": "oft", "lora_dim": 4, "constraint": 0.01, "rescaled": True},
    "BOFT": {"algo": "boft", "lora_dim": 10, "constraint": 0.0},
    "BOFT, bound and rescaled": {
        "algo": "boft", "lora_dim": 10, "constraint": 0.01, "rescaled": True
    },
    "GLoRA": {"algo": "glora", "lora_dim": 4},
    "LoHa": {"algo": "loha", "lora_dim": 3},
    "LoHa with cores": {"algo": "loha", "lora_dim": 3, "use_tucker": True},
    "LoKr": {"algo": "lokr", "lora_dim": 2, "factor": 4},
    "LoKr with cores": {"algo": "lokr", "lora_dim": 2, "factor": 4, "use_tucker": True},
    "LoCon with cores": {"algo": "locon", "lora_dim": 4, "use_tucker": True},
}  # fmt: skip
"""LyCORIS' settings of each kind, with an alpha that is no rank"""


def layer_of(weight: Tensor) -> torch.nn.Module:
    """A layer of torch with this weight [out, in, ...]."""
    out, columns, *kernel = weight.shape
    if kernel:
        layer = torch.nn.Conv2d(columns, out, kernel, padding=kernel[0] // 2, bias=False)
    else:
        layer = torch.nn.Linear(columns, out, bias=False)
    layer.weight.data = weight.clone()
    return layer


def of_lycoris(kind: str, name: str, weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A module for a weight with random numbers; -> (its tensors as in a file, the merged weight).

    Of products the merge is that of LyCORIS' forward, for get_merged_weight has alpha / rank twice
    (LyCORIS 4.1.3).
    """
    pytest.importorskip("lycoris", reason="lycoris-lora is a developer's package")
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    algos = {
        "locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "glora": GLoRAModule,
        "oft": DiagOFTModule, "boft": ButterflyOFTModule,
    }  # fmt: skip
    settings = dict(LYCORIS[kind])
    torch.manual_seed(seed)
    module = algos[settings.pop("algo")](name, layer_of(weight), 1.0, alpha=3, **settings)
    with torch.no_grad():
        for part, parameter in module.named_parameters():
            if part in ("dora_scale", "rescale"):
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            else:
                parameter.normal_(0, 0.3)
        if hasattr(module, "get_weight"):
            moved = module.org_weight + module.get_weight(weight.shape) * module.scalar
            expected = module.apply_weight_decompose(moved) if module.wd else moved
        else:
            expected = module.get_merged_weight()[0]
    tensors = {f"{name}.{part}": tensor.detach() for part, tensor in module.state_dict().items()}
    return tensors, expected.detach().reshape(weight.shape)


def of_peft(name: str, weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """PEFT's DoRA with an alpha for a weight, as `of_lycoris`. Its file tells no alpha: 2 / rank 4
    goes into the factor."""
    peft = pytest.importorskip("peft", reason="peft is a developer's package")
    torch.manual_seed(seed)
    network = torch.nn.Sequential(layer_of(weight))
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=True)
    network = peft.get_peft_model(network, config)
    with torch.no_grad():
        for part, parameter in network.named_parameters():
            if "magnitude" in part:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            elif "lora_" in part:
                parameter.normal_(0, 0.3)
    tensors = {
        key.replace("base_model.model.0", name): t.detach().clone()
        for key, t in peft.get_peft_model_state_dict(network).items()
    }
    tensors[f"{name}.lora_B.weight"] *= 2 / 4
    expected = network.merge_and_unload()[0].weight.detach()
    return tensors, expected
