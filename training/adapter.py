"""The LoRA being trained: low-rank layers beside a frozen network, which can be switched off.

One frozen network serves as teacher (adapter off), target and student (adapter on). The layers are
forward hooks of the network, so its code and its weights do not change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# The 14 kinds of layer in the official LCM-LoRA files, under the names of the original
# (LDM) UNet: 278 modules in SD1.5, 423 in SSD-1B, 788 in SDXL.
TARGETS = re.compile(
    r"(attn[12]\.to_(q|k|v|out\.0)|proj_in|proj_out|ff\.net\.(0\.proj|2)"  # transformers
    r"|in_layers\.2|out_layers\.3|skip_connection|emb_layers\.1"  # residual blocks
    r"|^input_blocks\.\d+\.0\.op|^output_blocks\.\d+\.\d+\.conv)$"  # down- and upsamplers
)
# The blocks of ComfyUI's transformers, but not those of a text adapter inside them.
BLOCK = r"^(joint_blocks|double_blocks|single_blocks|transformer_blocks|blocks|layers)\.\d+"
# Every linear layer of these blocks. With the modulation, a LoRA can change the network differently
# at each timestep, as it can with the UNet's emb_layers.
OF_BLOCKS = re.compile(BLOCK + r"\.")


def is_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer or a convolution. ComfyUI's linear layer of packed weights is no
    nn.Linear."""
    return isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Linear"


class LowRank(nn.Module):
    """x -> scale * up(down(x)) beside one Linear or Conv2d; 0 before training (arXiv 2106.09685).

    `down` is [rank, in] or [rank, in, k, k] with the layer's stride and padding, `up` [out, rank]
    or [out, rank, 1, 1]. Both are float32 and are cast to the input's dtype when they are used.

    cast: (down, up) in another dtype, inside `Adapter.cast`.
    """

    cast: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator,
        device: torch.device,
    ):  # fmt: skip
        super().__init__()
        shape = tuple(layer.weight.shape)
        self.scale = alpha / rank
        self.stride: Any = getattr(layer, "stride", None)
        self.padding: Any = getattr(layer, "padding", None)
        ones = (1,) * (len(shape) - 2)
        down = torch.empty(rank, *shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, *ones, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.cast or (self.down, self.up)
        down, up = down.to(x.dtype), up.to(x.dtype)
        # The scale is applied between the two, where the tensor is smallest.
        if down.dim() == 2:
            return F.linear(F.linear(x, down) * self.scale, up)
        return F.conv2d(F.conv2d(x, down, None, self.stride, self.padding) * self.scale, up)


class _Cast(torch.autograd.Function):
    """Casts many tensors, and their gradients, with a few kernels instead of thousands per step."""

    @staticmethod
    def forward(_ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _cast(tensors, dtype)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, *_cast(gradients, torch.float32)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return tuple(cast)


class Adapter(nn.Module):
    """LoRA layers beside every target layer of `network`, which it freezes. Starts switched on.

    rank, alpha: of every layer; the delta is up @ down * alpha / rank. targets: matches a part of
    the names of the layers to train. device: of the factors; None for that of each layer's weights.

    Raises ValueError if the network has no target layer, or if the rank is below 1 or above the
    full rank of a layer.
    """

    def __init__(
        self, network: nn.Module, rank: int = 64, alpha: float = 64.0, seed: int = 0,
        targets: re.Pattern[str] = TARGETS, device: torch.device | None = None,
    ):  # fmt: skip
        super().__init__()
        if rank < 1:
            raise ValueError(f"A LoRA's rank must be at least 1, found {rank}.")
        network.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.on = True
        self.rank, self.alpha = rank, float(alpha)
        # Names of submodules may not contain dots, so the layers are a list beside their names.
        self.names: list[str] = []
        self.layers = nn.ModuleList()
        self._hooks = []
        for name, layer in network.named_modules():
            if not (is_layer(layer) and targets.search(name)):
                continue
            out, *inputs = layer.weight.shape
            full = min(out, math.prod(inputs))
            if rank > full:
                raise ValueError(
                    f"Rank {rank} is too high for the layer {name}, whose full rank is {full}: "
                    f"choose a rank of at most {full}."
                )
            low = LowRank(layer, rank, self.alpha, generator, device or layer.weight.device)
            self.names.append(name)
            self.layers.append(low)
            self._hooks.append(layer.register_forward_hook(self._hook(low)))
        if not self.names:
            raise ValueError(
                f"{type(network).__name__} has none of the layers that an LCM-LoRA trains: "
                "expected the UNet of Stable Diffusion 1, 2 or XL, or a transformer of a flow "
                "model with weights in fp32, fp16, bf16 or fp8. Choose such a file of the model."
            )

    def _hook(self, low: LowRank) -> Callable[..., torch.Tensor | None]:
        def add(
            _layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            # In place, because a frozen layer's backward does not need its output.
            return output.add_(low(inputs[0])) if self.on else None

        return add

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network without the adapter inside; afterwards the adapter is as before."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, the factors are cast to the network's dtype only once, not at each call. Run the
        backward pass inside too, and only one."""
        layers = [layer for layer in self.layers if isinstance(layer, LowRank)]
        if dtype != torch.float32:
            cast = iter(_Cast.apply(dtype, *(f for low in layers for f in (low.down, low.up))))
            for low in layers:
                low.cast = next(cast), next(cast)
        try:
            yield
        finally:
            for low in layers:
                low.cast = None

    @property
    def scale(self) -> float:
        """The factor of every layer's product: alpha / rank."""
        return self.alpha / self.rank

    def detach(self) -> None:
        """Removes the layers from the network."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(layer name in the network, up, down) of every layer."""
        for name, layer in zip(self.names, self.layers, strict=True):
            yield name, layer.get_parameter("up").detach(), layer.get_parameter("down").detach()

    def state(self) -> dict[str, torch.Tensor]:
        """Every layer's factors as `<layer name>.up` and `<layer name>.down`, for a checkpoint."""
        state: dict[str, torch.Tensor] = {}
        for name, up, down in self.tensors():
            state |= {f"{name}.up": up, f"{name}.down": down}
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Sets the factors to those in `state`. Raises KeyError if a layer has none there."""
        with torch.no_grad():
            for name, up, down in self.tensors():
                up.copy_(state[f"{name}.up"])
                down.copy_(state[f"{name}.down"])
