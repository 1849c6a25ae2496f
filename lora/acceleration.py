"""Which kind of acceleration a LoRA is: LCM, TCD, DMD2 and so on, told by metadata or by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

# In a file's header, as this pack writes it: a family's name, or several where they are summed.
FAMILY = "lcm_lora.family"
SEVERAL = " + "

_TITLES = ("modelspec.title", "ss_output_name")  # where other trainers keep a file's first name
_ONE_STEP = r".*(?<!\d)1[-_ ]?step"
# As the authors name their files. Words that styles are named by too (hyper, lightning) count only
# with what follows or precedes them there.
_SIGNS = {
    family: re.compile(rf"(?<![a-z0-9]){sign}", re.IGNORECASE)
    for family, sign in {
        "dmd2": r"dmd2?(?![a-z0-9])",
        "tcd": r"tcd(?![a-z])",
        "hyper-sd": rf"hyper[-_ ]?sd(?:xl)?(?![a-z])(?!{_ONE_STEP})",
        "hyper-sd-1step": rf"hyper[-_ ]?sd(?:xl)?(?![a-z]){_ONE_STEP}",
        "pcm": r"pcm(?![a-z])(?!.*lcm[-_ ]?like)",
        "lightning": r"(?:sdxl[-_ ]?lightning|lightning[-_ ]?\d+[-_ ]?step)",
    }.items()
}
_LCM = re.compile(r"(?<![a-z0-9])lcm(?:[-_ ]?like)?(?![a-z])", re.IGNORECASE)


def acceleration(metadata: Mapping[str, str], name: str) -> tuple[str, str]:
    """(family, what tells it), or two empty strings where nothing does.

    name: the file's, with its folders as far as the user chose them. Several families are joined by
    SEVERAL.
    """
    if metadata.get(FAMILY):
        return metadata[FAMILY], f"the file's metadata, {FAMILY}"
    told = [(metadata.get(key, ""), f"the file's metadata, {key}") for key in _TITLES]
    told += [(part, f"the name {part}") for part in reversed(re.split(r"[/\\]", name))]
    for text, where in told:
        found = [family for family, sign in _SIGNS.items() if sign.search(text)]
        # "lcm" only where no other word does: the sampler, and this pack, have it in their names.
        if found or _LCM.search(text):
            return SEVERAL.join(found) or "lcm", where
    return "", ""


def joined(all_metadata: list[Mapping[str, str]]) -> dict[str, str]:
    """What a sum of LoRAs has to say of its family: nothing, one, or that there are several."""
    families = {
        family
        for metadata in all_metadata
        for family in metadata.get(FAMILY, "").split(SEVERAL)
        if family
    }
    return {FAMILY: SEVERAL.join(sorted(families))} if families else {}
