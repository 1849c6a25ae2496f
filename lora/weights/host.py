"""The weights of ComfyUI's models: their shapes and numbers, packed or not, and a patch of ours."""

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
    """The weights of a model by their keys, with the shapes that its layers compute with: of packed
    weights (nvfp4, GGUF) a state dict has the stored bytes."""

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

        It adds to floating point numbers and to those that it unpacks itself. Whoever packs
        otherwise brings tensors of an own class, or an own patcher.
        """
        weight = self._weight(key)
        own = type(self.patcher).patch_weight_to_device is not ModelPatcher.patch_weight_to_device
        plain = type(weight) in (Tensor, torch.nn.Parameter)
        if own or not plain or weight.is_floating_point():
            return ""
        return f"the model's weight is stored as {weight.dtype}, to which ComfyUI cannot add"

    def _weight(self, key: str) -> Tensor:
        weight = _attribute(self.patcher, key)
        return self.stored[key] if weight is None else weight


class Merge(WeightAdapterBase):
    """A patch of the host's that merges an Opaque module as the owner of its format does.

    `strength` times what the whole merge changes is added, so a strength of 0.5 is half the way,
    and a negative one goes the other way.
    """

    name = "lcm_lora"

    def __init__(self, loaded_keys: set[str], weights: tuple[tuple[str, Tensor | float], ...]):
        # Names and values, in tuples: so the host finds the tensors where it moves patches to a
        # device, and makes another patch of the moved ones by these two arguments.
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
    """What a layer multiplies its inputs by, one number for each (ModelOpt's smoothing)."""
    return getattr(_attribute(patcher, weight.rpartition(".")[0]), "pre_quant_scale", None)


def _attribute(patcher: ModelPatcher, key: str):
    """What a model has at this key; None where its state dict has names of its own."""
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
    """A weight with its patches, unpacked: float32 on the CPU. called: which model it is, in words.

    ModelPatcher.get_key_patches tells both too, but fails at packed models in ComfyUI 0.30.

    Raises:
        ValueError: the weight is packed in a way that is not the host's.
    """
    weight, (_, _, convert) = stored(model, key), get_key_weight(model.model, key)
    if isinstance(weight, QuantizedTensor):
        # In this order, for it unpacks to the number type that it has.
        whole, convert = weight.to("cpu", torch.float32).dequantize(), None
    elif type(weight).dequantize is not Tensor.dequantize:  # another pack's, that unpacks itself
        whole, convert = weight.dequantize(), None
    elif weight.is_floating_point():
        whole = weight
    else:
        raise ValueError(
            f"{key} of the {called} model is packed as {weight.dtype} in a way that only the nodes "
            "which loaded it can read, such as GGUF; expected floating point, or a packed format "
            "of ComfyUI. Load an unpacked file of this model."
        )
    whole = whole.to("cpu", torch.float32, copy=True).as_subclass(Tensor)
    if convert is not None:
        whole = convert(whole, inplace=True)
    whole = comfy.lora.calculate_weight(model.patches.get(key, []), whole, key)
    scale = input_scale(model, key) if key.endswith(".weight") else None
    return whole if scale is None else whole * scale.to(whole)
