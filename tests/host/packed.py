"""The small model with some layers packed, in each format of the host's and as GGUF packs do."""

from __future__ import annotations

import json

import torch
from torch import Tensor

# Not attn2: the host would read the family from the shape of its packed bytes.
ENDS = ("attn1.to_q.weight", "ff.net.2.weight")
BLOCK = 32


def formats() -> dict[str, dict]:
    """The host's packed formats, and the settings of a layer's configuration."""
    from comfy.quant_ops import QUANT_ALGOS

    settings_of = {name: {} for name in QUANT_ALGOS}
    if "int8_tensorwise" in settings_of:
        settings_of["int8_tensorwise, rotated"] = {"convrot": True, "convrot_groupsize": 64}
    if "convrot_w4a4" in settings_of:
        settings_of["convrot_w4a4"] = {"convrot_groupsize": 64}
    return settings_of


def keys_of(model) -> list[str]:
    """The weights that are packed."""
    return [f"diffusion_model.{key}" for key in model.model.diffusion_model.state_dict()
            if key.endswith(ENDS)]  # fmt: skip


def packed(model, name: str):
    """A MODEL as the host loads it from a file in this format."""
    import comfy.sd
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    settings, kind = formats()[name], name.partition(",")[0]
    file = {}
    for key, weight in model.model.diffusion_model.state_dict().items():
        base = f"model.diffusion_model.{key.removesuffix('weight')}"
        if not key.endswith(ENDS):
            file[f"model.diffusion_model.{key}"] = weight.clone()
            continue
        layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
        options = {"scale": "recalculate"} if kind.startswith("float8") else settings
        options = options | ({"per_channel": True} if "convrot" in settings else {})
        tensor = QuantizedTensor.from_float(weight.bfloat16(), layout, **options)
        file |= tensor.state_dict(f"{base}weight")
        about = json.dumps({"format": kind, **settings}).encode()
        file[f"{base}comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
    return comfy.sd.load_state_dict_guess_config(file, output_vae=False, output_clip=False)[0]


class PackedTensor(torch.Tensor):
    """Q8_0 as city96's GGUF nodes hold it: bytes, 34 for 32 numbers, that tell another shape."""

    tensor_shape: torch.Size

    @property
    def shape(self):
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()

    def detach(self):
        return self

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_shape = self.shape
        return new


def pack(weight: Tensor) -> PackedTensor:
    blocks = weight.float().reshape(len(weight), -1, BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float()).round().to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], -1).flatten(1)
    tensor = data.as_subclass(PackedTensor)
    tensor.tensor_shape = weight.shape
    return tensor


def unpack(tensor: PackedTensor) -> Tensor:
    data = tensor.as_subclass(Tensor).unflatten(1, (-1, BLOCK + 2))
    scale = data[..., :2].contiguous().view(torch.float16).float()
    return (data[..., 2:].contiguous().view(torch.int8) * scale).flatten(1)


def as_gguf(model):
    """The MODEL with some layers as such a pack loads them, and the pack's own patcher."""
    from comfy.model_patcher import ModelPatcher

    class Patcher(ModelPatcher):
        def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
            raise NotImplementedError("patches stay beside the packed weight")

    def bytes_only(layer, destination, prefix, _metadata):
        data = layer.weight.as_subclass(Tensor)
        destination[f"{prefix}weight"] = torch.zeros_like(data, device="meta")

    for key in keys_of(model):
        layer = model.model.get_submodule(key.removesuffix(".weight"))
        layer.weight = torch.nn.Parameter(pack(layer.weight), requires_grad=False)
        layer.register_state_dict_post_hook(bytes_only)
    return Patcher(model.model, model.load_device, model.offload_device)
