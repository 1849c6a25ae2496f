"""Draws the cells of a sheet in few batches. Encodes each text and reads each vector only once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...lora.delta import Vector
from ...lora.family import recorded
from ...lora.formats.files import read_named
from ...lora.formats.module_names import is_text
from ...lora.host import Coverage, apply, beside
from ...lora.live import Live
from ...samplers.conditioning import Conditioning, form, joined
from ...samplers.host import family_for, record, sample, schedule
from ...samplers.noise import picture_numbers
from ...samplers.report import Line
from ...training.jobs import host as jobs
from ..host import lora_path
from ..texts import acceleration, of_coverage, of_run
from .cells import Cell, Mix, Source, Together, sources_of, together

MOST_TOGETHER = 8  # pictures in a batch; more save hardly any time and take more memory
Watch = Callable[[int], None]
"""Called with the number of finished steps, added up over all pictures."""


class Drawing:
    """Everything that the cells of a sheet are drawn with: MODEL, vectors, texts and latent.

    Raises:
        ValueError: a vector or a prompt cannot be used, or steps and denoise do not fit together.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP | None,
        vae: VAE,
        texts: tuple[Conditioning | None, Conditioning | None],
        latent: dict[str, Any],
        wired: Sequence[Vector | None],
        cells: Sequence[Cell],
    ):
        """texts: positive and negative, if they are connected. wired: the connected vectors."""
        self.model, self.clip, self.vae, self.latent, self.cells = model, clip, vae, latent, cells
        self.positive, negative = texts
        self.wired = wired
        if any(cell.prompt is not None for cell in cells) and clip is None:
            raise ValueError(
                "The sheet compares prompts, but no CLIP is connected; connect the checkpoint's."
            )
        if self.positive is None and any(cell.prompt is None for cell in cells):
            raise ValueError("positive is not connected; connect a prompt, or compare prompts.")
        if negative is None and any(cell.run.cfg != 1 for cell in cells):
            raise ValueError(
                "negative is not connected, but a cfg other than 1 uses it; connect a prompt, such "
                "as an empty one."
            )
        self._negative = negative
        self._models: dict[Mix, ModelPatcher] = {}
        self._sum: tuple[Mix, ModelPatcher] | None = None
        self._encoder: tuple[Mix, CLIP] | None = None
        self.vectors = {source: self._read(source) for source in sources_of(cells)}
        text_used = clip if any(cell.prompt is not None for cell in cells) else None
        self.coverages = [
            apply(model, text_used, vector, 1.0, 1.0)[2] for vector in self.vectors.values()
        ]
        for cell in cells:
            described = self._described(cell.added)
            schedule(described, cell.run.steps, cell.run.denoise)
        self._texts: dict[Hashable, Conditioning] = {}
        self._beside: dict[Source, Any] = {}
        self._live: tuple[tuple[Source, ...], Live] | None = None

    @cached_property
    def batches(self) -> list[Together]:
        """Which cells are drawn together, in the order in which they are drawn."""
        pictures = len(self.latent["samples"])
        most = max(1, self._at_once() // pictures)
        return together(self.cells, most, self._family, self._form, self._may_live)

    def lines(self) -> list[Line]:
        """Warnings that hold for all cells, for the user."""
        models = [self._described(self.cells[batch.cells[0]].added) for batch in self.batches]
        by_batch = [
            [line for line in of_run(model, self.cells[batch.cells[0]].run) if line.warning]
            for model, batch in zip(models, self.batches, strict=True)
        ]
        common = [line for line in by_batch[0] if all(line in others for others in by_batch)]
        return common + [line for coverage in self.coverages for line in _problems(coverage)]

    def pictures(self, watch: Watch) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of a cell, its pictures [B, H, W, 3] in 0..1), as they are drawn. Raises what
        ComfyUI raises when the user interrupts."""
        # All texts first, so that their encoder is loaded once, and one mix after the other.
        for cell in sorted(self.cells, key=lambda cell: repr(cell.added)):
            self._positive(cell)
        done = 0
        for batch in self.batches:
            comfy.model_management.throw_exception_if_processing_interrupted()
            images = self._decoded(self._sampled(batch, watch, done))
            done += len(batch.cells) * self.cells[batch.cells[0]].run.steps
            yield from zip(batch.cells, images.chunk(len(batch.cells)), strict=True)

    def _read(self, source: Source) -> Vector:
        if source.kind == "lora":
            return read_named(lora_path(source.name), source.name)
        if source.kind == "checkpoint":
            job, _, step = source.name.rpartition("/")
            return jobs.of_checkpoint(job, int(step), {})
        vector = self.wired[int(source.name) - 1]
        assert vector is not None
        return vector

    def _described(self, mix: Mix) -> ModelPatcher:
        """A MODEL with a record of the mix's accelerations, but without their changes."""
        if mix not in self._models:
            model = self.model
            for source, weight in mix:
                model = self._noted(model, model.clone(), source, weight)
            self._models[mix] = model
        return self._models[mix]

    def _summed(self, mix: Mix) -> ModelPatcher:
        """The MODEL with a mix, added as Apply LoRA Vector adds one vector after the other. Kept
        for the next batch, because ComfyUI would merge a new MODEL again."""
        if self._sum is None or self._sum[0] != mix:
            model = self.model
            for source, weight in mix:
                applied = apply(model, None, self.vectors[source], weight, 0.0)[0]
                model = self._noted(model, applied, source, weight)
            self._sum = mix, model
        return self._sum[1]

    def _noted(
        self, before: ModelPatcher, after: ModelPatcher, source: Source, weight: float
    ) -> ModelPatcher:
        vector = self.vectors[source]
        record(before, after, acceleration(vector.source, recorded(vector.metadata), weight))
        return after

    def _sampled(self, batch: Together, watch: Watch, done: int) -> torch.Tensor:
        cells = [self.cells[number] for number in batch.cells]
        run, pictures = cells[0].run, len(self.latent["samples"])  # pictures: of one cell
        model = self._described(cells[0].added) if batch.live else self._summed(cells[0].added)
        weights = [[weight for _, weight in cell.mix] for cell in cells for _ in range(pictures)]
        beside_layers = self._kept(cells[0].sources).weighted(weights) if batch.live else None

        def tick(step: int, _x0: Any, _x: Any, _steps: int) -> None:
            watch(done + (step + 1) * len(cells))

        with beside_layers or nullcontext():
            return sample(
                model, run, self._positives(cells), self._negative or self._positive(cells[0]),
                _repeated(self.latent, len(cells)),
                seeds=[cell.run.seed for cell in cells for _ in range(pictures)], callback=tick,
            )["samples"]  # fmt: skip

    def _decoded(self, samples: torch.Tensor) -> torch.Tensor:
        images = self.vae.decode(samples)
        return images.reshape(-1, *images.shape[-3:]).cpu().float().clamp(0, 1)

    def _at_once(self) -> int:
        """How many pictures fit into half of the free memory."""
        model, samples = self.model, self.latent["samples"]
        # Two, because guidance calls the network twice.
        per_picture = model.memory_required([2, *samples.shape[1:]])
        missing = model.model_size() - model.loaded_size()
        free = comfy.model_management.get_free_memory(model.load_device) - missing
        return max(1, min(MOST_TOGETHER, int(free / 2 / per_picture)))

    def _family(self, cell: Cell) -> str:
        return family_for(self._described(cell.added)).name

    def _may_live(self, sources: tuple[Source, ...]) -> bool:
        return all(self._layers(source) is not None for source in sources)

    def _layers(self, source: Source) -> Any:
        if source not in self._beside:
            self._beside[source] = beside(self.model, self.vectors[source])
        return self._beside[source]

    def _kept(self, sources: tuple[Source, ...]) -> Live:
        if self._live is None or self._live[0] != sources:
            self._live = None  # frees its memory before the next takes some
            layers = [self._layers(source) for source in sources]
            self._live = sources, Live(self.model.model, layers)
        return self._live[1]

    def _positive(self, cell: Cell) -> Conditioning:
        if cell.prompt is None:
            assert self.positive is not None
            return self.positive
        mix = tuple(
            (source, weight)
            for source, weight in cell.added
            if any(map(is_text, self.vectors[source].modules()))
        )
        if (cell.prompt, mix) not in self._texts:
            clip = self._with_texts(mix)
            tokens = clip.tokenize(cell.prompt)
            self._texts[cell.prompt, mix] = clip.encode_from_tokens_scheduled(tokens)
        return self._texts[cell.prompt, mix]

    def _with_texts(self, mix: Mix) -> CLIP:
        if self._encoder is None or self._encoder[0] != mix:
            clip = self.clip
            for source, weight in mix:
                clip = apply(self.model, clip, self.vectors[source], 0.0, weight)[1]
            assert clip is not None
            self._encoder = mix, clip
        return self._encoder[1]

    def _form(self, cell: Cell) -> Hashable:
        """A key that is equal for cells whose texts can share a batch."""
        text = self._positive(cell)
        return id(text) if cell.prompt is None else form(text)

    def _positives(self, cells: Sequence[Cell]) -> Conditioning:
        texts = [self._positive(cell) for cell in cells]
        if all(text is texts[0] for text in texts):
            return texts[0]
        pictures = len(self.latent["samples"])
        return joined([text for text in texts for _ in range(pictures)])


def _problems(coverage: Coverage) -> list[Line]:
    """What is wrong with a vector, each line with the vector's name."""
    values = {"source": coverage.source.removesuffix(".safetensors")}
    return [
        Line("In {source}: {problem}", values | {"problem": line}, line.warning)
        for line in of_coverage(coverage)[1:]
    ]


def _repeated(latent: dict[str, Any], count: int) -> dict[str, Any]:
    """A LATENT that repeats all its pictures `count` times."""
    if count == 1:
        return latent
    samples = latent["samples"]
    numbers = picture_numbers(latent.get("batch_index"), len(samples))
    more: dict[str, Any] = {"batch_index": numbers * count}
    if (mask := latent.get("noise_mask")) is not None and len(mask) == len(samples):
        more["noise_mask"] = torch.cat([mask] * count)
    return {**latent, "samples": torch.cat([samples] * count), **more}
