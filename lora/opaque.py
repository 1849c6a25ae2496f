"""Modules whose change depends on the weight: DoRA, OFT, BOFT and GLoRA.

`merged` computes the same weight as the owner of the format: LyCORIS 4, PEFT, or kohya's
sd-scripts. ComfyUI's patches differ. For DoRA they use the norm of the weight before the change.
For OFT they skip the rescale, read the constraint in another unit, and apply the strength twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .delta import Delta, Opaque
from .formats.lycoris import has_core, product, rank_of, without_core

_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
# How the names of each adapter's parts begin. DoRA adds a magnitude to one of the first three.
_ADAPTERS = {
    "LoRA": ("lora_",), "LoHa": ("hada_",), "LoKr": ("lokr_",),
    "OFT": ("oft_blocks", "rescale"), "GLoRA": (*_GLORA, "bm.weight"),
}  # fmt: skip


def opaque(parts: Mapping[str, Tensor], alpha: float | None) -> Opaque:
    """A checked module of DoRA (arXiv 2402.09353), OFT or BOFT (2306.07280, 2311.06243), or GLoRA
    (2306.07967).

    parts: its tensors, by the rest of their kohya keys. alpha: becomes a part if it is not None.

    Raises:
        ValueError: a part is missing, shapes do not fit each other, or parts are of two adapters.
    """
    adapters = adapters_of(parts)
    kinds = (["DoRA"] if "dora_scale" in parts else []) + sorted(adapters)
    if len(adapters) > 1 or ("dora_scale" in parts and adapters & {"OFT", "GLoRA"}):
        raise ValueError(f"it has parts of {' and '.join(kinds)}; expected those of one adapter")
    if "GLoRA" in adapters:
        shape = _glora_shape(parts, alpha)
    elif "OFT" in adapters:
        shape = _oft_shape(parts)
    else:
        shape = _base(parts, alpha).shape
        if has_core(parts):
            rank = rank_of(parts)
            parts = without_core(parts, 1.0 if alpha is None or rank is None else alpha / rank)
            alpha = rank_of(parts)
    if "dora_scale" in parts:
        count = parts["dora_scale"].numel()
        # One number for each input is possible too, whatever the kernel.
        if not count or (count != shape[0] and math.prod(shape[1:]) % count):
            raise ValueError(
                f"its dora_scale has {count} numbers; expected one for each of the {shape[0]} "
                "outputs or one for each input"
            )
    if "rescale" in parts and parts["rescale"].numel() != shape[0]:
        raise ValueError(
            f"its rescale has {parts['rescale'].numel()} numbers; expected one for each of the "
            f"{shape[0]} outputs"
        )
    if alpha is not None:
        parts = {**parts, "alpha": torch.tensor(float(alpha))}
    return Opaque(parts, shape)


def adapters_of(parts: Collection[str]) -> set[str]:
    """The adapters that parts with these names belong to. A valid module has only one."""
    return {
        adapter for adapter, names in _ADAPTERS.items() if any(p.startswith(names) for p in parts)
    }


def with_settled_magnitudes(modules: Mapping[str, Opaque]) -> dict[str, Opaque]:
    """The modules of a file with DoRA's magnitudes in LyCORIS' shapes: [out, 1, ...] with a number
    for each output, or [1, in, 1, ...] with a number for each input.

    In a square layer, [1, n] is ambiguous: PEFT writes [1, out, 1, 1] for convolutions, LyCORIS
    [1, in, ...]. All layers of a file are of one kind, so a layer that is not square decides. A
    magnitude of one dimension decides too, because LyCORIS never writes one. Without either, it is
    LyCORIS' [1, in].
    """
    doras = {name: module for name, module in modules.items() if "dora_scale" in module}
    outputs = any(map(_shows_outputs, doras.values()))
    settled = dict(modules)
    for name, module in doras.items():
        magnitude, (out, _, *kernel) = module["dora_scale"], module.shape
        of_outputs, of_inputs = _sides(module)
        if of_inputs and not (of_outputs and (outputs or not _is_row(magnitude))):
            magnitude = magnitude.reshape(1, -1, *[1] * len(kernel))
        elif of_outputs:
            magnitude = magnitude.reshape(out, 1, *[1] * len(kernel))
        settled[name] = Opaque({**module, "dora_scale": magnitude}, module.shape)
    return settled


def misfit(module: Opaque, shape: Sequence[int]) -> str:
    """Why the module's magnitude does not fit a weight of this shape; empty if it does. Does not
    check the shape of the module's change."""
    if "dora_scale" in module and _axis(module["dora_scale"], shape) is None:
        return (
            f"its dora_scale is {list(module['dora_scale'].shape)}, the model has {list(shape)}: "
            "neither one number for each output nor one for each input"
        )
    return ""


def merged(parts: Mapping[str, Tensor], alpha: float | None, weight: Tensor) -> Tensor:
    """The weight [out, in, ...] after the merge of a module at strength 1: a new float32 tensor.

    parts: the tensors of an Opaque on the weight's device, without alpha.
    """
    weight = weight.float()
    if _all_blocks(parts):
        return _rotated(parts, alpha or 0.0, weight)
    if "a1.weight" in parts:
        return weight + _glora_change(parts, alpha, weight)
    moved = weight + _base(parts, alpha).matrix().reshape(weight.shape)
    magnitude = parts["dora_scale"].float()
    axis = _axis(magnitude, weight.shape)
    others = [dim for dim in range(weight.dim()) if dim != axis]
    norm = moved.square().sum(others, keepdim=True).sqrt()
    # 2402.09353, equation 5. A row of zeros has no direction, and stays zero.
    return moved * (magnitude.reshape(norm.shape) / norm.clamp(min=1e-12))


def _is_row(magnitude: Tensor) -> bool:
    return magnitude.dim() > 1 and magnitude.shape[0] == 1


def _sides(module: Opaque) -> tuple[bool, bool]:
    """Whether a magnitude's shape allows that it belongs to the outputs, and to the inputs."""
    magnitude, (out, columns, *_) = module["dora_scale"], module.shape
    count = magnitude.numel()
    # The factors of LoHa and LoKr do not show the kernel: columns may be a multiple of the inputs.
    flat = "lora_up.weight" not in module and _is_row(magnitude) and columns % count == 0
    return count == out, count == columns or flat


def _shows_outputs(module: Opaque) -> bool:
    """Whether the magnitude's shape shows that it belongs to the outputs."""
    of_outputs, of_inputs = _sides(module)
    magnitude = module["dora_scale"]
    return of_outputs and (magnitude.dim() == 1 or (_is_row(magnitude) and not of_inputs))


def _axis(magnitude: Tensor, shape: Sequence[int]) -> int | None:
    """The axis of the weight that a settled magnitude belongs to: 0 for the outputs, 1 for the
    inputs, None if it fits neither."""
    count = magnitude.numel()
    if len(shape) > 1 and count == shape[1] and (_is_row(magnitude) or count != shape[0]):
        return 1
    return 0 if count == shape[0] else None


def _base(parts: Mapping[str, Tensor], alpha: float | None) -> Delta:
    """The delta that a DoRA scales: a LoRA, or a product of LyCORIS."""
    if any(part.startswith(("hada_", "lokr_")) for part in parts):
        return product(parts, alpha)
    for part in ("lora_up.weight", "lora_down.weight"):
        if part not in parts:
            raise ValueError(f"it has a magnitude (DoRA) and no {part} beside it")
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    return Delta(up, down, parts.get("lora_mid.weight"), alpha)


def _all_blocks(parts: Mapping[str, Tensor]) -> list[Tensor]:
    """The blocks of OFT, for each part of the outputs. There is one part, but sd-scripts' networks/
    oft_flux.py turns the parts of a fused layer (qkv) each by its own."""
    names = [name for name in parts if name.startswith("oft_blocks")]
    return [parts[name] for name in sorted(names, key=lambda name: (len(name), name))]


def _oft_shape(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """[out]. Raises ValueError if the blocks are missing or cannot rotate the outputs."""
    all_blocks = _all_blocks(parts)
    if "oft_blocks" in parts and len(all_blocks) > 1:
        raise ValueError("it has oft_blocks of the whole layer and of parts; expected one of them")
    numbered = [f"oft_blocks.{number}" for number in range(len(all_blocks))]
    if "oft_blocks" not in parts:
        for name in numbered:
            if name not in parts:
                raise ValueError(f"it has no {name} beside its other oft_blocks")
    return (sum(map(_outputs, all_blocks)) or _outputs(None),)


def _outputs(blocks: Tensor | None) -> int:
    """How many outputs some blocks rotate. Raises ValueError if they cannot rotate any."""
    if (
        blocks is None
        or blocks.dim() not in (3, 4)
        or blocks.shape[-1] != blocks.shape[-2]
        or not blocks.numel()
        or not blocks.is_floating_point()
    ):
        actual = "none" if blocks is None else f"{list(blocks.shape)} of {blocks.dtype}"
        raise ValueError(
            f"its oft_blocks are {actual}; expected floating point numbers [blocks, n, n] (OFT) or "
            "[m, blocks, n, n] (BOFT)"
        )
    out, n = blocks.shape[-3] * blocks.shape[-1], blocks.shape[-1]
    if blocks.dim() == 4 and (n % 2 or out % (2 ** (len(blocks) - 1) * n)):
        raise ValueError(
            f"its oft_blocks are {list(blocks.shape)}; the {out} outputs cannot be paired in "
            f"{len(blocks)} stages of a butterfly"
        )
    return out


def _rotated(parts: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """The outputs rotated, each part of them by its blocks, and rescaled."""
    all_blocks = _all_blocks(parts)
    pieces = weight.split([_outputs(blocks) for blocks in all_blocks])
    turned = [
        _turned(blocks.float(), alpha, piece)
        for blocks, piece in zip(all_blocks, pieces, strict=True)
    ]
    rows = torch.cat(turned)
    if "rescale" in parts:
        rows = rows * parts["rescale"].float().reshape(-1, 1)
    return rows.reshape(weight.shape)


def _turned(blocks: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """The outputs rotated by Cayley's R = (I + Q)(I - Q)^-1, Q = B - B' (2306.07280, section 3.3),
    as rows [out, ...]. BOFT rotates in stages, and pairs outputs that are 2^stage n / 2 apart
    (2311.06243, equation 3). The norm of Q is at most alpha times the number of outputs; an alpha
    of 0 sets no limit.
    """
    q = blocks - blocks.mT
    if alpha > 0:
        q = q * (alpha * len(weight) / (q.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(q.shape[-1], device=q.device)
    # I - Q always has an inverse. inv_ex returns numbers that are not finite instead of raising.
    r = (eye + q) @ torch.linalg.inv_ex(eye - q).inverse
    n, rows = q.shape[-1], weight.flatten(1)
    if r.dim() == 3:
        rows = torch.einsum("bnm,bnx->bmx", r, rows.unflatten(0, (-1, n))).flatten(0, 1)
    for stage in range(len(r) if r.dim() == 4 else 0):
        apart = 2**stage * n // 2
        paired = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2)
        turned = torch.einsum("bnm,bmx->bnx", r[stage], paired.reshape(-1, n, rows.shape[1]))
        rows = turned.reshape(paired.shape).transpose(1, 2).flatten(0, 2)
    return rows


def _glora_factors(parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, ...] of a module in either layout of LyCORIS. The
    first layout swapped 1 and 2. If both fit, the one with the smaller rank is right."""
    factors = [parts[part] for part in _GLORA if part in parts]
    if len(factors) == 4 and all(factor.dim() > 1 and factor.numel() for factor in factors):
        a1, a2, b1, b2 = factors
        layouts = [
            (a1.shape[1], (a1, a2, b1, b2))
            for a1, a2, b1, b2 in ((a1, a2, b1, b2), (a2, a1, b2, b1))
            if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
            and all(factor.shape[2:].numel() == 1 for factor in (a1, a2, b1))
            and a1.shape[0] == a2.shape[1] == b2.shape[1]
        ]
        if layouts:
            return min(layouts, key=lambda layout: layout[0])[1]
    shapes = ", ".join(f"{n} {list(parts[n].shape) if n in parts else 'missing'}" for n in _GLORA)
    raise ValueError(f"its GLoRA factors are {shapes}; expected four matrices of one rank")


def _glora_shape(parts: Mapping[str, Tensor], alpha: float | None) -> tuple[int, ...]:
    """[out, in, ...]. Raises ValueError if the factors are missing or do not fit."""
    _, _, b1, b2 = _glora_factors(parts)
    return Delta(b1, b2, parts.get("bm.weight"), alpha).shape


def _glora_change(parts: Mapping[str, Tensor], alpha: float | None, weight: Tensor) -> Tensor:
    """W a1 a2 + b1 b2, times alpha / rank (2306.07967, equation 10, as LyCORIS has it)."""
    a1, a2, b1, b2 = _glora_factors(parts)
    b = Delta(b1, b2, parts.get("bm.weight"), alpha)
    inner = torch.einsum("oi...,ir->or...", weight, a1.float().flatten(1))
    a = torch.einsum("or...,rj->oj...", inner, a2.float().flatten(1) * b.scale)
    return a + b.matrix().reshape(weight.shape)
