"""Key dialects. Every spelling of a module becomes the one of the official LCM-LoRA files:
kohya prefixes with diffusers block names, `lora_unet_down_blocks_0_attentions_0_..._attn1_to_q`.

Names that belong to no SD-type UNet or CLIP are kept as they are, for the host may know them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import TypeVar

UNET = "lora_unet_"

# What a tensor is within its module, by how its key ends.
_PARTS: tuple[tuple[re.Pattern[str], dict[str, str] | str | None], ...] = (
    (re.compile(r"\.lora_(up|down|mid)\.weight$"), {"up": "up", "down": "down", "mid": "mid"}),
    # PEFT, with or without an adapter's name.
    (re.compile(r"\.lora_([AB])(?:(?:\.[^.]+)?\.weight)?$"), {"A": "down", "B": "up"}),
    (re.compile(r"\.lora_B(?:\.[^.]+)?\.bias$"), "up_bias"),
    (re.compile(r"\.lora_(embedding_[AB])(?:\.[^.]+)?$"), None),
    # diffusers before PEFT
    (
        re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.(up|down)\.weight$"),
        {"up": "up", "down": "down"},
    ),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.(?:diff_b|b_norm|bias\.diff)$"), "diff_b"),
    (re.compile(r"\.(?:diff|w_norm)$"), "diff"),
    # LyCORIS, or PEFT with an adapter's name: the part is called as the file does.
    (
        re.compile(r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.[^.]+)?$"),
        None,
    ),
    # Not linear in the weights. PEFT and ai-toolkit call DoRA's magnitude so.
    (re.compile(r"\.(?:lora_)?(magnitude)(?:_vector)?(?:\.[^.]+)?(?:\.weight)?$"), None),
    (re.compile(r"\.(dora_scale|oft_blocks|rescale|(?:[ab][12]|bm)\.weight)$"), None),
)

# Adapters that are not read here, by what follows the module in one of their keys.
_UNKNOWN_ADAPTERS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"oft_diag", "OFT of the kohya kind"),
        (r"\.oft_(r|R|embedding_R)\b", "OFT of the PEFT kind"),
        (r"\.boft_", "BOFT of the PEFT kind"),
        (r"\.glora_", "GLoRA of the PEFT kind"),
        (r"\.lora_E\b", "AdaLoRA"),
        (r"\.(?:ia3_l|on_input)\b", "IA3"),
        (r"\.p?vera_lambda_|\bvera_[AB]$", "VeRA"),
        (r"\.hra_u", "HRA"),
        (r"\.(?:fourierft|waveft)_spectrum", "FourierFT"),
        (r"\.randlora_", "RandLoRA"),
        (r"\.vblora_", "VB-LoRA"),
        (r"\.gralora_", "GraLoRA"),
        (r"\.hira_", "HiRA"),
        (r"\.delora_", "DeLoRA"),
        (r"\.shira_", "SHiRA"),
        (r"\.c3a_", "C3A"),
        (r"\.road_", "RoAd"),
        (r"\.(?:miss|bone)_", "MiSS"),
        (r"\.(?:poly|supertuning)_", "Poly"),
        (r"\.ln_tuning_", "LayerNorm tuning"),
        (r"\.trainable_tokens_", "trainable tokens"),
        (r"\.(?:adamss|beft|deft|frod|lily|osf|peanut|psoft|tinylora|unilora)_", "PEFT"),
        (r"\.lambda_layer$|\.[pq]_layer\.weight$", "T-LoRA"),
        (r"\.set_weight$", "set_weight"),
        (r"\.reshape_weight$", "reshape_weight"),
    )
)

# What torch.compile, FSDP, activation checkpointing, Fabric and DDP put into a module's path.
_WRAPPED = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
_WRAPPERS = re.compile(
    rf"[._]{_WRAPPED}(?=[._])|^{_WRAPPED}[._]|(?:^|(?<=\.))module(?:\.{_WRAPPED})*\."
)
_FLAT = re.compile(r"(?:lora|oft)_unet_|lora_te\d?_|lycoris_")
_FLAT_WRAPPERS = re.compile(r"_(?:module|base_model_model)(?=_)")
_PEFT_MODEL = "base_model.model."

# Text encoders as the field calls them, and kohya's number where the pattern does not hold it.
_ENCODERS = (
    (re.compile(r"lora_te([1-4]?)_"), ""),
    (re.compile(r"text_encoder(?:_([2-4]))?\."), ""),
    (re.compile(r"(?:text_encoders\.)?clip_[lh]\.(?:transformer\.)?"), "1"),
    (re.compile(r"(?:text_encoders\.)?clip_g\.(?:transformer\.)?"), "2"),
    (re.compile(r"(?:text_encoders\.)?t5(?:xxl)?\.(?:transformer\.)?"), "3"),
    (re.compile(r"(?:cond_stage_model|conditioner\.embedders\.0)\.transformer\."), "1"),
    # A text encoder that was saved by itself.
    (re.compile(r"lycoris_(?=text_model_)|(?=text_model\.|text_projection$)"), "1"),
    (re.compile(r"(?=encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm\d)\b)"), "1"),
)
_CLIP_ROOT = re.compile(
    r"(?:text_model_)?"  # which transformers 5 dropped, and all other tools keep
    r"(encoder_layers_|embeddings_(?:token|position)_embedding$|final_layer_norm$)"
)
_CLIP = re.compile(r"text_model_|text_projection$")
_FIRST_CLIP = re.compile(r"lora_te1?_(?=text_model_|text_projection$)")
_T5_ROOT = re.compile(r"encoder_block_|encoder_final_layer_norm$|encoder_embed_tokens$|shared$")
_CLIP_WITHOUT_KOHYA = re.compile(
    r"lora_te(?P<number>[12]?)_(?P<path>text_model_(?:encoder_layers_\d+_layer_norm[12]"
    r"|embeddings_(?:token|position)_embedding|final_layer_norm)|(?<=te_)text_projection)"
)
_CLIP_OF_WIDTH = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
CLIPS = frozenset(("clip_l", "clip_g", "clip_h"))
_HOST_TEXT = re.compile(r"text_encoders\.(?!transformer\.)([^.]+)\.transformer\.(.+)")
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_TEXT = re.compile(r"lora_(?:prior_)?te\d?_|text_encoders?[._]|(?:clip_[lgh]|t5|t5xxl)\.")

_UNET_PREFIX = re.compile(
    r"(?:lora|oft)_unet_+|(?:model\.)?diffusion_model\.|unet\.|lycoris_|(?=[a-z])"
)
# Of the Stable Diffusion types, by their first level. Models of other kinds keep their own names.
_UNET_ROOT = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding"
    r"|class_embedding|input_blocks|middle_block|output_blocks|time_embed|label_emb)(_|$)"
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
    # Another name that diffusers and the host have for the same layers.
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


def split_key(key: str) -> tuple[str, str] | None:
    """A key as (module as the file spells it, part), or None where it is no part of a LoRA.

    What wrappers such as torch.compile put into the path is taken out of the module. Parts: up,
    down, mid, alpha, diff (of a weight), diff_b (of a bias), up_bias (a bias of up), embedding_A
    and embedding_B (PEFT's factors of an embedding), those of LyCORIS by their own names
    (hada_w1_a, lokr_w2, ...), and those of NOT_LINEAR.
    """
    key = unwrapped(key)
    for pattern, part in _PARTS:
        if match := pattern.search(key):
            if not isinstance(part, str):
                part = part[match[1]] if part else match[1]
            return key[: match.start()], part
    return None


def unwrapped(key: str) -> str:
    """A key without `_orig_mod`, `module` and the like, wherever they stand in it."""
    key = _WRAPPERS.sub("", key)
    return _FLAT_WRAPPERS.sub("", key) if _FLAT.match(key) else key


# Nearly every key is done with after this one search.
_ANY_UNKNOWN = re.compile("|".join(pattern.pattern for pattern, _ in _UNKNOWN_ADAPTERS))


def unknown_adapter(keys: Iterable[str]) -> str | None:
    """Name of the adapter that some key belongs to, if it is one that is not read here."""
    for key in filter(_ANY_UNKNOWN.search, keys):
        for pattern, name in _UNKNOWN_ADAPTERS:
            if pattern.search(key):
                return name
    return None


def is_text(module: str) -> bool:
    """Whether a module belongs to a text encoder."""
    return bool(_TEXT.match(module))


def canonical(module: str) -> str:
    """One spelling for a module of the UNet or a text encoder; native block names are left.

    The first text encoder is `lora_te_` here, whatever its number; see `text_encoder_prefix`.
    Unknown spellings come back unchanged, but for PEFT's `base_model.model.` within them.
    """
    name = module.replace(_PEFT_MODEL, "")
    unknown = _PEFT_MODEL + name if module.startswith(_PEFT_MODEL) else name
    for pattern, number in _ENCODERS:
        if match := pattern.match(name):
            number = number or match[1] or "1"
            return _text_module(number, name[match.end() :].replace(".", "_")) or unknown
    if prefix := _UNET_PREFIX.match(name):
        flat = name[prefix.end() :].replace(".", "_")
        if _UNET_ROOT.match(flat):
            flat = flat.replace("_processor_to_", "_to_")
            # to_out is a Sequential, its first part the linear layer; old files leave that out.
            return UNET + (f"{flat}_0" if flat.endswith("_to_out") else flat)
        if prefix[0] not in ("", "lycoris_"):
            return UNET + flat
    return unknown


def _text_module(number: str, flat: str) -> str:
    """The canonical name of a module of CLIP or T5; empty for other text encoders, whose names
    only the host knows."""
    if match := _CLIP_ROOT.match(flat):
        flat = f"text_model_{flat[match.start(1) :]}"
        head, attention, last = flat.rpartition("_self_attn_")
        if attention:
            flat = head + attention + _OLD_TEXT_ATTENTION.get(last, last)
    elif _T5_ROOT.match(flat):
        # T5 is the second in Flux, the third in SD3, and of one name in ComfyUI for both.
        number = "1" if number == "1" else "3"
        return f"lora_te{number}_{flat}"
    elif not _CLIP.match(flat):
        return ""
    return f"lora_te{'' if number == '1' else number}_{flat}"


def res_blocks(modules: Iterable[str]) -> set[int]:
    """The numbers of residual blocks a level, 1 or 2, that a UNet with these modules may have.

    modules: canonical names, with native or diffusers' block names.

    Input blocks of a UNet with 2, as SD and SDXL are, are [conv_in, R, R, Down, R, R, Down, ...]:
    number 3, 6, 9 hold the downsampler alone. With 1 (KOALA) they are [conv_in, R, Down, R, ...].
    """
    possible = {1, 2}
    for module in modules:
        possible = {count for count in possible if _may_have(module, count)}
    return possible


def _may_have(module: str, count: int) -> bool:
    """Whether a UNet with so many residual blocks a level may have this module."""
    depth = _DEPTH.search(module)
    if count == 1 and depth and int(depth[1]) >= DEEPEST_OF_ONE:
        return False
    if match := _DIFFUSERS_BLOCK.match(module):
        return int(match[2]) < count + (match[1] == "up")
    match = _NATIVE_BLOCK.fullmatch(module)
    if not match or match[1] == "middle_block":
        return True
    number, inner = int(match[2]), match[3]
    is_input = match[1] == "input_blocks"  # which has conv_in as its number 0
    if number - is_input >= LEVELS * (count + 1):
        return False
    if is_input:
        return not number or (inner == "0_op") == (number % (count + 1) == 0)
    return inner not in ("1_conv", "2_conv") or number % (count + 1) == count


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
    """A layer of a block in diffusers' spelling; empty where it has none, as in video models."""
    if kind == "resnets":
        inner = _NATIVE_RESNET.get(inner, "")
    elif not _NATIVE_ATTENTION.match(inner):
        inner = ""
    return f"{UNET}{block}_{kind}_{index}_{inner}" if inner else ""


def canonical_names(modules: Iterable[str]) -> dict[str, str]:
    """Every module of one file, as the file spells it, to its canonical name."""
    names = {module: canonical(module) for module in modules}
    possible = res_blocks(names.values())
    return {module: numbered(name, possible) for module, name in names.items()}


def numbered(name: str, possible: Iterable[int]) -> str:
    """A canonical name with its block in diffusers' numbers, if all possible numbers of residual
    blocks a level give the same name. Otherwise it is unchanged, and the model decides later."""
    names = {native_to_diffusers(name, count) for count in possible}
    return names.pop() if len(names) == 1 else name


def in_doubt(name: str) -> bool:
    """Whether the block number in a canonical name means different blocks for different numbers of
    residual blocks a level."""
    return native_to_diffusers(name, 1) != native_to_diffusers(name, 2)


def text_encoder_prefix(module: str, two_encoders: bool) -> str:
    """The module with the first text encoder spelled as kohya's tools do: `lora_te_` where it is
    the only one, `lora_te1_` where there are several (SDXL)."""
    match = _FIRST_CLIP.match(module)
    return f"lora_te{'1' if two_encoders else ''}_{module[match.end() :]}" if match else module


def host_name(module: str, width: int) -> str:
    """A canonical name as the host's own loader knows it. The host does not know kohya-like names
    for the norms, the embeddings and the only projection of a CLIP, but has a name of its own.

    width: the width of the text features, which is the last side of the module's weight. It tells
    which CLIP the module belongs to.
    """
    match = _CLIP_WITHOUT_KOHYA.fullmatch(module)
    if not match:
        return module
    clip = _CLIP_OF_WIDTH.get(width, "clip_g" if match["number"] == "2" else "clip_l")
    path = match["path"]
    for level in ("text_model", "embeddings", "encoder", "layers"):
        path = path.replace(f"{level}_", f"{level}.", 1)
    path = re.sub(r"layers\.(\d+)_", r"layers.\1.", path)
    return f"text_encoders.{clip}.transformer.{path}"


Target = TypeVar("Target")


def places(host_names: Mapping[str, Target]) -> dict[str, Target]:
    """The host's map from module names to what they patch, extended by all other names that a
    module of a vector may have.

    The host's own entries never change. For text encoders the host lists most weights by one name
    only, `text_encoders.ENCODER.transformer.PATH`.
    """
    by_name = dict(host_names)
    for name, target in host_names.items():
        by_name.setdefault(canonical(name), target)
        if name.startswith("transformer."):
            by_name.setdefault(name.replace("transformer.", _PEFT_MODEL, 1), target)
    paths = [match for name in host_names if (match := _HOST_TEXT.fullmatch(name))]
    encoders = {match[1] for match in paths}
    uses = Counter(_flat_path(match) for match in paths)
    for match in paths:
        encoder, path, target = match[1], _flat_path(match), host_names[match[0]]
        names = [f"{encoder}.{match[2]}"]
        if encoder in CLIPS:
            if len(encoders & CLIPS) == 1:  # whatever a file calls the only CLIP
                names += [f"text_encoders.{clip}.transformer.{match[2]}" for clip in CLIPS]
            names += [f"lora_te{number}_{path}" for number in _clip_numbers(encoder, encoders)]
        elif uses[path] == 1:  # the path tells which encoder it is, whatever its number
            names += [f"lora_te{number}_{path}" for number in ("", 1, 2, 3, 4)]
            names += [f"text_encoder{number}.{match[2]}" for number in ("", "_2", "_3", "_4")]
        for name in names:
            by_name.setdefault(name, target)
    return by_name


def _flat_path(match: re.Match[str]) -> str:
    return match[2].removeprefix("bert.").replace(".", "_")  # the level that HunyuanDiT adds


def _clip_numbers(encoder: str, encoders: Set[str]) -> tuple[str, ...]:
    """kohya's numbers of a CLIP in a model with these text encoders."""
    if len(encoders & CLIPS) > 1:
        return ("2",) if encoder == "clip_g" else ("", "1")
    # Alone, as in SD and SDXL's refiner, or the second beside a language model (HunyuanVideo).
    return ("", "1", "2") if encoder == "clip_g" or len(encoders) > 1 else ("", "1")
