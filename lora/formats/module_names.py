"""Translates the names of modules in every dialect to the names in the official LCM-LoRA files:
kohya prefixes with diffusers block names, `lora_unet_down_blocks_0_attentions_0_..._attn1_to_q`.

Names outside the UNets and text encoders of the Stable Diffusion types stay as they are, because
ComfyUI may know them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET = "lora_unet_"
PEFT_MODEL = "base_model.model."

# The prefixes of text encoders, and kohya's number of the encoder if the prefix has none.
_ENCODERS = (
    (re.compile(r"lora_te([1-4]?)_"), ""),
    (re.compile(r"text_encoder(?:_([2-4]))?\."), ""),
    (re.compile(r"(?:text_encoders\.)?clip_[lh]\.(?:transformer\.)?"), "1"),
    (re.compile(r"(?:text_encoders\.)?clip_g\.(?:transformer\.)?"), "2"),
    (re.compile(r"(?:text_encoders\.)?t5(?:xxl)?\.(?:transformer\.)?"), "3"),
    (re.compile(r"(?:cond_stage_model|conditioner\.embedders\.0)\.transformer\."), "1"),
    # A text encoder that was saved alone.
    (re.compile(r"lycoris_(?=text_model_)|(?=text_model\.|text_projection$)"), "1"),
    (re.compile(r"(?=encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm\d)\b)"), "1"),
)
_CLIP_ROOT = re.compile(
    r"(?:text_model_)?"  # transformers 5 dropped this level, and all other tools keep it
    r"(encoder_layers_|embeddings_(?:token|position)_embedding$|final_layer_norm$)"
)
_CLIP = re.compile(r"text_model_|text_projection$")
_FIRST_CLIP = re.compile(r"lora_te1?_(?=text_model_|text_projection$)")
_T5_ROOT = re.compile(r"encoder_block_|encoder_final_layer_norm$|encoder_embed_tokens$|shared$")
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_TEXT = re.compile(r"lora_(?:prior_)?te\d?_|text_encoders?[._]|(?:clip_[lgh]|t5|t5xxl)\.")

_UNET_PREFIX = re.compile(
    r"(?:lora|oft)_unet_+|(?:model\.)?diffusion_model\.|unet\.|lycoris_|(?=[a-z])"
)
# Numbers of a model that are no layer's weight. ComfyUI knows them by their own path alone.
NO_LAYER = re.compile(r"(?:.*[._])?(?:modulation|scale_shift_table)")
_NATIVE = "diffusion_model."
# The first level of the Stable Diffusion types. Other models keep their own names.
_UNET_ROOT = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding"
    r"|class_embedding|input_blocks|middle_block|output_blocks|time_embed|label_emb)(_|$)"
)

_UNET_BLOCK = re.compile(
    r"lora_unet_(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_"
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
_NATIVE_ATTENTION = re.compile(r"(norm|proj_in|proj_out)$|transformer_blocks_")
_NATIVE_BASIC = {
    "lora_unet_input_blocks_0_0": "lora_unet_conv_in",
    "lora_unet_time_embed_0": "lora_unet_time_embedding_linear_1",
    "lora_unet_time_embed_2": "lora_unet_time_embedding_linear_2",
    "lora_unet_label_emb_0_0": "lora_unet_add_embedding_linear_1",
    "lora_unet_label_emb_0_2": "lora_unet_add_embedding_linear_2",
    # Another name that diffusers and ComfyUI use for the same layers.
    "lora_unet_class_embedding_linear_1": "lora_unet_add_embedding_linear_1",
    "lora_unet_class_embedding_linear_2": "lora_unet_add_embedding_linear_2",
    "lora_unet_out_0": "lora_unet_conv_norm_out",
    "lora_unet_out_2": "lora_unet_conv_out",
}
# A block of a canonical name, in diffusers' numbers.
_DIFFUSERS_BLOCK = re.compile(r"lora_unet_(down|up)_blocks_\d+_(?:resnets|attentions)_(\d+)_")
_DEPTH = re.compile(r"_transformer_blocks_(\d+)_")
LEVELS = 4  # the most that a UNet of these types has
DEEPEST_OF_ONE = 6  # transformer blocks of KOALA-1B, the deepest with one residual block a level


def is_text(module: str) -> bool:
    """Whether a module belongs to a text encoder, in any spelling."""
    return bool(_TEXT.match(module))


def is_unet(module: str) -> bool:
    """Whether a canonical name is that of a layer in a block of a Stable Diffusion type's UNet."""
    return bool(_UNET_BLOCK.match(module))


def canonical(module: str) -> str:
    """The canonical name of a module of the UNet or a text encoder. Native block names stay.

    The prefix of the first text encoder is always `lora_te_` here; see `text_encoder_prefix`.
    Unknown spellings stay the same, except that PEFT's `base_model.model.` within them is removed.
    """
    name = module.replace(PEFT_MODEL, "")
    unknown = PEFT_MODEL + name if module.startswith(PEFT_MODEL) else name
    for pattern, number in _ENCODERS:
        if match := pattern.match(name):
            number = number or match[1] or "1"
            return _text_module(number, name[match.end() :].replace(".", "_")) or unknown
    if prefix := _UNET_PREFIX.match(name):
        if prefix[0].endswith(_NATIVE) and NO_LAYER.fullmatch(name):
            return _NATIVE + name[prefix.end() :]
        flat = name[prefix.end() :].replace(".", "_")
        if _UNET_ROOT.match(flat):
            flat = flat.replace("_processor_to_", "_to_")
            # to_out is a Sequential whose first part is the linear layer; old files omit the 0.
            return UNET + (f"{flat}_0" if flat.endswith("_to_out") else flat)
        if prefix[0] not in ("", "lycoris_"):
            return UNET + flat
    return unknown


def _text_module(number: str, flat: str) -> str:
    """The canonical name of a module of CLIP or T5. Empty for other text encoders, because only
    ComfyUI knows their names."""
    if match := _CLIP_ROOT.match(flat):
        flat = f"text_model_{flat[match.start(1) :]}"
        head, attention, last = flat.rpartition("_self_attn_")
        if attention:
            flat = head + attention + _OLD_TEXT_ATTENTION.get(last, last)
    elif _T5_ROOT.match(flat):
        # T5 is the second encoder in Flux and the third in SD3. ComfyUI uses one name for both.
        number = "1" if number == "1" else "3"
        return f"lora_te{number}_{flat}"
    elif not _CLIP.match(flat):
        return ""
    return f"lora_te{'' if number == '1' else number}_{flat}"


def res_blocks(modules: Iterable[str]) -> set[int]:
    """The possible numbers of residual blocks per level, 1 or 2, of a UNet with these modules.

    modules: canonical names, with native or diffusers' block names.

    With 2 (SD and SDXL), the input blocks are [conv_in, R, R, Down, R, R, Down, ...], so 3, 6 and 9
    hold only the downsampler. With 1 (KOALA), they are [conv_in, R, Down, R, Down, ...].
    """
    possible = {1, 2}
    for module in modules:
        possible = {count for count in possible if _may_have(module, count)}
    return possible


def _may_have(module: str, count: int) -> bool:
    """Whether a UNet with `count` residual blocks per level may have this module."""
    depth = _DEPTH.search(module)
    if count == 1 and depth and int(depth[1]) >= DEEPEST_OF_ONE:
        return False
    if match := _DIFFUSERS_BLOCK.match(module):
        return int(match[2]) < count + (match[1] == "up")
    match = _NATIVE_BLOCK.fullmatch(module)
    if not match or match[1] == "middle_block":
        return True
    number, inner = int(match[2]), match[3]
    is_input = match[1] == "input_blocks"  # number 0 of these is conv_in
    if number - is_input >= LEVELS * (count + 1):
        return False
    if is_input:
        return not number or (inner == "0_op") == (number % (count + 1) == 0)
    return inner not in ("1_conv", "2_conv") or number % (count + 1) == count


def native_to_diffusers(module: str, num_res_blocks: int) -> str:
    """A canonical name with diffusers' block names instead of native ones. Others stay the same.

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
        return _block("mid_block", kind, index, inner) or module
    slot, _, inner = inner.partition("_")
    level, index = divmod(number - (side == "input_blocks"), num_res_blocks + 1)
    if side == "input_blocks" and inner == "op":
        return f"{UNET}down_blocks_{level}_downsamplers_0_conv"
    if side == "output_blocks" and inner == "conv":
        return f"{UNET}up_blocks_{level}_upsamplers_0_conv"
    kind = "resnets" if slot == "0" else "attentions"
    side = "down_blocks" if side == "input_blocks" else "up_blocks"
    return _block(f"{side}_{level}", kind, index, inner) or module


def _block(block: str, kind: str, index: int, inner: str) -> str:
    """A layer of a block in diffusers' spelling. Empty if it has none, as in video models."""
    if kind == "resnets":
        inner = _NATIVE_RESNET.get(inner, "")
    elif not _NATIVE_ATTENTION.match(inner):
        inner = ""
    return f"{UNET}{block}_{kind}_{index}_{inner}" if inner else ""


def canonical_names(modules: Iterable[str]) -> dict[str, str]:
    """The canonical name of each module of one file, by its name in the file."""
    names = {module: canonical(module) for module in modules}
    possible = res_blocks(names.values())
    return {module: numbered(name, possible) for module, name in names.items()}


def numbered(name: str, possible: Iterable[int]) -> str:
    """A canonical name with diffusers' block names, if all possible numbers of residual blocks per
    level give the same name. Otherwise it stays the same, and the model decides later."""
    names = {native_to_diffusers(name, count) for count in possible}
    return names.pop() if len(names) == 1 else name


def in_doubt(name: str) -> bool:
    """Whether the block number in a canonical name means different blocks for different numbers of
    residual blocks per level."""
    return native_to_diffusers(name, 1) != native_to_diffusers(name, 2)


def text_encoder_prefix(module: str, two_encoders: bool) -> str:
    """The module with kohya's prefix for the first text encoder: `lora_te_` if it is the only one,
    `lora_te1_` if there are several (SDXL)."""
    match = _FIRST_CLIP.match(module)
    return f"lora_te{'1' if two_encoders else ''}_{module[match.end() :]}" if match else module
