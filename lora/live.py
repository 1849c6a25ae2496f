"""Low-rank deltas kept beside the layers, with a weight of their own for each picture of a batch.

Pictures with different weights can then be sampled as one batch, and the model's weights stay as
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .delta import Delta


class Live:
    """The deltas of several vectors beside the layers that they change.

    The factors of each layer are stacked, so that any number of vectors takes two products. The
    weights of the vectors are applied between the two (arXiv 2311.05556, equation 3).
    """

    def __init__(self, network: nn.Module, deltas: Sequence[Mapping[str, Delta]]):
        """deltas: for each vector, its deltas by the layer's name in the network."""
        self.count = len(deltas)
        names = dict.fromkeys(name for of_vector in deltas for name in of_vector)
        self._layers = {
            name: _Layer(network.get_submodule(name), [held.get(name) for held in deltas])
            for name in names
        }

    @contextmanager
    def weighted(self, weights: Sequence[Sequence[float]]) -> Iterator[None]:
        """Inside, the network computes with these weights, [pictures, vectors]. With guidance, a
        batch holds the pictures several times, in this order."""
        table = torch.tensor(weights, dtype=torch.float32)
        hooks = [layer.attach(table) for layer in self._layers.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def fits(layer: nn.Module, delta: Delta) -> bool:
    """Whether a delta can stand beside a layer: two factors, and a linear layer or a convolution
    without groups."""
    if type(delta) is not Delta or delta.mid is not None:
        return False
    if isinstance(layer, nn.Conv2d):
        kernel = tuple(delta.down.shape[2:]) or (1, 1)
        return layer.groups == 1 and layer.padding_mode == "zeros" and kernel == layer.kernel_size
    return isinstance(layer, nn.Linear) and delta.down.shape[2:].numel() == 1


class _Layer:
    """A layer, and the stacked factors of the vectors that change it."""

    def __init__(self, module: nn.Module, deltas: Sequence[Delta | None]):
        self.module = module
        held = [(number, delta) for number, delta in enumerate(deltas) if delta is not None]
        ups = [delta.up.float().flatten(1) * delta.scale for _, delta in held]
        downs = [delta.down for _, delta in held]
        self.up, self.down = torch.cat(ups, 1), torch.cat([down.flatten(1) for down in downs])
        if isinstance(module, nn.Conv2d):
            self.up = self.up[..., None, None]
            self.down = self.down.unflatten(1, (module.in_channels, *module.kernel_size))
        # The vector that each row of `down` belongs to.
        self.owners = [number for number, delta in held for _ in range(delta.rank)]

    def attach(self, table: Tensor) -> torch.utils.hooks.RemovableHandle:
        rows = table[:, self.owners]

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nonlocal rows
            x = inputs[0]
            # Moves them at the first call; later calls find them there.
            self.up, self.down, rows = self.up.to(x), self.down.to(x), rows.to(x)
            by_picture = rows.repeat(len(x) // len(rows), 1)
            if isinstance(module, nn.Conv2d):
                inner = F.conv2d(
                    x, self.down, None, module.stride, module.padding, module.dilation
                )  # fmt: skip
                return output.add_(F.conv2d(inner.mul_(by_picture[..., None, None]), self.up))
            inner = F.linear(x, self.down)
            by_picture = by_picture.view(len(x), *[1] * (inner.dim() - 2), -1)
            return output.add_(F.linear(inner.mul_(by_picture), self.up))

        return self.module.register_forward_hook(add)
