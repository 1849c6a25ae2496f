"""The metadata in the header of a LoRA file, for other programs and for users.

The keys are those of kohya's trainer (`ss_...`) and of ModelSpec 1.0.0 (`modelspec....`), which
loaders and browsers of LoRAs read, and our own recipe of how a vector was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..architecture import OR, SDXL_TYPE, Architecture, architecture_of
from ..delta import Vector
from ..family import forgotten
from .peft_config import HEADER_ALPHAS

KIND = "modelspec.architecture"
RECIPE, METHOD = "lcm_lora_recipe", "lcm_lora_method"

# By cross-attention width: kohya's name of the architecture, and ModelSpec's.
_ARCHITECTURES = {
    768: ("sd_v1", "stable-diffusion-v1/lora"),
    1024: ("sd_v2", "stable-diffusion-v2-512/lora"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}
# Of transformers, ModelSpec's names, as the trainers of kohya and musubi write them.
_TRANSFORMERS = {
    "Anima": "anima",
    "Chroma": "chroma",
    "Flux": "flux-1",
    "Flux2": "flux-2",
    "HunyuanImage": "hunyuan-image-2.1",
    "HunyuanVideo": "hunyuan-video",
    "Kandinsky5": "Kandinsky-5",
    "Lumina2": "lumina-2",
    "Qwen-Image": "Qwen-Image",
    "SD3": "stable-diffusion-3",
    "Wan": "wan2.1",
    "Z-Image": "Z-Image",
}
_VERSION = re.compile(r"sd_v\d|sdxl|stable-diffusion-(?:v\d|xl)")
# Keys that describe the tensors of one file: checksums, kind and ranks, its name and date.
_OF_ITS_TENSORS = re.compile(
    r"sshs_.*|ss_network_(?:args|dim|alpha)|modelspec\.(?:hash_sha256|title|date)"
    rf"|(?:\w+\.)?(?:{'|'.join(HEADER_ALPHAS)})"
)


def standard(vector: Vector) -> dict[str, str]:
    """The metadata to write with a vector.

    Keeps the vector's own metadata, drops keys about the tensors of the file it came from, and adds
    keys computed from its own tensors. If its own metadata is more precise (SD2 with v-prediction,
    say), that stays.
    """
    keys = {k: v for k, v in vector.metadata.items() if not _OF_ITS_TENSORS.fullmatch(k)}
    keys |= {"ss_network_module": "networks.lora", "modelspec.sai_model_spec": "1.0.0"}
    if vector.deltas:
        keys["ss_network_dim"] = _one([str(delta.rank) for delta in vector.deltas.values()])
        alphas = [delta.scale * delta.rank for delta in vector.deltas.values()]
        keys["ss_network_alpha"] = _one([f"{alpha:g}" for alpha in alphas])
    architecture = architecture_of(vector.shapes)
    if architecture and OR not in architecture.name:  # else what the file says of itself stays
        keys |= of_transformer(architecture, vector.metadata.get(KIND, ""))
    if architecture and architecture.is_unet and architecture.width in _ARCHITECTURES:
        kohya, modelspec = _ARCHITECTURES[architecture.width]
        names = {"ss_base_model_version": kohya, KIND: modelspec}
        keys |= {key: _finer(vector.metadata.get(key, ""), name) for key, name in names.items()}
        # Neither kohya nor ModelSpec has names for the relatives of SDXL.
        if architecture.width == 2048 and architecture.name not in ("SDXL", SDXL_TYPE):
            keys["modelspec.usage_hint"] = f"Made for {architecture.name}."
    return keys


def of_transformer(architecture: Architecture, own: str = "") -> dict[str, str]:
    """The key that names the architecture of a transformer's LoRA; nothing for a UNet.

    own: the file's own architecture name. It stays if it is a variant of the same model, such as
    `flux-1-dev/lora`. If ModelSpec has no name for the model, this pack's name is used.
    """
    if architecture.is_unet:
        return {}
    name = _TRANSFORMERS.get(architecture.name, architecture.name.lower())
    bare_name, bare_own = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (name, own))
    stem = bare_name[:-1] if "." in name else bare_name  # Wan2.2 is a variant of Wan2.1
    is_variant = bare_own.startswith(stem) and bare_own.endswith("lora")
    return {KIND: own if is_variant else f"{name}/lora"}


def agreed(vectors: Sequence[Vector]) -> dict[str, str]:
    """The metadata that all vectors share: the base model, say. The family is not in it, because
    the family of a sum depends on the weights."""
    first, *others = (vector.metadata for vector in vectors)
    alike = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    return forgotten(alike)


def recipe(terms: Sequence[tuple[Vector, float]], method: str) -> dict[str, str]:
    """How a vector was made from others: their names, hashes and weights, the method, and the
    recipes of the others, if they have some."""
    sources = []
    for vector, weight in terms:
        source: dict[str, Any] = {"source": vector.source, "weight": weight}
        if vector.sha256:
            source["sha256"] = vector.sha256
        if RECIPE in vector.metadata:
            source["recipe"] = _parsed(vector.metadata[RECIPE])
            if METHOD in vector.metadata:
                source["method"] = vector.metadata[METHOD]
        sources.append(source)
    return {RECIPE: json.dumps(sources), METHOD: method}


def _finer(own: str, name: str) -> str:
    """A file's own name of its architecture if it is a variant of `name`: `sd_v2_v` of `sd_v2`."""
    version = _VERSION.match(name)
    return own if version and own.startswith(version[0]) else name


def _one(values: Sequence[str]) -> str:
    """The value that all share. If they differ, "Dynamic", as kohya's tools write."""
    return values[0] if len(set(values)) == 1 else "Dynamic"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # another program wrote it
        return text
