"""Key dialects. Every spelling of a module becomes the one of the official LCM-LoRA files:
kohya prefixes with diffusers block names, `lora_unet_down_blocks_0_attentions_0_..._attn1_to_q`.

Names that belong to no SD-type UNet or CLIP are kept as they are, for the host may know them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET = "lora_unet_"

# What a tensor is within its module, by how its key ends.
_PARTS: tuple[tuple[re.Pattern[str], dict[str, str] | str | None], ...] = (
    (re.compile(r"\.lora_(up|down|mid)\.weight$"), {"up": "up", "down": "down", "mid": "mid"}),
    # PEFT, with or without an adapter's name. `.lora_B.bias` is not a weight and must not match.
    (re.compile(r"\.lora_([AB])(?:(?:\.[^.]+)?\.weight)?$"), {"A": "down", "B": "up"}),
    # diffusers before PEFT
    (
        re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.(up|down)\.weight$"),
        {"up": "up", "down": "down"},
    ),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.(?:diff|w_norm)$"), "diff"),
    (re.compile(r"\.(?:diff_b|b_norm)$"), "diff_b"),
    # LyCORIS: the part is called as the file does.
    (re.compile(r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$"), None),
    # Not linear in the weights. PEFT and ai-toolkit call DoRA's magnitude so.
    (re.compile(r"\.(?:lora_)?(magnitude)(?:_vector)?(?:(?:\.[^.]+)?\.weight)?$"), None),
    (re.compile(r"\.(dora_scale|oft_blocks|rescale|(?:[ab][12]|bm)\.weight)$"), None),
)
NOT_LINEAR = {
    "dora_scale": "DoRA", "magnitude": "DoRA",
    "oft_blocks": "OFT or BOFT", "rescale": "OFT or BOFT",
    "a1.weight": "GLoRA", "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
}  # fmt: skip
"""Parts by which a module is told to be more than a sum, and what it then is."""

# What the host may know and we do not, by a piece of its keys.
_UNKNOWN_ADAPTERS = (
    ("oft_diag", "OFT of the kohya kind"),
    (".oft_r", "OFT of the PEFT kind"),
    (".oft_R", "OFT of the PEFT kind"),
    (".boft_", "BOFT of the PEFT kind"),
    (".hra_u", "HRA"),
    (".vera_lambda_", "VeRA"),
    (".ia3_l", "IA3"),
    (".on_input", "IA3"),
    (".set_weight", "set_weight"),
    (".reshape_weight", "reshape_weight"),
)

_TEXT_ENCODERS = (
    ("text_encoder.", "lora_te_"),
    ("text_encoder_2.", "lora_te2_"),
    ("text_encoders.clip_l.transformer.", "lora_te_"),
    ("text_encoders.clip_g.transformer.", "lora_te2_"),
    ("text_model.", "lora_te_"),
    ("lycoris_text_model_", "lora_te_text_model_"),
)
# transformers 5 dropped the `text_model.` level that all other tools keep.
_TEXT_MODEL_ROOTS = ("encoder.", "embeddings.", "final_layer_norm.")
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_UNET_ROOTS = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding"
    r"|class_embedding|input_blocks|middle_block|output_blocks|time_embed|label_emb)(\.|$)"
)

_NATIVE_BLOCK = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_(.+)")
_NATIVE_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_NATIVE_BASIC = {
    "lora_unet_input_blocks_0_0": "lora_unet_conv_in",
    "lora_unet_time_embed_0": "lora_unet_time_embedding_linear_1",
    "lora_unet_time_embed_2": "lora_unet_time_embedding_linear_2",
    "lora_unet_label_emb_0_0": "lora_unet_add_embedding_linear_1",
    "lora_unet_label_emb_0_2": "lora_unet_add_embedding_linear_2",
    # Another name that diffusers and the host have for the same layers.
    "lora_unet_class_embedding_linear_1": "lora_unet_add_embedding_linear_1",
    "lora_unet_class_embedding_linear_2": "lora_unet_add_embedding_linear_2",
    "lora_unet_out_0": "lora_unet_conv_norm_out",
    "lora_unet_out_2": "lora_unet_conv_out",
}


def split_key(key: str) -> tuple[str, str] | None:
    """A key as (module as the file spells it, part), or None where it is no part of a LoRA.

    Parts: up, down, mid, alpha, diff (of a weight), diff_b (of a bias), those of LyCORIS by their
    own names (hada_w1_a, lokr_w2, ...), and those of NOT_LINEAR.
    """
    for pattern, part in _PARTS:
        if match := pattern.search(key):
            if not isinstance(part, str):
                part = part[match[1]] if part else match[1]
            return key[: match.start()], part
    return None


def unknown_adapter(keys: Iterable[str]) -> str | None:
    """Name of the adapter that some key belongs to, if it is one that is not read here."""
    for key in keys:
        for piece, name in _UNKNOWN_ADAPTERS:
            if piece in key:
                return name
    return None


def canonical(module: str) -> str:
    """One spelling for a module of the UNet or a text encoder; native block names are left.

    Unknown spellings come back unchanged.
    """
    name = module.replace("base_model.model.", "", 1)
    for prefix, target in _TEXT_ENCODERS:
        if name.startswith(prefix):
            return target + _text_module(name[len(prefix) :])
    for prefix in (UNET, "oft_unet_", "lycoris_", "unet.", "diffusion_model."):
        if name.startswith(prefix):
            return _unet_module(name[len(prefix) :])
    if _UNET_ROOTS.match(name):
        return _unet_module(name)
    return module


def _text_module(name: str) -> str:
    head, _, last = name.rpartition(".")
    if head.endswith("self_attn"):
        name = f"{head}.{_OLD_TEXT_ATTENTION.get(last, last)}"
    if name.startswith(_TEXT_MODEL_ROOTS):
        name = f"text_model.{name}"
    return name.replace(".", "_")


def _unet_module(name: str) -> str:
    name = name.replace(".", "_").replace("_processor_to_", "_to_")
    # The linear layer of to_out is the first of a Sequential; old diffusers files leave that out.
    return UNET + (f"{name}_0" if name.endswith("_to_out") else name)


def blocks_per_level(modules: Iterable[str]) -> int:
    """`num_res_blocks` of the UNet whose native block names these are: 2 for SD and SDXL, else 1.

    Input blocks of a UNet with 2 are [conv_in, R, R, Down, R, R, Down, ...]: number 3, 6, 9 hold
    the downsampler alone. With 1 (KOALA) they are [conv_in, R, Down, R, Down, R].
    """
    for module in modules:
        match = _NATIVE_BLOCK.fullmatch(module)
        if match and match[1] == "input_blocks" and int(match[2]) > 0:
            is_down = match[3] == "0_op"
            if is_down != (int(match[2]) % 3 == 0):
                return 1
    return 2


def native_to_diffusers(module: str, num_res_blocks: int) -> str:
    """Native block names of a canonical module in diffusers' spelling; others are unchanged.

    `lora_unet_input_blocks_1_1_proj_in` becomes `lora_unet_down_blocks_0_attentions_0_proj_in`.
    """
    if module in _NATIVE_BASIC:
        return _NATIVE_BASIC[module]
    match = _NATIVE_BLOCK.fullmatch(module)
    if not match:
        return module
    side, number, inner = match[1], int(match[2]), match[3]
    if side == "middle_block":
        kind, index = ("attentions", 0) if number == 1 else ("resnets", number // 2)
        return f"{UNET}mid_block_{kind}_{index}_{_NATIVE_RESNET.get(inner, inner)}"
    slot, _, inner = inner.partition("_")
    if side == "input_blocks":
        level, index = divmod(number - 1, num_res_blocks + 1)
        block = f"{UNET}down_blocks_{level}"
        if inner == "op":
            return f"{block}_downsamplers_0_conv"
    else:
        level, index = divmod(number, num_res_blocks + 1)
        block = f"{UNET}up_blocks_{level}"
        if inner == "conv":
            return f"{block}_upsamplers_0_conv"
    kind = "resnets" if slot == "0" else "attentions"
    return f"{block}_{kind}_{index}_{_NATIVE_RESNET.get(inner, inner)}"


def canonical_names(modules: Iterable[str]) -> dict[str, str]:
    """Every module of one file, as the file spells it, to its canonical name."""
    names = {module: canonical(module) for module in modules}
    levels = blocks_per_level(names.values())
    return {module: native_to_diffusers(name, levels) for module, name in names.items()}


def text_encoder_prefix(module: str, two_encoders: bool) -> str:
    """The module with the first text encoder spelled as kohya's tools do: `lora_te_` where it is
    the only one, `lora_te1_` where there are two (SDXL)."""
    wrong, right = ("lora_te_", "lora_te1_") if two_encoders else ("lora_te1_", "lora_te_")
    return right + module[len(wrong) :] if module.startswith(wrong) else module
