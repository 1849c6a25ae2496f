"""Encoded texts as ComfyUI's CONDITIONING: [[encoded [B, N, C], {name: tensor or other}]]."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

Conditioning = list[Any]


def form(text: Conditioning) -> Hashable:
    """A key, equal for texts that can share a batch. A text with several parts has its own key."""
    if len(text) != 1:
        return id(text)
    encoded, more = text[0]
    return (encoded.shape, *sorted((name, _form(value)) for name, value in more.items()))


def _form(value: Any) -> str:
    return str(value.shape if torch.is_tensor(value) else value)


def joined(texts: Sequence[Conditioning]) -> Conditioning:
    """Texts of one form as a batch."""
    encoded = torch.cat([text[0][0] for text in texts])
    more = {
        name: torch.cat([text[0][1][name] for text in texts]) if torch.is_tensor(value) else value
        for name, value in texts[0][0][1].items()
    }
    return [[encoded, more]]
