"""What a LoRA file says of itself in its header, for other tools and for people.

Keys of kohya's trainer (`ss_...`) and of the ModelSpec 1.0.0 (`modelspec....`), which loaders and
browsers of LoRAs read, and our own recipe of how a vector was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..acceleration import FAMILY
from ..architecture import SDXL_TYPE, architecture_of
from ..delta import Vector

RECIPE, METHOD = "lcm_lora_recipe", "lcm_lora_method"

# Family by cross-attention width: kohya's name and ModelSpec's.
_ARCHITECTURES = {
    768: ("sd_v1", "stable-diffusion-v1/lora"),
    1024: ("sd_v2", "stable-diffusion-v2-512/lora"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}
_FAMILY = re.compile(r"sd_v\d|sdxl|stable-diffusion-(?:v\d|xl)")
# What a file says of its own tensors: checksums, kind and ranks, the name and day it was given.
_OF_ITS_TENSORS = re.compile(
    r"sshs_.*|ss_network_(?:args|dim|alpha)|modelspec\.(?:hash_sha256|title|date)"
)


def standard(vector: Vector) -> dict[str, str]:
    """What to write of a vector: its metadata, less what is of the tensors of another file, and the
    keys that follow from its own, as far as the metadata does not tell them more precisely (SD2
    with v-prediction, say)."""
    told = {k: v for k, v in vector.metadata.items() if not _OF_ITS_TENSORS.fullmatch(k)}
    told |= {"ss_network_module": "networks.lora", "modelspec.sai_model_spec": "1.0.0"}
    if vector.deltas:
        told["ss_network_dim"] = _one([delta.rank for delta in vector.deltas.values()])
        alphas = [delta.scale * delta.rank for delta in vector.deltas.values()]
        told["ss_network_alpha"] = _one([f"{alpha:g}" for alpha in alphas])
    kind = architecture_of(vector.shapes)
    if kind and kind.width in _ARCHITECTURES:
        version, architecture = _ARCHITECTURES[kind.width]
        found = {"ss_base_model_version": version, "modelspec.architecture": architecture}
        told |= {key: _finer(vector.metadata.get(key, ""), value) for key, value in found.items()}
        if kind.width == 2048 and kind.name not in ("SDXL", SDXL_TYPE):  # those have no names there
            told["modelspec.usage_hint"] = f"Made for {kind.name}."
    return told


def agreed(vectors: Sequence[Vector]) -> dict[str, str]:
    """What the metadata of all of them say alike: the base model, say. Not the acceleration, which
    goes by their weights."""
    first, *others = (vector.metadata for vector in vectors)
    alike = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    alike.pop(FAMILY, None)
    return alike


def recipe(terms: Sequence[tuple[Vector, float]], method: str) -> dict[str, str]:
    """How a vector was made of others: their names, hashes and weights, and the method. What was
    made of a vector that has a recipe holds that one too, with its method."""
    told = []
    for vector, weight in terms:
        term: dict[str, Any] = {"source": vector.source, "weight": weight}
        if vector.sha256:
            term["sha256"] = vector.sha256
        if RECIPE in vector.metadata:
            term["recipe"] = _parsed(vector.metadata[RECIPE])
            if METHOD in vector.metadata:
                term["method"] = vector.metadata[METHOD]
        told.append(term)
    return {RECIPE: json.dumps(told), METHOD: method}


def _finer(told: str, found: str) -> str:
    """What a file told of its family, if it is the family found: `sd_v2_v` for `sd_v2`, say."""
    family = _FAMILY.match(found)
    return told if family and told.startswith(family[0]) else found


def _one(values: Sequence[object]) -> str:
    """The value that all share; kohya's tools write "Dynamic" where they differ."""
    return str(values[0]) if len(set(values)) == 1 else "Dynamic"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of a file that somebody else wrote
        return text
