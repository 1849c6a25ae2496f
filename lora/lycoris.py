"""LyCORIS' Hadamard and Kronecker products as low-rank deltas, exactly (arXiv 2309.14859).

Both are products of small factors, and both identities below are exact, so that everything else
need know one kind of delta only:

    (A1 B1) o (A2 B2) = (A1 * A2)(B1 * B2)    the rows' and columns' outer products, rank r1 r2
    (A1 B1) x (A2 B2) = (A1 x A2)(B1 x B2)    Kronecker, rank r1 r2

Where r1 r2 reaches the layer's own size, the dense delta beside an identity is the smaller pair.
That pair can be a thousand times as large as the file, so it is formed when it is asked for only.
Shapes are those of LyCORIS 4 and of the host's weight_adapter folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .delta import Delta

Pair = tuple[Tensor, Tensor]
"""up [out, r] and down [r, columns] in float32; a convolution's columns are flattened."""
Parts = Mapping[str, Tensor]

CORE = "lokr_t2"
LARGEST = 1 << 28  # numbers of a layer; the largest of these models, a text encoder's, has 2^26
# Convolutions by their names, whose kernels flat factors do not tell.
_KERNELS = (
    (re.compile(r".*(_conv[12]|_conv_in|_conv_out|samplers_0_conv)"), (3, 3)),
    (re.compile(r".*_conv_shortcut"), (1, 1)),
)


@dataclass(frozen=True)
class Product(Delta):
    """A delta that is kept as its small factors: `up` and `down` have their shapes only (they lie
    on torch's meta device), and `plain` forms them.

    Attributes:
        parts: the factors as a file holds them, by LyCORIS' names.
        kernel: of a convolution, where it is known; () else.
    """

    parts: Parts = field(default_factory=dict)
    kernel: tuple[int, ...] = ()

    def plain(self) -> Delta:
        formed = _formed(self.parts, self.kernel)
        return Delta(formed.up, formed.down, None, self.alpha)

    def wire(self) -> dict[str, Tensor]:
        """The parts for the host, with the alpha, or the factor, that gives this delta's scale."""
        if CORE in self.parts:
            return without_core(self.parts, self.scale)
        if (rank := rank_of(self.parts)) is not None:
            return {**self.parts, "alpha": torch.tensor(float(self.scale * rank))}
        return {**self.parts, "lokr_w1": self.parts["lokr_w1"].float() * self.scale}


def without_core(parts: Parts, scale: float) -> dict[str, Tensor]:
    """A LoKr's parts with its Tucker core and the scale multiplied into a whole lokr_w2: ComfyUI
    0.30 fails at the core, with no more than a line in its log."""
    a, b = _pair(parts, "lokr_w2", CORE)
    whole = (a @ b * scale).unflatten(1, (-1, *parts[CORE].shape[2:]))
    told = {part: t for part, t in parts.items() if part not in ("lokr_w2_a", "lokr_w2_b", CORE)}
    # Of a w1 in two factors the host would take the rank: an alpha that is the rank is no scale.
    alpha = {"alpha": torch.tensor(float(rank))} if (rank := rank_of(told)) is not None else {}
    return {**told, "lokr_w2": whole, **alpha}


def product(parts: Parts, alpha: float | None, name: str = "") -> Product:
    """The delta of a module's `hada_...` or `lokr_...` parts; name: the module's.

    Raises:
        ValueError: a factor is missing, shapes do not multiply, or the product is larger than any
            layer.
    """
    kernel = next((kernel for pattern, kernel in _KERNELS if pattern.fullmatch(name)), ())
    shapes = {part: tensor.to("meta") for part, tensor in parts.items()}
    outline, rank = _formed(shapes, kernel), rank_of(parts)
    size = outline.shape[0] * outline.down[0].numel()
    if size > LARGEST:
        raise ValueError(
            f"its product is {list(outline.shape)}; no layer of these models has more than "
            f"{LARGEST} numbers"
        )
    scale = alpha / rank if rank is not None and alpha is not None else 1.0
    return Product(outline.up, outline.down, None, scale * outline.rank, dict(parts), kernel)


def rank_of(parts: Parts) -> int | None:
    """What LyCORIS divides alpha by; None where it takes no alpha, as nothing has a rank."""
    found = (parts[each] for each in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if each in parts)
    return next((factor.shape[0] for factor in found), None)


def _formed(parts: Parts, kernel: tuple[int, ...]) -> Delta:
    """Both factors, without a scale."""
    known = _loha if any(part.startswith("hada_") for part in parts) else _lokr
    up, down, told = known(parts)
    kernel = told or kernel
    if kernel and down.shape[1] % math.prod(kernel) == 0:
        up, down = up.unflatten(1, (-1, *[1] * len(kernel))), down.unflatten(1, (-1, *kernel))
    return Delta(up, down)


def _loha(parts: Parts) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A Hadamard product of two products (FedPara, arXiv 2108.06098, proposition 2); -> (up, down,
    the kernel where the parts tell it).

    parts: hada_w1_a [out, r], hada_w1_b [r, columns], the same of w2; with Tucker cores hada_t1 and
    hada_t2 [r, r, kh, kw], where hada_w1_a is [r, out] and hada_w1_b [r, in].
    """
    pairs = [_pair(parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2)]
    (a1, b1), (a2, b2) = pairs
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1]:
        raise ValueError(
            f"its Hadamard factors are of [{a1.shape[0]}, {b1.shape[1]}] and "
            f"[{a2.shape[0]}, {b2.shape[1]}]; expected the same shape"
        )
    kernel = tuple(parts["hada_t1"].shape[2:]) if "hada_t1" in parts else ()
    if b1.shape[0] * b2.shape[0] >= min(a1.shape[0], b1.shape[1]):
        return *_identity((a1 @ b1) * (a2 @ b2)), kernel
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    return up, (b1[:, None] * b2[None]).flatten(0, 1), kernel


def _lokr(parts: Parts) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A Kronecker product, each side whole or a product (KronA, arXiv 2212.10650, section 4.2); ->
    (up, down, the kernel where the parts tell it).

    parts: lokr_w1 [p, q], or lokr_w1_a [p, r] and lokr_w1_b [r, q]; lokr_w2 [s, t, ...], or the
    same two, or with the Tucker core lokr_t2 [r, r, kh, kw] lokr_w2_a [r, s] and lokr_w2_b [r, t].
    """
    (a1, b1), (a2, b2) = (
        _identity(_matrix(parts, f"lokr_w{i}").flatten(1)) if f"lokr_w{i}" in parts
        else _pair(parts, f"lokr_w{i}", f"lokr_t{i}")
        for i in (1, 2)
    )  # fmt: skip
    told = [parts[name].shape[2:] for name in ("lokr_w2", "lokr_t2") if name in parts]
    kernel = tuple(told[0]) if told else ()
    out, columns = a1.shape[0] * a2.shape[0], b1.shape[1] * b2.shape[1]
    if b1.shape[0] * b2.shape[0] >= min(out, columns):
        return *_identity(torch.kron(a1 @ b1, a2 @ b2)), kernel
    return torch.kron(a1, a2), torch.kron(b1, b2), kernel


def _pair(parts: Parts, side: str, core: str) -> Pair:
    a, b = (_matrix(parts, f"{side}_{each}").flatten(1) for each in "ab")
    if core in parts:
        tucker = parts[core].float()
        if tucker.dim() != 4 or tucker.shape[0] != a.shape[0] or tucker.shape[1] != b.shape[0]:
            raise ValueError(
                f"its {core} is {list(tucker.shape)}; expected [{a.shape[0]}, {b.shape[0]}, kh, kw]"
            )
        a, b = a.T.contiguous(), torch.einsum("ijkl,jn->inkl", tucker, b).flatten(1)
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"its factors do not multiply: {side}_a {list(a.shape)}, {side}_b {list(b.shape)}"
        )
    return a, b


def _matrix(parts: Parts, name: str) -> Tensor:
    """A factor in float32, with at least 2 dimensions and a number."""
    if name not in parts:
        raise ValueError(f"it has no {name} beside its {', '.join(sorted(parts))}")
    factor = parts[name]
    if factor.dim() < 2 or not factor.numel() or not factor.is_floating_point():
        raise ValueError(
            f"its {name} is {list(factor.shape)} of {factor.dtype}; expected a matrix of floating "
            "point numbers"
        )
    return factor.float()


def _identity(matrix: Tensor) -> Pair:
    """A whole matrix as a pair, with the smaller identity."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, device=matrix.device), matrix
    return matrix, torch.eye(columns, device=matrix.device)
