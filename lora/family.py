"""The family of an acceleration (LCM, TCD, DMD2, ...): who names it, and which one is chosen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

# This pack's key in a file's header: the name of a family, or several if they are added up.
FAMILY = "lcm_lora.family"
SEVERAL = " + "

_TITLES = ("modelspec.title", "ss_output_name")  # where other trainers keep a file's first name
_ONE_STEP = r".*(?<!\d)1[-_ ]?step"
# As the authors name their files. Styles have the words hyper and lightning in their names too, so
# these count only together with the words that the authors put around them.
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


def choose(
    wanted: str, metadata: Mapping[str, str], name: str, families: Collection[str], default: str
) -> tuple[str, str]:
    """(the family to sample as, why).

    wanted: what the user chose; "auto" reads the file. name: the file's name, with its folders.
    families: those that can be sampled. default: the family of a file that names none.

    Raises:
        ValueError: the file names several families, or one that cannot be sampled.
    """
    if wanted != "auto":
        return wanted, "chosen on this node"
    family, where = family_named(metadata, name)
    if not family:
        return default, "the default: neither the file's metadata nor its name says otherwise"
    if family not in families:
        raise ValueError(
            f"{name} cannot be sampled as {family!r}, which comes from {where}. Expected one "
            f"of {', '.join(families)}. Choose the family on the node."
        )
    return family, f"from {where}"


def family_named(metadata: Mapping[str, str], name: str) -> tuple[str, str]:
    """(family, where it is named) of a LoRA, or two empty strings if nothing names one.

    name: the file's name, with its folders as the user sees them. SEVERAL joins several families.
    """
    if metadata.get(FAMILY):
        return metadata[FAMILY], f"the file's metadata, {FAMILY}"
    places = [(metadata.get(key, ""), f"the file's metadata, {key}") for key in _TITLES]
    places += [(part, f"the name {part}") for part in reversed(re.split(r"[/\\]", name))]
    for text, where in places:
        families = [family for family, sign in _SIGNS.items() if sign.search(text)]
        # "lcm" counts only without another sign: the sampler and this pack have it in their names.
        if families or _LCM.search(text):
            return SEVERAL.join(families) or "lcm", where
    return "", ""


def sampling_hint(metadata: Mapping[str, str]) -> str:
    """Which sampling an applied vector needs, as a sentence. Empty if its metadata does not say."""
    family = metadata.get(FAMILY)
    return f"Its family is {family}: choose it in LCM Model Sampling." if family else ""


def joined(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The metadata key for the family of a sum: absent, one family, or several."""
    families = {
        family
        for metadata in all_metadata
        for family in metadata.get(FAMILY, "").split(SEVERAL)
        if family
    }
    return {FAMILY: SEVERAL.join(sorted(families))} if families else {}
