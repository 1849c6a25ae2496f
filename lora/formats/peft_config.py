"""PEFT's configuration of an adapter, which holds the alphas, read in the same way as in PEFT."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any

import regex
from torch import Tensor

from .lycoris import rank_of
from .module_names import PEFT_MODEL

# diffusers keeps the adapter's configuration under this key of the file's header.
PEFT_METADATA = "lora_adapter_metadata"
# Keys of a header that hold an alpha; the first counts.
HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
LONGEST_PATTERN = 1000  # characters
MOST = 1e30  # no training uses a larger alpha or rank
PATIENCE = 2.0  # seconds for all patterns of a file; in practice they take milliseconds
# Values of `init_lora_weights` begin like this if PEFT takes a part out of the base's weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftConfig:
    """The configuration of one file. If the file has none, all scales are unknown."""

    def __init__(self, metadata: Mapping[str, str]):
        try:
            values = json.loads(metadata.get(PEFT_METADATA, "{}"))
        except (ValueError, RecursionError):
            values = {}
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else {}
        if not self._values:
            self._values = _of_header(metadata)
        self._patterns: dict[str, regex.Pattern[str]] = {}
        self._left = PATIENCE

    def scale(self, module: str, parts: Mapping[str, Tensor]) -> float | None:
        """The factor between a module's product and its delta. None if there is no alpha.

        The scale is alpha / r, and alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).

        module: its name in the file. parts: its tensors.

        Raises:
            ValueError: a value has the wrong type, a pattern is not a regular expression or takes
                too long, or the adapter changes the weights that it was trained on.
        """
        if not self._values:
            return None
        prefix = module.partition(".")[0] + "."
        if not any(f"{prefix}{key}" in self._values for key in ("lora_alpha", "alpha")):
            prefix = ""
        # LoRA calls it lora_alpha, LoHa and LoKr call it alpha.
        alpha = self._values.get(f"{prefix}lora_alpha", self._values.get(f"{prefix}alpha"))
        path = module.removeprefix(prefix).replace(PEFT_MODEL, "")
        alpha = self._by_pattern(f"{prefix}alpha_pattern", path, alpha)
        rank = rank_in(parts)
        if rank is None and any(part.startswith("lokr_") for part in parts):
            rank = self._by_pattern(f"{prefix}rank_pattern", path, self._values.get(f"{prefix}r"))
        if alpha is None or rank is None:
            return None
        start = self._values.get(f"{prefix}init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
            raise ValueError(
                f"it was trained with init_lora_weights={start[:80]!r}, which changes the weights "
                "of the base model too; expected a LoRA for the base model as it is. Save it again "
                "with PEFT's path_initial_model_for_weight_conversion"
            )
        if not _is_number(alpha):
            raise ValueError(f"its header has the alpha {str(alpha)[:80]!r}; expected a number")
        if not _is_number(rank) or rank <= 0:
            raise ValueError(
                f"its header has the rank {str(rank)[:80]!r}; expected a number above 0"
            )
        stabilized = self._values.get(f"{prefix}use_rslora", False)
        return float(alpha) / (rank**0.5 if stabilized else rank)

    def _by_pattern(self, key: str, path: str, default: Any) -> Any:
        """The value of the first pattern that fits the module's path. As in PEFT's get_pattern_key,
        a pattern is a regular expression for the full path, or for its end after a dot."""
        patterns = self._values.get(key)
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if self._fits(pattern, path):
                return value
        return default

    def _fits(self, pattern: str, path: str) -> bool:
        begin = time.monotonic()
        try:
            if len(pattern) > LONGEST_PATTERN or self._left <= 0:
                raise TimeoutError
            if pattern not in self._patterns:
                self._patterns[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
            # re has no timeout, and some expressions would take forever.
            return bool(self._patterns[pattern].match(path, timeout=self._left))
        except (regex.error, RecursionError) as error:
            raise ValueError(
                f"its header has the pattern {pattern[:80]!r}, which is not a valid regular "
                f"expression: {error}"
            ) from None
        except TimeoutError:
            raise ValueError(
                f"its header has the pattern {pattern[:80]!r}, which is too long or takes too long "
                "to match; expected a regular expression for the path of a module"
            ) from None
        finally:
            self._left -= time.monotonic() - begin


def _of_header(metadata: Mapping[str, str]) -> dict[str, float]:
    """The alphas that stand in the file's header themselves, for all modules or for those of a
    prefix: Lightx2v's Turbo LoRAs for MiniMax-H3 have `alpha` (sgl-project/sglang #35952)."""
    alphas: dict[str, float] = {}
    for name in reversed(HEADER_ALPHAS):
        for key, text in metadata.items():
            prefix, _, last = key.rpartition(".")
            if last == name and _NUMBER.fullmatch(text.strip()):
                alphas[f"{prefix}.lora_alpha" if prefix else "lora_alpha"] = float(text)
    return alphas


def rank_in(parts: Mapping[str, Tensor]) -> int | None:
    """The rank of a module's factors. None if they have none, as in a LoKr of two full factors."""
    factors = {part: tensor for part, tensor in parts.items() if tensor.dim() and len(tensor)}
    return len(factors["down"]) if "down" in factors else rank_of(factors)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -MOST < value < MOST
