"""The keys of a LoRA file: the module and the part that a key names, in every dialect."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Which part of its module a tensor is, by the end of its key.
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
    # LyCORIS, or PEFT with an adapter's name. The part keeps its name.
    (re.compile(r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.[^.]+)?$"), None),
    # Not linear in the weights. PEFT and ai-toolkit call DoRA's scale a magnitude.
    (re.compile(r"\.(?:lora_)?(magnitude)(?:_vector)?(?:\.[^.]+)?(?:\.weight)?$"), None),
    (re.compile(r"\.(dora_scale|oft_blocks(?:\.\d+)?|rescale|(?:[ab][12]|bm)\.weight)$"), None),
)

# Adapters that are not supported, by what follows the module in one of their keys.
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
# For nearly every key, one search with this pattern is enough.
_ANY_UNKNOWN = re.compile("|".join(pattern.pattern for pattern, _ in _UNKNOWN_ADAPTERS))

# What torch.compile, FSDP, activation checkpointing, Fabric and DDP add to a module's path.
_WRAPPED = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
_WRAPPERS = re.compile(
    rf"[._]{_WRAPPED}(?=[._])|^{_WRAPPED}[._]|(?:^|(?<=\.))module(?:\.{_WRAPPED})*\."
)
# In the LoRAs of Wan that Kijai extracted (Comfy-Org/ComfyUI #8922).
_MODULATION = re.compile(r"\.diff_m$")
_FLAT = re.compile(r"(?:lora|oft)_unet_|lora_te\d?_|lycoris_")
_FLAT_WRAPPERS = re.compile(r"_(?:module|base_model_model)(?=_)")


def split_key(key: str) -> tuple[str, str] | None:
    """A key as (module, part). None if the key is not part of a LoRA.

    The module is spelled as in the file, without what wrappers such as torch.compile add to its
    path. The parts are up, down, mid, alpha, diff (of a weight), diff_b (of a bias), up_bias (a
    bias of up), embedding_A and embedding_B (PEFT's factors of an embedding), the parts of LyCORIS
    by their own names (hada_w1_a, lokr_w2, ...), and those in NOT_LINEAR.
    """
    key = unwrapped(key)
    for pattern, part in _PARTS:
        if match := pattern.search(key):
            if not isinstance(part, str):
                part = part[match[1]] if part else match[1]
            return key[: match.start()], part
    return None


def unwrapped(key: str) -> str:
    """A key without `_orig_mod`, `module` and the like, anywhere in it."""
    key = _MODULATION.sub(".modulation.diff", _WRAPPERS.sub("", key))
    return _FLAT_WRAPPERS.sub("", key) if _FLAT.match(key) else key


def unknown_adapter(keys: Iterable[str]) -> str | None:
    """The name of an adapter that is not supported, if a key belongs to one."""
    for key in filter(_ANY_UNKNOWN.search, keys):
        for pattern, name in _UNKNOWN_ADAPTERS:
            if pattern.search(key):
                return name
    return None
