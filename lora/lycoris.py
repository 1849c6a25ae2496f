"""LyCORIS' Hadamard and Kronecker products as plain low-rank deltas, exactly (arXiv 2309.14859).

Both are products of small factors, and both identities below are exact, so that everything else
need know one kind of delta only:

    (A1 B1) o (A2 B2) = (A1 * A2)(B1 * B2)    the rows' and columns' outer products, rank r1 r2
    (A1 B1) x (A2 B2) = (A1 x A2)(B1 x B2)    Kronecker, rank r1 r2

Where r1 r2 reaches the layer's own size, the dense delta beside an identity is the smaller pair.
Shapes are those of LyCORIS 4 and of the host's weight_adapter folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .delta import Delta

Pair = tuple[Tensor, Tensor]
"""up [out, r] and down [r, columns] in float32; a convolution's columns are flattened."""


def loha(parts: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """A Hadamard product of two products (FedPara, arXiv 2108.06098, proposition 2).

    parts: hada_w1_a [out, r], hada_w1_b [r, columns], the same of w2; with Tucker cores hada_t1 and
    hada_t2 [r, r, kh, kw], where hada_w1_a is [r, out] and hada_w1_b [r, in].

    Raises:
        ValueError: a factor is missing, or shapes do not multiply.
    """
    pairs = [_pair(parts, f"hada_w{i}", f"hada_t{i}") for i in (1, 2)]
    (a1, b1), (a2, b2) = pairs
    if a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1]:
        raise ValueError(
            f"its Hadamard factors are of [{a1.shape[0]}, {b1.shape[1]}] and "
            f"[{a2.shape[0]}, {b2.shape[1]}]; expected the same shape"
        )
    scale = 1.0 if alpha is None else alpha / parts["hada_w1_b"].shape[0]
    out, columns = a1.shape[0], b1.shape[1]
    if b1.shape[0] * b2.shape[0] >= min(out, columns):
        return _dense((a1 @ b1) * (a2 @ b2), scale)
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    return _delta(up, (b1[:, None] * b2[None]).flatten(0, 1), scale)


def lokr(parts: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """A Kronecker product, each side whole or a product (KronA, arXiv 2212.10650, section 4.2).

    parts: lokr_w1 [p, q], or lokr_w1_a [p, r] and lokr_w1_b [r, q]; lokr_w2 [s, t, ...], or the
    same two, or with the Tucker core lokr_t2 [r, r, kh, kw] lokr_w2_a [r, s] and lokr_w2_b [r, t].

    Raises:
        ValueError: a factor is missing, or shapes do not multiply.
    """
    whole = [f"lokr_w{i}" in parts for i in (1, 2)]
    pairs = [
        _identity(_matrix(parts, f"lokr_w{i}").flatten(1)) if is_whole
        else _pair(parts, f"lokr_w{i}", f"lokr_t{i}")
        for i, is_whole in enumerate(whole, 1)
    ]  # fmt: skip
    # Where both sides are whole there is no rank to divide by.
    ranks = [parts[f"lokr_w{i}_b"].shape[0] for i in (1, 2) if not whole[i - 1]]
    scale = alpha / ranks[-1] if ranks and alpha is not None else 1.0
    (a1, b1), (a2, b2) = pairs
    out, columns = a1.shape[0] * a2.shape[0], b1.shape[1] * b2.shape[1]
    if b1.shape[0] * b2.shape[0] >= min(out, columns):
        return _dense(torch.kron(a1 @ b1, a2 @ b2), scale)
    return _delta(torch.kron(a1, a2), torch.kron(b1, b2), scale)


def _pair(parts: Mapping[str, Tensor], side: str, core: str) -> Pair:
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


def _matrix(parts: Mapping[str, Tensor], name: str) -> Tensor:
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
        return torch.eye(rows), matrix
    return matrix, torch.eye(columns)


def _dense(matrix: Tensor, scale: float) -> Delta:
    return _delta(*_identity(matrix), scale)


def _delta(up: Tensor, down: Tensor, scale: float) -> Delta:
    return Delta(up, down, None, scale * down.shape[0])
