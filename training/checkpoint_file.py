"""What a checkpoint file is, read from its header alone: nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..lora.architecture import architecture
from .adapter import OF_BLOCKS, TARGETS

NETWORK = "model.diffusion_model."
_CROSS_ATTENTION = re.compile(r".*attn2\.to_k\.weight")
_OF_SD3 = "joint_blocks.0.x_block.attn.qkv.weight"
_DOWN = re.compile(r"input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\..*")
# By it, ComfyUI tells SD2 with v prediction (768 pixels) from SD2-base (512).
_OF_V_PREDICTION = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_LEAST_DEVIATION = 0.09


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of an architecture that is known.

    Attributes:
        architecture: "SD1.5", "SDXL", ... resolution: the side in pixels that it is made for.
        width: of its text features. shapes: of the network's weights, by their names in it.
    """

    architecture: str
    resolution: int
    width: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> CheckpointFile:
        """Raises ValueError if it is no safetensors file, or none of the known architectures."""
        return _read(path, path.stat().st_mtime_ns)

    @classmethod
    def _parse(cls, path: Path) -> CheckpointFile:
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {
                    key.removeprefix(NETWORK): tuple(file.get_slice(key).get_shape())
                    for key in file.keys()
                    if key.startswith(NETWORK)
                }
                if _OF_SD3 in shapes:
                    return cls("SD3", 1024, shapes["context_embedder.weight"][1], shapes)
                width = next((s[1] for n, s in shapes.items() if _is_cross(n, s)), None)
                kind = architecture(width, _deepest(shapes))
                if width is None or kind is None:
                    raise ValueError(
                        f"The architecture of {path.name} is not known: expected SD1.5, SD2, SDXL, "
                        "SSD-1B, Segmind Vega, KOALA or SD3."
                    )
                side = {768: 512, 1024: 512}.get(width, 1024)
                if width == 1024 and _OF_V_PREDICTION in shapes:
                    bias = file.get_tensor(NETWORK + _OF_V_PREDICTION).float()
                    side = 768 if bias.std(unbiased=False) > _LEAST_DEVIATION else 512
        except SafetensorError as error:
            raise ValueError(
                f"{path.name} is not a complete safetensors file, so its architecture cannot be "
                f"read: {error}."
            ) from error
        return cls(kind.name, side, width, shapes)

    @property
    def latent_channels(self) -> int:
        return 16 if self.architecture == "SD3" else 4

    @property
    def text_numbers(self) -> int:
        """How many numbers a short caption's embeddings are."""
        if self.architecture == "SD3":
            return 154 * self.width + 2048
        return 77 * self.width + (1280 if self.width == 2048 else 0)

    def lora_parameters(self, rank: int) -> int:
        """Of a LoRA on all its target layers."""
        layers = {name.removesuffix(".weight"): shape for name, shape in self.shapes.items()}
        targets = OF_BLOCKS if self.architecture == "SD3" else TARGETS
        return sum(
            rank * (shape[0] + prod(shape[1:]))
            for name, shape in layers.items()
            if len(shape) > 1 and targets.search(name)
        )


@lru_cache(maxsize=16)  # a page asks for estimates while the user types
def _read(path: Path, _changed: int) -> CheckpointFile:
    return CheckpointFile._parse(path)


def _is_cross(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and _CROSS_ATTENTION.fullmatch(name) is not None


def _deepest(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of transformer blocks in the last down block that has some."""
    found = [(int(m[1]), int(m[2]) + 1) for name in shapes if (m := _DOWN.fullmatch(name))]
    return max(found, default=(0, None))[1]
