"""What a checkpoint file is, read from its header alone: nothing is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..lora.architecture import architecture
from .adapter import BLOCK, OF_BLOCKS, TARGETS
from .flow.kinds import KINDS, Kind, has_guidance, kind_of
from .teacher import SHRINK

NETWORK = "model.diffusion_model."
PREFIXES = (NETWORK, "net.", "")  # of the weights in a checkpoint, and in two kinds of parts
TOKEN = 16  # pixels a side that are one token of each of the flow models
_CROSS_ATTENTION = re.compile(r".*attn2\.to_k\.weight")
_DOWN = re.compile(r"input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\..*")
# Shows ComfyUI whether the model is SD2 with v prediction (768 pixels) or SD2-base (512).
_OF_V_PREDICTION = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_LEAST_DEVIATION = 0.09
_FP8 = "F8_E4M3"
_OF_PACKED = "scaled_fp8", ".comfy_quant", ".scale_weight", ".weight_scale"


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of a known architecture.

    Attributes:
        architecture: "SD1.5", "SDXL", ...
        resolution: the side in pixels of the pictures that it is made for.
        width: of its text features.
        shapes: of the network's weights, by their names in the network.
        flow: its kind, if it is a flow model.
        dtype: of most of its weights, as safetensors names it.
        is_packed: whether layers have scales beside their weights.
    """

    architecture: str
    resolution: int
    width: int
    shapes: Mapping[str, tuple[int, ...]]
    flow: Kind | None = None
    dtype: str = ""
    is_packed: bool = False

    @classmethod
    def read(cls, path: Path) -> CheckpointFile:
        """Reads a checkpoint, or a file that holds only the network of a flow model.

        Raises ValueError if it is no safetensors file, or of no known architecture.
        """
        return _read(path, path.stat().st_mtime_ns)

    @classmethod
    def _parse(cls, path: Path) -> CheckpointFile:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                prefix = next(p for p in PREFIXES if any(name.startswith(p) for name in names))
                shapes = {
                    key.removeprefix(prefix): tuple(file.get_slice(key).get_shape())
                    for key in names
                    if key.startswith(prefix)
                }
                if flow := kind_of(shapes):
                    features = flow.text_width(shapes)
                    dtypes = Counter(file.get_slice(f"{prefix}{key}").get_dtype() for key in shapes)
                    is_packed = "_quantization_metadata" in (file.metadata() or {}) or any(
                        key.endswith(_OF_PACKED) for key in shapes
                    )
                    return cls(
                        flow.name, flow.resolution, features, shapes, flow,
                        dtypes.most_common(1)[0][0], is_packed,
                    )  # fmt: skip
                width = next((s[1] for n, s in shapes.items() if _is_cross(n, s)), None)
                kind = architecture(width, _deepest(shapes))
                if width is None or kind is None:
                    raise ValueError(
                        f"The architecture of {path.name} is not known: expected SD1.5, SD2, SDXL, "
                        "SSD-1B, Segmind Vega, KOALA, or a flow model: "
                        f"{', '.join(sorted(kind.name for kind in KINDS))}."
                    )
                side = {768: 512, 1024: 512}.get(width, 1024)
                if width == 1024 and _OF_V_PREDICTION in shapes:
                    bias = file.get_tensor(NETWORK + _OF_V_PREDICTION).float()
                    side = 768 if bias.std(unbiased=False) > _LEAST_DEVIATION else 512
        except SafetensorError as error:
            raise ValueError(
                f"{path.name} is not a complete safetensors file, so its architecture cannot be "
                f"read: {error}. Download it again, or use a .safetensors checkpoint."
            ) from error
        return cls(kind.name, side, width, shapes)

    @property
    def latent_channels(self) -> int:
        return self.flow.channels if self.flow else 4

    @property
    def shrink(self) -> int:
        """Pixels per latent cell, along each side."""
        return self.flow.shrink if self.flow else SHRINK

    @property
    def guided_calls(self) -> int:
        """As of a Teacher."""
        return 1 if self.flow and has_guidance(self.shapes) else 2

    @property
    def network(self) -> tuple[str, int, int]:
        """A key that is equal for networks that take the same time. The architecture alone is not
        enough, because it may have several sizes."""
        return self.architecture, self.guided_calls, self.lora_parameters(1)

    @property
    def text_numbers(self) -> int:
        """How many numbers the embeddings of a short caption have."""
        if self.flow:
            return self.flow.tokens * self.width + self.flow.pooled
        return 77 * self.width + (1280 if self.width == 2048 else 0)

    def lora_parameters(self, rank: int) -> int:
        """The number of parameters of a LoRA on all target layers."""
        return sum(rank * (shape[0] + prod(shape[1:])) for shape in self._layers().values())

    def _layers(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its target layers, by their names."""
        targets = OF_BLOCKS if self.flow else TARGETS
        layers = {
            name.removesuffix(".weight"): shape for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) > 1
        }  # fmt: skip
        return {name: shape for name, shape in layers.items() if targets.search(name)}

    def step_bytes(self, rank: int, side: int, precision: str) -> float | None:
        """Calculates the bytes of a step with one picture and with blocks recomputed; None if only
        a measurement can tell.

        side: of the picture, in pixels. precision: the job's. Adds up the weights; the LoRA with
        its gradient and AdamW's moments in float32; the input of each block; and one block's
        activations, 17 numbers for each feature of a token (arXiv 2205.05198, equation 2, without
        the attention matrix).
        """
        if self.flow is None:
            return None
        layers = self._layers()
        blocks = len({found[0] for name in layers if (found := re.match(BLOCK, name))})
        features = Counter(shape[1] for shape in layers.values()).most_common(1)[0][0]
        tokens = (side / TOKEN) ** 2 + self.flow.tokens
        weights = sum(prod(shape) for shape in self.shapes.values())
        activations = tokens * features * (blocks + 17)
        width = 4 if precision == "fp32" else 2
        is_small = self.dtype == _FP8 and (self.is_packed or precision == "auto")
        stored = 1 if is_small else width
        return stored * weights + width * activations + 16 * self.lora_parameters(rank)


def is_fp8(path: Path) -> bool:
    """Whether a flow model's weights are stored as plain fp8, without scales."""
    try:
        file = CheckpointFile.read(path)
    except ValueError:
        return False
    return file.dtype == _FP8 and not file.is_packed


@lru_cache(maxsize=16)  # a page asks for estimates while the user types
def _read(path: Path, _changed: int) -> CheckpointFile:
    return CheckpointFile._parse(path)


def _is_cross(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and _CROSS_ATTENTION.fullmatch(name) is not None


def _deepest(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of transformer blocks in the last down block that has some."""
    found = [(int(m[1]), int(m[2]) + 1) for name in shapes if (m := _DOWN.fullmatch(name))]
    return max(found, default=(0, None))[1]
