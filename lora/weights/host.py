"""The weights of ComfyUI's models, packed or not: their shapes, their numbers, and our patch."""

from __future__ import annotations

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..delta import Opaque
from ..opaque import merged


class Layers:
    """The weights of a model by their keys, with the shapes that its layers compute with. The state
    dict of a packed layer (nvfp4, GGUF) has the shape of its bytes instead."""

    def __init__(self, patcher: ModelPatcher):
        self.patcher, self.stored = patcher, patcher.model.state_dict()

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def shape(self, key: str) -> tuple[int, ...]:
        """[out, in, ...] as the layer computes with it."""
        weight, layer = self._weight(key), _attribute(self.patcher, key.rpartition(".")[0])
        sides = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
        packed = key.endswith(".weight") and not weight.is_floating_point()
        return sides if packed and None not in sides else tuple(weight.shape)

    def unpatchable(self, key: str) -> str:
        """Why the host cannot change the weight; empty where it can.

        It can add to floating point numbers and to its own packed formats. A pack whose format
        LoRAs can be added to brings a patcher of its own.
        """
        weight = self._weight(key)
        own = type(self.patcher).patch_weight_to_device is not ModelPatcher.patch_weight_to_device
        if own or isinstance(weight, QuantizedTensor) or weight.is_floating_point():
            return ""
        return f"the model's weight is stored as {weight.dtype}, to which ComfyUI cannot add"

    def _weight(self, key: str) -> Tensor:
        weight = _attribute(self.patcher, key)
        return self.stored[key] if weight is None else weight


class Merge(WeightAdapterBase):
    """A patch for the host that merges an Opaque module as the owner of its format does.

    It adds `strength` times the change of a merge at strength 1, so that 0.5 is half of that change
    and -0.5 takes half of it away.
    """

    name = "lcm_lora"

    def __init__(self, loaded_keys: set[str], weights: tuple[tuple[str, Tensor | float], ...]):
        # Tuples of a name and a value, because the host looks for tensors in tuples when it moves
        # a patch to a device, and then makes a new patch from these two arguments.
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, module: Opaque) -> Merge:
        alpha = {"alpha": float(module["alpha"])} if "alpha" in module else {}
        return cls(set(), tuple((module | alpha).items()))

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function,
        intermediate_dtype=torch.float32, original_weight=None,
    ) -> Tensor:  # fmt: skip
        """The weight with the module added in place, as the host's own patches do."""
        parts = dict(self.weights)
        alpha = parts.pop("alpha", None)
        parts = {name: part.to(weight.device, torch.float32) for name, part in parts.items()}
        change = merged(parts, alpha, weight) - weight.float()
        weight += function((strength * change).to(weight.dtype))
        return weight


def input_scale(patcher: ModelPatcher, weight: str) -> Tensor | None:
    """The numbers that a layer multiplies its inputs by, if any (ModelOpt's smoothing): [in]."""
    return getattr(_attribute(patcher, weight.rpartition(".")[0]), "pre_quant_scale", None)


def _attribute(patcher: ModelPatcher, key: str):
    """The module or parameter at this key; None if the state dict uses other names."""
    try:
        return comfy.utils.get_attr(patcher.model, key)
    except AttributeError:
        return None


def stored(model: ModelPatcher, key: str) -> Tensor:
    """A weight without the patches of the graph, also while the host has them in the model."""
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    if key in model.backup:
        return model.backup[key].weight
    return get_key_weight(model.model, key)[0]


def with_patches(model: ModelPatcher, key: str, called: str) -> Tensor:
    """An unpacked weight with its patches, in float32 on the CPU. called: names it in errors.

    ModelPatcher.get_key_patches returns both too, but raises an AttributeError for packed models in
    ComfyUI 0.30.

    Raises:
        ValueError: the weight is packed in a way that is not the host's.
    """
    weight, (_, _, convert) = stored(model, key), get_key_weight(model.model, key)
    if isinstance(weight, QuantizedTensor):
        # First to float32, because it unpacks to its current number type.
        numbers, convert = weight.to("cpu", torch.float32).dequantize(), None
    elif type(weight).dequantize is not Tensor.dequantize:  # of another pack, and unpacks itself
        numbers, convert = weight.dequantize(), None
    elif weight.is_floating_point():
        numbers = weight
    else:
        raise ValueError(
            f"{key} of the {called} model is packed as {weight.dtype} in a way that only the nodes "
            "which loaded it can read, such as GGUF; expected floating point, or a packed format "
            "of ComfyUI. Load an unpacked file of this model."
        )
    numbers = numbers.to("cpu", torch.float32, copy=True).as_subclass(Tensor)
    if convert is not None:
        numbers = convert(numbers, inplace=True)
    numbers = comfy.lora.calculate_weight(model.patches.get(key, []), numbers, key)
    scale = input_scale(model, key) if key.endswith(".weight") else None
    return numbers if scale is None else numbers * scale.to(numbers)
