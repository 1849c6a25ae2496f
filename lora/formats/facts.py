"""What a LoRA file says about itself: what it is for, its trigger words, how it was made.

Other people wrote the metadata, so every value becomes one line of plain text of limited length.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..architecture import architecture_of
from ..delta import Vector
from ..family import SEVERAL, made_for
from .module_names import is_text

LONGEST = 300  # characters of a value
MOST_TAGS = 20
_TAGS_READ = 8_000_000  # characters of a JSON text; trainers write a few hundred thousand

# A fact and the metadata keys that may hold it. The first that holds something counts.
_KEYS = {
    "title": ("modelspec.title", "ss_output_name"),
    "base model": ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    "trigger words": ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word"),
    "frequent tags": ("ss_tag_frequency",),
    "training pictures": ("ss_num_train_images",),
    "epochs": ("ss_num_epochs", "ss_epoch"),
    "training steps": ("ss_steps", "ss_max_train_steps"),
    "batch size": ("ss_total_batch_size", "ss_batch_size_per_device", "lcm_lora.batch"),
    "learning rate": ("ss_unet_lr", "ss_learning_rate"),
    "resolution": ("ss_resolution", "lcm_lora.resolution", "modelspec.resolution"),
    "guidance": ("lcm_lora.guidance",),
    "author": ("modelspec.author",),
    "licence": ("modelspec.license",),
    "date": ("modelspec.date",),
    "description": ("modelspec.description", "ss_training_comment"),
    "usage hint": ("modelspec.usage_hint",),
}
LABELS = (
    "architecture", "modules", "text encoder modules", "rank", "alpha / rank", "kind", "family",
    "made for steps", *_KEYS,
)  # fmt: skip


def facts(vector: Vector, name: str) -> dict[str, str]:
    """The known facts about a file, by the names in LABELS.

    name: the file's name, with its folders as the user sees them.
    """
    architecture, made = architecture_of(vector.shapes), made_for(vector.metadata, name)
    text = sum(map(is_text, vector.modules()))
    scales = sorted({round(delta.scale, 4) for delta in vector.deltas.values()})
    of_weights = {
        "architecture": architecture.name if architecture else "",
        "modules": str(len(vector.modules())),
        "text encoder modules": str(text) if text else "",
        "rank": vector.ranks() if vector.deltas else "",
        "alpha / rank": ", ".join(f"{scale:g}" for scale in scales[:5]),
        "kind": vector.opaque_kinds,
        "family": plain(SEVERAL.join(made.families)) if made else "",
        "made for steps": ", ".join(map(str, made.steps)) if made else "",
    }
    return {key: value for key, value in of_weights.items() if value} | of_metadata(vector.metadata)


def of_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts that the metadata alone give."""
    of_file: dict[str, str] = {}
    for name, keys in _KEYS.items():
        show = _most_frequent if name == "frequent tags" else plain
        values = (show(metadata.get(key, "")) for key in keys)
        # kohya's trainer writes None where nothing was set.
        if value := next((value for value in values if value not in ("", "None", "null")), ""):
            of_file[name] = value
    return of_file


def lines(facts: Mapping[str, str]) -> list[str]:
    """Facts as lines of text."""
    return [f"{key}: {value}" for key, value in facts.items()]


def plain(text: str, longest: int = LONGEST) -> str:
    """One line of text of limited length, without characters that show nothing or change the
    direction of what follows."""
    text = text[: 10 * longest]  # so that a very long value takes no time
    kept = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or not unicodedata.category(character).startswith("C")
    )
    kept = " ".join(kept.split())
    return kept if len(kept) <= longest else f"{kept[:longest].rstrip()} ..."


def _most_frequent(text: str) -> str:
    """The most frequent tags of kohya's {folder: {tag: count}}, each with its count."""
    counts: Counter[str] = Counter()
    for folder in _object(text).values():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int) and count > 0 and (short := plain(tag, 60)):
                counts[short] += min(count, 10**9)
    return plain(", ".join(f"{tag} ({n})" for tag, n in counts.most_common(MOST_TAGS)), 3 * LONGEST)


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        content = json.loads(text) if 0 < len(text) <= _TAGS_READ else {}
    except (ValueError, RecursionError):  # another program wrote it
        return {}
    return content if isinstance(content, dict) else {}
