"""The family of an acceleration (LCM, TCD, DMD2, ...): who names it, and which one is chosen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

# This pack's key in a file's header: the name of a family, or several if they are added up.
FAMILY = "lcm_lora.family"
SEVERAL = " + "
STEPS = "lcm_lora.made_for_steps"  # the sampling steps that it was made for: "4" or "2, 4"
CFG = "lcm_lora.made_for_cfg"  # "1" if it was made for guidance in sampling
WEIGHT = "lcm_lora.acceleration_weight"  # of the one acceleration in a sum, if it is not 1

_TITLES = ("modelspec.title", "ss_output_name")  # where other trainers keep a file's first name
_ONE_STEP = r".*(?<!\d)1[-_ ]?step"
# How the authors name their files. Names of styles contain hyper and lightning too, so these words
# count only together with the words that the authors put around them.
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
# Names of flow-model LoRAs contain the model's name. They are tried first, because they may contain
# a name from the table above: Qwen-Image-Lightning-4steps.
_FLOW_SIGNS = {
    family: re.compile(rf"(?<![a-z0-9]){sign}", re.IGNORECASE)
    for family, sign in {
        "qwen-lightning": r"qwen.*lightning",
        "qwen-turbo": r"wuli.*turbo(?![a-z])",
        "flux2-turbo": r"flux[-_. ]?2(?!\d).*turbo(?![a-z])",
        "flux-turbo": r"flux.*turbo[-_ ]?alpha",
        "hyper-flux": r"hyper[-_ ]?flux",
        "hyper-sd3": r"hyper[-_ ]?sd3(?!\d)",
        "pcm-sd3": r"pcm(?=.*deterministic)(?!.*shift[-_ ]?1(?!\d))",
        "pcm-sd3-shift1": r"pcm(?=.*deterministic).*shift[-_ ]?1(?!\d)",
        "pcm-sd3-stochastic": r"p[cd]m.*stochastic",  # its card spells it pdm
        "tdm-sd3": r"(?:sd3.*tdm|tdm.*sd3)",
        "wan-lightning": r"wan(?![a-z]).*(?:lightning|lightx2v)",
        "rcm": r"rcm(?![a-z])",
        "scfm": r"scfm(?![a-z])",
    }.items()
}
_LCM = re.compile(r"(?<![a-z0-9])lcm(?:[-_ ]?like)?(?![a-z])", re.IGNORECASE)

_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
# Not PCM's smallcfg, and not lightx2v's cfg_step_distill, which needs no cfg.
_CFG = re.compile(r"(?<![a-z])(?:normal)?cfg(?![a-z])(?!.*distill)", re.IGNORECASE)
# In the names of full models that draw in a few steps: sd_turbo, flux1-schnell, flux-2-klein.
_FEW_STEP = re.compile(r"turbo|schnell|klein|lightning|distill|(?<![a-z])fast", re.IGNORECASE)
# Reasons for the choice of a family, as the node shows them.
CHOSEN = "chosen on this node"
UNNAMED = "the default: neither the file's metadata nor its name gives a family"
IN_METADATA = "from the file's metadata, {what}"
IN_NAME = "from the name {what}"


@dataclass(frozen=True)
class MadeFor:
    """What an acceleration was made for.

    Attributes:
        families: their names; several for a sum of several accelerations.
        steps: the numbers of sampling steps; empty if nothing names them.
        cfg: whether it was made for guidance in sampling.
        weight: the weight that it already has in this vector, if that is a sum.
    """

    families: tuple[str, ...]
    steps: tuple[int, ...]
    cfg: bool
    weight: float = 1.0

    def metadata(self) -> dict[str, str]:
        """The keys that record it in a file."""
        keys = {FAMILY: SEVERAL.join(self.families)}
        if self.steps:
            keys[STEPS] = ", ".join(map(str, self.steps))
        if self.weight != 1:
            keys[WEIGHT] = f"{self.weight:g}"
        return keys | ({CFG: "1"} if self.cfg else {})


def choose(
    wanted: str,
    metadata: Mapping[str, str],
    name: str,
    families: Collection[str],
    default: str,
    kind: str = "this model",
) -> tuple[str, tuple[str, str]]:
    """(the family to sample as, (the reason, the value of {what} in the reason)).

    Args:
        wanted: what the user chose; "auto" reads the file.
        name: the file's name, with its folders.
        families: the families that the model can be sampled as.
        default: the family of a file that names none.
        kind: what the model is, for the message.

    Raises:
        ValueError: the file names several families, or one that the model cannot be sampled as.
    """
    if wanted != "auto":
        return wanted, (CHOSEN, "")
    family, (reason, what) = family_named(metadata, name)
    if not family:
        return default, (UNNAMED, "")
    if family not in families:
        raise ValueError(
            f"{name} on {kind} cannot be sampled as {family!r}, which comes "
            f"{reason.format(what=what)}. "
            f"Expected one of {', '.join(families)}. Choose the family on the node."
        )
    return family, (reason, what)


def family_named(metadata: Mapping[str, str], name: str) -> tuple[str, tuple[str, str]]:
    """(the family of a LoRA, (where it is named, the value of {what} there)). All texts are empty
    if nothing names a family; SEVERAL joins the names of several.

    name: the file's name, with its folders as the user sees them.
    """
    if metadata.get(FAMILY):
        return metadata[FAMILY], (IN_METADATA, FAMILY)
    for text, where in _places(metadata, name):
        families = _signed(_FLOW_SIGNS, text) or _signed(_SIGNS, text)
        # "lcm" counts only without another sign: names use it for the sampler and this pack too.
        if families or _LCM.search(text):
            return SEVERAL.join(families) or "lcm", where
    return "", ("", "")


def few_step_model(name: str) -> bool:
    """Whether the name of a model's file says that it draws in a few steps by itself."""
    return bool(family_named({}, name)[0] or _FEW_STEP.search(name))


def _signed(signs: Mapping[str, re.Pattern[str]], text: str) -> list[str]:
    return [family for family, sign in signs.items() if sign.search(text)]


def _places(metadata: Mapping[str, str], name: str) -> list[tuple[str, tuple[str, str]]]:
    """Where a family may be named: (the text, where it is)."""
    places = [(metadata.get(key, ""), (IN_METADATA, key)) for key in _TITLES]
    return places + [(part, (IN_NAME, part)) for part in reversed(re.split(r"[/\\]", name))]


def made_for(metadata: Mapping[str, str], name: str, family: str = "") -> MadeFor | None:
    """What an acceleration was made for, by its metadata or its name. None for any other LoRA.

    name: as in `family_named`. family: if not empty, replaces the family in metadata and name.
    """
    family = family or family_named(metadata, name)[0]
    if not family:
        return None
    texts = [text for text, _ in _places(metadata, name)]
    steps = _numbers(metadata.get(STEPS, ""))
    if STEPS not in metadata and family != "hyper-sd-1step":  # that one is for 1 to 8 steps
        steps = next((tuple(map(int, n)) for text in texts if (n := _STEPS.findall(text))), ())
    cfg = CFG in metadata or any(map(_CFG.search, texts))
    return MadeFor(tuple(family.split(SEVERAL)), steps, cfg, _weight(metadata))


def recorded(metadata: Mapping[str, str]) -> MadeFor | None:
    """What an acceleration was made for, by this pack's keys alone. None for any other vector: a
    vector without its UNet part is no acceleration, whatever its title says."""
    if not metadata.get(FAMILY):
        return None
    families = tuple(metadata[FAMILY].split(SEVERAL))
    steps = _numbers(metadata.get(STEPS, ""))
    return MadeFor(families, steps, CFG in metadata, _weight(metadata))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _weight(metadata: Mapping[str, str]) -> float:
    """The weight of an acceleration in a sum; 1 if the metadata have none, or an impossible one."""
    try:
        weight = float(metadata.get(WEIGHT, 1.0))
    except ValueError:  # another program wrote it
        return 1.0
    return weight if 0 < weight < inf else 1.0


def scaled(metadata: Mapping[str, str], weight: float) -> dict[str, str]:
    """The metadata of a vector times `weight`, which is above 0."""
    made = recorded(metadata)
    if made is None or weight == 1:
        return dict(metadata)
    return forgotten(metadata) | replace(made, weight=made.weight * weight).metadata()


def forgotten(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without the keys that mark a LoRA as an acceleration."""
    marks = (FAMILY, STEPS, CFG, WEIGHT)
    return {key: value for key, value in metadata.items() if key not in marks}


def joined(all_metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The keys that say what a sum was made for; empty if no part of it is an acceleration."""
    parts = [made for metadata in all_metadata if (made := recorded(metadata))]
    families = {family for made in parts for family in made.families}
    steps = {number for made in parts for number in made.steps}
    if not families:
        return {}
    cfg = any(made.cfg for made in parts)
    weight = parts[0].weight if len(parts) == 1 else 1.0
    return MadeFor(tuple(sorted(families)), tuple(sorted(steps)), cfg, weight).metadata()
