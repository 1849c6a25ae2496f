"""The canonical form of a LoRA: one low-rank delta per module, and the vector of all deltas."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NOT_LINEAR = {
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "oft_blocks": "OFT or BOFT",
    "oft_blocks.0": "OFT or BOFT",  # of the first part of a layer that is turned in parts
    "rescale": "OFT or BOFT",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
}
"""Parts that show that a module's change depends on the weight, and the kind of such a module."""


@dataclass(frozen=True)
class Delta:
    """The change `up @ down * alpha / rank` of one weight (LoRA, arXiv 2106.09685, section 4.1).

    Attributes:
        up: `[out, rank]`, or `[out, rank, 1, 1]` for a convolution.
        down: `[rank, in]`, or `[rank, in, kh, kw]` for a convolution.
        mid: Tucker core `[rank, rank, kh, kw]` of LyCORIS convolutions; up and down are then 1x1.
        alpha: None if the file holds none; the scale is then 1.

    Raises:
        ValueError: the rank is 0, the shapes do not multiply, or alpha is not finite.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        factors = {"up": self.up, "down": self.down}
        if self.mid is not None:
            factors["mid"] = self.mid
        for name, factor in factors.items():
            if factor.dim() < 2 or not factor.is_floating_point():
                raise ValueError(
                    f"its {name} factor is {_shape(factor)} of {factor.dtype}; expected floating "
                    "point with at least 2 dimensions"
                )
        if 0 in (self.up.shape[1], self.down.shape[0]):
            raise ValueError("its rank is 0; expected 1 or more")
        if not self.up.numel() or not self.down.numel():
            raise ValueError(f"it has no numbers: up {_shape(self.up)}, down {_shape(self.down)}")
        if self.up.shape[1] != self.down.shape[0] or self.up.shape[2:].numel() != 1:
            raise ValueError(
                f"its factors do not multiply: up {_shape(self.up)}, down {_shape(self.down)}; "
                "expected [out, rank] and [rank, in, ...] with the same rank"
            )
        if self.mid is not None and (
            self.mid.dim() != 4
            or self.mid.shape[:2] != (self.rank, self.rank)
            or self.down.shape[2:].numel() != 1
        ):
            raise ValueError(
                f"its factors do not multiply: up {_shape(self.up)}, mid {_shape(self.mid)}, "
                f"down {_shape(self.down)}; expected [out, r, 1, 1], [r, r, kh, kw], [r, in, 1, 1]"
            )
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ValueError(f"its alpha is {self.alpha}; expected a finite number")

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`, the factor between the product and the delta; 1 if there is no alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the delta: `(out, in)` or `(out, in, kh, kw)`."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def plain(self) -> Delta:
        """The same delta with two factors only: a Tucker core is multiplied into down, exactly, in
        float32."""
        if self.mid is None:
            return self
        down = torch.einsum("pqhw,qi->pihw", self.mid.float(), self.down.float().flatten(1))
        return Delta(self.up, down, None, self.alpha)

    def factors(self) -> list[Tensor]:
        """The tensors that it consists of."""
        return [self.up, self.down] if self.mid is None else [self.up, self.mid, self.down]

    def on(self, device: torch.device) -> Delta:
        """The delta with its factors on a device."""
        mid = None if self.mid is None else self.mid.to(device)
        return replace(self, up=self.up.to(device), down=self.down.to(device), mid=mid)

    def scaled(self, factor: float) -> Delta:
        """The delta times a number, which goes into alpha. The new delta shares the factors."""
        return replace(self, alpha=self.scale * factor * self.rank)

    def inner(self, other: Delta) -> float:
        """The Frobenius inner product of two deltas of one weight, in float32, without a matrix of
        the weight's size: <U1 D1, U2 D2> = <U1' U2, D1 D2'>."""
        a, b = self.plain(), other.plain()
        ups = a.up.float().flatten(1).T @ b.up.float().flatten(1)
        downs = a.down.float().flatten(1) @ b.down.float().flatten(1).T
        return float((ups.double() * downs.double()).sum()) * a.scale * b.scale

    def matrix(self) -> Tensor:
        """The dense delta in float32, scale included, in the shape of `self.shape`."""
        plain = self.plain()
        product = plain.up.float().flatten(1) @ plain.down.float().flatten(1)
        return (product * self.scale).reshape(self.shape)


class Opaque(dict[str, Tensor]):
    """A module whose change depends on the weight (DoRA, OFT, GLoRA): its tensors, by the part of
    their kohya keys after the module's name.

    Attributes:
        shape: the shape of the changed weight: [out, in, ...], or [out] if the tensors show only
            that.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]):
        super().__init__(tensors)
        self.shape = shape


@dataclass(frozen=True)
class Vector:
    """A LoRA as a vector in weight space: `theta' = theta + vector` (2311.05556, equation 3).

    Attributes:
        deltas: the delta of each module, by its canonical name (see formats/module_names.py).
        diffs: full differences, as ComfyUI's own trainer writes them for norms and biases:
            `<module>.diff` for the weight, `<module>.diff_b` for the bias.
        metadata: the strings of the file's header.
        source: the name of this vector in messages: a file name, or how it was made.
        ignored: keys of the file that are not part of the LoRA.
        opaque: modules whose change depends on the weight (DoRA, OFT, GLoRA), see opaque.py.
        sha256: the hash of the file, if `files.read_named` read the vector from one.
    """

    deltas: Mapping[str, Delta]
    diffs: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: str = "LoRA"
    ignored: tuple[str, ...] = ()
    opaque: Mapping[str, Opaque] = field(default_factory=dict)
    sha256: str = ""

    @property
    def opaque_kinds(self) -> str:
        """The kinds of the opaque modules, as text: "DoRA", or "DoRA and GLoRA"."""
        parts = {part for module in self.opaque.values() for part in module}
        return " and ".join(sorted({NOT_LINEAR[part] for part in parts & NOT_LINEAR.keys()}))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each module's change: [out, in, ...], or [out] if its tensors show only
        that. Modules that change only a bias are missing."""
        shapes = {
            key.removesuffix(".diff"): tuple(diff.shape)
            for key, diff in self.diffs.items()
            if key.endswith(".diff")
        }
        shapes |= {name: module.shape for name, module in self.opaque.items()}
        return shapes | {name: delta.shape for name, delta in self.deltas.items()}

    def modules(self) -> set[str]:
        """The names of the modules that this vector changes."""
        return {*self.deltas, *self.opaque, *(key.rpartition(".")[0] for key in self.diffs)}

    def only(self, modules: Collection[str]) -> Vector:
        """The part of the vector that changes these modules."""
        return replace(
            self,
            deltas={name: delta for name, delta in self.deltas.items() if name in modules},
            diffs={k: diff for k, diff in self.diffs.items() if k.rpartition(".")[0] in modules},
            opaque={name: parts for name, parts in self.opaque.items() if name in modules},
        )

    def ranks(self) -> str:
        """The ranks as text: "64", or "4 to 64"."""
        ranks = sorted({delta.rank for delta in self.deltas.values()})
        return " to ".join(str(r) for r in (ranks[:1] + ranks[1:][-1:])) or "none"


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a weight of this shape, [out, in, ...]."""
    return shape[0], math.prod(shape[1:])


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
