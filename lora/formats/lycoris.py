"""LyCORIS' Hadamard and Kronecker products as low-rank deltas, exactly (arXiv 2309.14859).

Both are products of small factors. The identities below are exact, so everything else needs only
one kind of delta:

    (A1 B1) o (A2 B2) = (A1 * A2)(B1 * B2)    outer products of rows and of columns, rank r1 r2
    (A1 B1) x (A2 B2) = (A1 x A2)(B1 x B2)    Kronecker, rank r1 r2

If r1 r2 reaches the size of the layer, the dense delta and an identity are the smaller pair. That
pair can be a thousand times as large as the file, so it is formed only when it is needed. Shapes
are those of LyCORIS 4 and of ComfyUI's weight_adapter folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..delta import Delta

Pair = tuple[Tensor, Tensor]
"""up [out, r] and down [r, columns] in float32, with the columns of a convolution flattened."""
Parts = Mapping[str, Tensor]

CORE = "lokr_t2"
LARGEST = 1 << 28  # numbers of a layer; the largest of these models, a text encoder's, has 2^26
# Kernels of convolutions by their names, because flat factors do not show them.
_KERNELS = (
    (re.compile(r".*(_conv[12]|_conv_in|_conv_out|samplers_0_conv)"), (3, 3)),
    (re.compile(r".*_conv_shortcut"), (1, 1)),
)


@dataclass(frozen=True)
class Product(Delta):
    """A delta that is kept as its small factors. `up` and `down` are on torch's meta device and
    have only shapes; `plain` forms them.

    Attributes:
        parts: the factors as in a file, by LyCORIS' names.
    """

    parts: Parts = field(default_factory=dict)

    def plain(self) -> Delta:
        up, down = _formed(self.parts, self.rank)
        return Delta(up.reshape(self.up.shape), down.reshape(self.down.shape), None, self.alpha)

    def factors(self) -> list[Tensor]:
        return list(self.parts.values())

    def matrix(self) -> Tensor:
        w1, w2 = (_matrix(self.parts, i) for i in (1, 2))
        change = w1 * w2 if _is_loha(self.parts) else torch.kron(w1, w2)
        return (change * self.scale).reshape(self.shape)

    def wire(self) -> dict[str, Tensor]:
        """The parts for ComfyUI, with an alpha, or a factor, that gives this delta's scale."""
        if has_core(self.parts):
            return without_core(self.parts, self.scale)
        if (rank := rank_of(self.parts)) is not None:
            return {**self.parts, "alpha": torch.tensor(float(self.scale * rank))}
        return {**self.parts, "lokr_w1": self.parts["lokr_w1"].float() * self.scale}


def has_core(parts: Parts) -> bool:
    """Whether a LoKr needs its Tucker core."""
    return CORE in parts and "lokr_w2" not in parts


def without_core(parts: Parts, scale: float) -> dict[str, Tensor]:
    """A LoKr's parts with its Tucker core and the scale multiplied into one lokr_w2. ComfyUI 0.30
    fails at the core and only logs it."""
    a, b = _pair(parts, 2)
    lokr_w2 = (a @ b * scale).unflatten(1, (-1, *parts[CORE].shape[2:]))
    others = {part: t for part, t in parts.items() if part not in ("lokr_w2_a", "lokr_w2_b", CORE)}
    # ComfyUI divides by the rank of a w1 in two factors, so an alpha of this rank means scale 1.
    rank = rank_of(others)
    alpha = {} if rank is None else {"alpha": torch.tensor(float(rank))}
    return {**others, "lokr_w2": lokr_w2, **alpha}


def product(parts: Parts, alpha: float | None, name: str = "") -> Product:
    """The delta of a module.

    parts: a Hadamard product (LoHa) has `hada_w1_a` [out, r], `hada_w1_b` [r, columns] and the same
    for w2. With Tucker cores `hada_t1` and `hada_t2` [r, r, kh, kw], these are [r, out] and
    [r, in]. A Kronecker product (LoKr) has `lokr_w1` [p, q] or its factors, and `lokr_w2`
    [s, t, ...] or its factors, with or without the core `lokr_t2`.
    name: the module's canonical name, which shows the kernel if the factors do not.

    Raises:
        ValueError: a factor is missing, shapes do not multiply, or the product is larger than any
            layer.
    """
    w1, w2 = (_side(parts, i) for i in (1, 2))
    if _is_loha(parts):
        if (w1.rows, w1.columns) != (w2.rows, w2.columns):
            raise ValueError(
                f"its Hadamard factors are [{w1.rows}, {w1.columns}] and "
                f"[{w2.rows}, {w2.columns}]; expected the same shape"
            )
        rows, columns = w1.rows, w1.columns
    else:
        rows, columns = w1.rows * w2.rows, w1.columns * w2.columns
    kernel = w2.kernel or w1.kernel
    if not kernel:
        kernel = next((kernel for pattern, kernel in _KERNELS if pattern.fullmatch(name)), ())
        kernel = kernel if columns % math.prod(kernel) == 0 else ()
    if rows * columns > LARGEST:
        raise ValueError(
            f"its product is [{rows}, {columns}]; no layer of these models has more than {LARGEST} "
            "numbers"
        )
    rank, divisor = min(w1.rank * w2.rank, rows, columns), rank_of(parts)
    scale = alpha / divisor if divisor is not None and alpha is not None else 1.0
    shapes = (rows, rank, *[1] * len(kernel)), (rank, columns // math.prod(kernel), *kernel)
    up, down = (torch.empty(shape, device="meta") for shape in shapes)
    return Product(up, down, None, scale * rank, dict(parts))


def rank_of(parts: Parts) -> int | None:
    """The rank by which LyCORIS divides alpha. None if nothing has a rank, so it uses no alpha."""
    factors = (parts[name] for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts)
    return next((factor.shape[0] for factor in factors), None)


def _is_loha(parts: Parts) -> bool:
    return any(part.startswith("hada_") for part in parts)


@dataclass(frozen=True)
class _Side:
    """One of the two matrices of a product: its size, its rank, and its kernel if it shows one."""

    rows: int
    columns: int
    rank: int
    kernel: tuple[int, ...] = ()


def _side(parts: Parts, i: int) -> _Side:
    """The sizes of one side. Raises ValueError if a factor is missing or does not fit."""
    kind = "hada" if _is_loha(parts) else "lokr"
    side, core = f"{kind}_w{i}", f"{kind}_t{i}"
    if side in parts:
        rows, *columns = _checked(parts, side).shape
        return _Side(rows, math.prod(columns), min(rows, math.prod(columns)), tuple(columns[1:]))
    a, b = (_checked(parts, f"{side}_{letter}").flatten(1).shape for letter in "ab")
    if core in parts:
        tucker = _checked(parts, core).shape
        if len(tucker) != 4 or tucker[0] != a[0] or tucker[1] != b[0]:
            raise ValueError(f"its {core} is {list(tucker)}; expected [{a[0]}, {b[0]}, kh, kw]")
        return _Side(a[1], b[1] * math.prod(tucker[2:]), a[0], tuple(tucker[2:]))
    if a[1] != b[0]:
        raise ValueError(f"its factors do not multiply: {side}_a {list(a)}, {side}_b {list(b)}")
    return _Side(a[0], b[1], a[1])


def _checked(parts: Parts, name: str) -> Tensor:
    """A factor. Raises ValueError if it is missing, is not a matrix, or has no numbers."""
    if name not in parts:
        raise ValueError(f"it has no {name} beside its {', '.join(sorted(parts))}")
    factor = parts[name]
    if factor.dim() < 2 or not factor.numel() or not factor.is_floating_point():
        raise ValueError(
            f"its {name} is {list(factor.shape)} of {factor.dtype}; expected a matrix of floating "
            "point numbers"
        )
    return factor


def _formed(parts: Parts, rank: int) -> Pair:
    """The up and down factors of a checked product, without a scale (FedPara, arXiv 2108.06098,
    proposition 2; KronA, arXiv 2212.10650, section 4.2)."""
    (a1, b1), (a2, b2) = (_pair(parts, i) for i in (1, 2))
    if _is_loha(parts):
        if b1.shape[0] * b2.shape[0] > rank:
            return _identity((a1 @ b1) * (a2 @ b2))
        return (a1[:, :, None] * a2[:, None, :]).flatten(1), (b1[:, None] * b2[None]).flatten(0, 1)
    if b1.shape[0] * b2.shape[0] > rank:
        return _identity(torch.kron(a1 @ b1, a2 @ b2))
    return torch.kron(a1, a2), torch.kron(b1, b2)


def _matrix(parts: Parts, i: int) -> Tensor:
    """One side of a product as a matrix, on the device of its parts."""
    side = f"{'hada' if _is_loha(parts) else 'lokr'}_w{i}"
    if side in parts:
        return parts[side].float().flatten(1)
    a, b = _pair(parts, i)
    return a @ b


def _pair(parts: Parts, i: int) -> Pair:
    """One side of a product as two factors."""
    side, core = (f"{'hada' if _is_loha(parts) else 'lokr'}_{kind}{i}" for kind in "wt")
    if side in parts:
        return _identity(parts[side].float().flatten(1))
    a, b = (parts[f"{side}_{letter}"].float().flatten(1) for letter in "ab")
    if core in parts:
        return a.T.contiguous(), torch.einsum("ijkl,jn->inkl", parts[core].float(), b).flatten(1)
    return a, b


def _identity(matrix: Tensor) -> Pair:
    """A matrix as a pair, with the smaller identity."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows), matrix
    return matrix, torch.eye(columns)
