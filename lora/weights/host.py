"""ComfyUI's models: their architecture, weights, differences, and our own kind of patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..architecture import Architecture, architecture
from ..delta import Opaque
from ..extract import Layer
from ..formats.module_names import UNET, canonical_names
from ..formats.transformers import width_of
from ..opaque import merged

# The architecture of a ComfyUI class whose name differs. Others have the name of their class.
_NAMES = {
    "FluxInpaint": "Flux",
    "FluxSchnell": "Flux",
    "PixArtAlpha": "PixArt",
    "PixArtSigma": "PixArt",
    "HunyuanDiT1": "HunyuanDiT",
    "HunyuanVideoI2V": "HunyuanVideo",
    "HunyuanVideoSkyreelsI2V": "HunyuanVideo",
    "HunyuanImage21": "HunyuanImage",
    "ZImage": "Z-Image",
    "QwenImage": "Qwen-Image",
    "CosmosT2IPredict2": "Cosmos-Predict2",
    "CosmosI2VPredict2": "Cosmos-Predict2",
    "LTXV": "LTX-Video",
    "Kandinsky5Image": "Kandinsky5",
    "ErnieImage": "Ernie-Image",
}


def detect(model: ModelPatcher, layers: Layers | None = None) -> Architecture | None:
    """The architecture of a model. None if it is a UNet of an unknown type.

    layers: the model's, if the caller has them already.
    """
    about = model.model.model_config
    config: dict[str, Any] = about.unet_config
    if "num_res_blocks" in config:
        return architecture(config.get("context_dim"), config["transformer_depth"][-1])
    kind = type(about).__name__
    name = "Wan" if kind.startswith("WAN2") else _NAMES.get(kind, kind)
    layers = layers or Layers(model)
    weights = [key for key in layers.stored if key.endswith(".weight")]
    shapes = {name_of(key): layers.shape(key) for key in weights}
    return Architecture(name, width_of(name, shapes), is_unet=False)


def name_of(key: str) -> str:
    """The canonical name of a layer of a transformer, by the key of its weight."""
    path = key.removeprefix("diffusion_model.").removesuffix(".weight")
    return UNET + path.replace(".", "_")


class Layers:
    """The weights of a model by their keys, with the shapes that its layers compute with. In the
    state dict, a packed layer (nvfp4, GGUF) has the shape of its bytes instead."""

    def __init__(self, patcher: ModelPatcher):
        self.patcher = patcher

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """The state dict. Made on first use, because that takes long for a large model."""
        return self.patcher.model.state_dict()

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def shape(self, key: str) -> tuple[int, ...]:
        """[out, in, ...] as the layer computes with it."""
        weight, layer = self._weight(key), _attribute(self.patcher, key.rpartition(".")[0])
        out, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
        is_packed = key.endswith(".weight") and not weight.is_floating_point()
        if is_packed and out is not None and columns is not None:
            return out, columns
        return tuple(weight.shape)

    def unpatchable(self, key: str) -> str:
        """Why ComfyUI cannot change the weight; empty if it can.

        It can add to floating point numbers and to its own packed formats. Other packs bring their
        own patcher if LoRAs can be added to their format.
        """
        weight = self._weight(key)
        patches_itself = (
            type(self.patcher).patch_weight_to_device is not ModelPatcher.patch_weight_to_device
        )
        if patches_itself or isinstance(weight, QuantizedTensor) or weight.is_floating_point():
            return ""
        return f"the model's weight is stored as {weight.dtype}, to which ComfyUI cannot add"

    def _weight(self, key: str) -> Tensor:
        weight = _attribute(self.patcher, key)
        return self.stored[key] if weight is None else weight


class Merge(WeightAdapterBase):
    """A patch for ComfyUI that merges an Opaque module as the owner of its format does.

    It adds `strength` times the change of a merge at strength 1: 0.5 adds half of that change, and
    -0.5 subtracts half of it.
    """

    name = "lcm_lora"

    def __init__(self, loaded_keys: set[str], weights: tuple[tuple[str, Tensor | float], ...]):
        # Tuples of a name and a value, because ComfyUI looks for tensors in tuples when it moves a
        # patch to a device. It then makes a new patch from these two arguments.
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, module: Opaque) -> Merge:
        # ComfyUI moves tensors to a device. The alpha is only a number.
        weights = ((k, float(part) if k == "alpha" else part) for k, part in module.items())
        return cls(set(), tuple(weights))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Tensor | None = None,
    ) -> Tensor:
        """Adds the module to the weight in place, as ComfyUI's own patches do."""
        parts, alpha = {}, None
        for name, part in self.weights:
            if isinstance(part, Tensor):
                parts[name] = part.to(weight.device, torch.float32)
            else:
                alpha = part
        # The function puts numbers in diffusers' order into the model's, and back.
        turned = function(weight)
        change = merged(parts, alpha, turned) - turned.float()
        weight += function((strength * change).to(weight.dtype))
        return weight


def input_scale(patcher: ModelPatcher, weight: str) -> Tensor | None:
    """The numbers [in] by which a layer multiplies its inputs, if any (ModelOpt's smoothing)."""
    return getattr(_attribute(patcher, weight.rpartition(".")[0]), "pre_quant_scale", None)


def _attribute(patcher: ModelPatcher, key: str) -> Any:
    """The module or parameter at this key; None if the state dict uses other names."""
    try:
        return comfy.utils.get_attr(patcher.model, key)
    except AttributeError:
        return None


def stored(model: ModelPatcher, key: str) -> Tensor:
    """A weight without the patches of the graph, even while ComfyUI has them in the model."""
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    if key in model.backup:
        return model.backup[key].weight
    return get_key_weight(model.model, key)[0]


def with_patches(model: ModelPatcher, key: str, called: str) -> Tensor:
    """An unpacked weight with its patches, in float32 on the CPU.

    called: the model's name in error messages. ModelPatcher.get_key_patches returns the same, but
    raises an AttributeError for packed models in ComfyUI 0.30.

    Raises:
        ValueError: the weight is packed in a way that ComfyUI itself does not use.
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


def differences(
    distilled: ModelPatcher, base: ModelPatcher, watch: Callable[[list[str]], Iterable[str]] = iter
) -> Iterator[Layer]:
    """`distilled` minus `base`, layer by layer, in float32 on the CPU. This includes the patches of
    the graph, even while ComfyUI holds the models on a device. Packed weights are unpacked.

    watch: goes through the names of the layers; it may show progress, or raise.

    Raises:
        ValueError: the models are of different architectures, a layer has different shapes in
            them, or a weight is packed in a way that ComfyUI itself does not use.
    """
    kinds = detect(distilled), detect(base)
    if kinds[0] != kinds[1] or kinds[1] is None:
        raise ValueError(
            f"The distilled model is {kinds[0] or 'of an unknown architecture'} and the base model "
            f"is {kinds[1] or 'of an unknown architecture'}; expected two models of the same "
            "architecture."
        )
    shared = distilled.model.state_dict().keys() & base.model.state_dict().keys()
    names = _layers(base)
    for weight in watch(list(names)):
        bias = bias_of(weight)
        if weight in shared:
            yield (
                names[weight],
                _difference(distilled, base, weight),
                _difference(distilled, base, bias) if bias in shared else None,
            )


def _layers(model: ModelPatcher) -> dict[str, str]:
    """The canonical names of a model's layers, by the keys of their weights."""
    config = model.model.model_config.unet_config
    if "num_res_blocks" not in config:
        keys = model.model.state_dict()
        of_model = [k for k in keys if k.startswith("diffusion_model.") and k.endswith(".weight")]
        return {key: name_of(key) for key in of_model}
    paths = comfy.utils.unet_to_diffusers(config)
    # Some native names have two paths, in random order, but one canonical name.
    path_of = {native: path for path, native in paths.items() if native.endswith(".weight")}
    names = {native: f"unet.{path.removesuffix('.weight')}" for native, path in path_of.items()}
    return {
        f"diffusion_model.{native}": canonical_names([name])[name] for native, name in names.items()
    }


def bias_of(weight: str) -> str:
    """The key of the bias beside a weight."""
    return weight.removesuffix(".weight") + ".bias"


def _difference(distilled: ModelPatcher, base: ModelPatcher, key: str) -> Tensor | None:
    """The difference of one weight. None if both models share the tensor and nothing patches it."""
    is_patched = key in distilled.patches or key in base.patches
    if stored(distilled, key) is stored(base, key) and not is_patched:
        return None
    minuend, subtrahend = with_patches(distilled, key, "distilled"), with_patches(base, key, "base")
    if minuend.shape != subtrahend.shape:
        raise ValueError(
            f"{key} is {list(minuend.shape)} in the distilled model and {list(subtrahend.shape)} "
            "in the base model; expected two models of the same layout. Choose the base model that "
            "the distilled one was made from."
        )
    return minuend - subtrahend
