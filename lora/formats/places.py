"""The names that ComfyUI uses for modules, next to the canonical ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import TypeVar

from .module_names import PEFT_MODEL, canonical

_CLIP_WITHOUT_KOHYA = re.compile(
    r"lora_te(?P<number>[12]?)_(?P<path>text_model_(?:encoder_layers_\d+_layer_norm[12]"
    r"|embeddings_(?:token|position)_embedding|final_layer_norm)|(?<=te_)text_projection)"
)
_CLIP_OF_WIDTH = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
CLIPS = frozenset(("clip_l", "clip_g", "clip_h"))
# Levels of a language model that tools spell in these ways, as the classes of transformers do.
_LANGUAGE_MODEL = "model."
_LANGUAGE_MODELS = ("", "model.", "model.language_model.", "language_model.")
_HOST_TEXT = re.compile(r"text_encoders\.(?!transformer\.)([^.]+)\.transformer\.(.+)")
Target = TypeVar("Target")


def host_name(module: str, width: int) -> str:
    """A canonical name as ComfyUI's own loader knows it. For the norms, the embeddings and the only
    projection of a CLIP, ComfyUI knows only names of its own.

    width: of the text features, which is the last side of the module's weight. It shows which CLIP
    the module belongs to.
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


def places(host_names: Mapping[str, Target]) -> dict[str, Target]:
    """ComfyUI's map from module names to what they patch, extended by all other names that a vector
    may use for a module.

    ComfyUI's own entries stay as they are. It lists most weights of text encoders under only one
    name, `text_encoders.ENCODER.transformer.PATH`.
    """
    by_name = dict(host_names)
    for name, target in host_names.items():
        by_name.setdefault(canonical(name), target)
        if name.startswith("transformer."):
            by_name.setdefault(name.replace("transformer.", PEFT_MODEL, 1), target)
    paths = [match for name in host_names if (match := _HOST_TEXT.fullmatch(name))]
    encoders = {match[1] for match in paths}
    uses = Counter(_flat_path(match[2]) for match in paths)
    for match in paths:
        encoder, path, target = match[1], _flat_path(match[2]), host_names[match[0]]
        names = [f"{encoder}.{match[2]}"]
        if encoder in CLIPS:
            if len(encoders & CLIPS) == 1:  # a file may call the only CLIP by any name
                names += [f"text_encoders.{clip}.transformer.{match[2]}" for clip in CLIPS]
            names += [f"lora_te{number}_{path}" for number in _clip_numbers(encoder, encoders)]
        elif uses[path] == 1:  # only one encoder has this path, so any number means that one
            for dotted in _paths(match[2]):
                flat = _flat_path(dotted)
                names += [f"lora_te{number}_{flat}" for number in ("", 1, 2, 3, 4)]
                names += [f"text_encoder{number}.{dotted}" for number in ("", "_2", "_3", "_4")]
        for name in names:
            by_name.setdefault(name, target)
    return by_name


def _paths(path: str) -> list[str]:
    """A path within a text encoder, as its classes in transformers spell it."""
    if not path.startswith(_LANGUAGE_MODEL):
        return [path]
    return [level + path.removeprefix(_LANGUAGE_MODEL) for level in _LANGUAGE_MODELS]


def _flat_path(path: str) -> str:
    return path.removeprefix("bert.").replace(".", "_")  # HunyuanDiT adds the level bert


def _clip_numbers(encoder: str, encoders: Set[str]) -> tuple[str, ...]:
    """The numbers that kohya's names use for a CLIP of a model with these text encoders."""
    if len(encoders & CLIPS) > 1:
        return ("2",) if encoder == "clip_g" else ("", "1")
    # The only encoder (SD, SDXL's refiner), or the second one (HunyuanVideo).
    return ("", "1", "2") if encoder == "clip_g" or len(encoders) > 1 else ("", "1")
