"""A search in ComfyUI: encodes prompts, draws the reference, measures weights on a MODEL."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from ..lora.agree import require_sum
from ..lora.delta import Vector
from ..lora.family import recorded
from ..lora.formats.module_names import is_text
from ..lora.host import apply
from ..samplers import host as sampling
from ..samplers.conditioning import Conditioning, form, joined
from .objective import Residuals, residuals, statistics
from .surface import Array

Patches = dict[str, list[Any]]
AT_ONCE = 128 * 128  # latent points in one call: a picture of SDXL, 4 of SD1.5


@dataclass(frozen=True)
class Settings:
    """How the few-step pictures and the reference are drawn.

    Attributes:
        steps, cfg: of the few-step pictures.
        seed: of all noise.
        reference_steps, guidance: of the reference.
        negative: prompt of the reference, and of the few-step pictures if cfg is not 1.
        strengths: of the styles in the reference.
    """

    steps: int
    cfg: float
    seed: int
    reference_steps: int
    guidance: float
    negative: str
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """Pictures that are drawn in one call: their text, and their numbers, which set their noise."""

    positive: Conditioning
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """Pictures that the styles alone draw in many steps.

    Attributes:
        states: x at the few-step timesteps, as the network sees it, [N, steps, ...].
        ends: the finished pictures in the network's scale.
        latents: the finished pictures in the scale of ComfyUI's LATENT.
    """

    states: Tensor
    ends: Tensor
    latents: Tensor


class Weighable:
    """A MODEL to which vectors can be added at any weights. ComfyUI multiplies the factors and adds
    the products when it loads the model. patches: of each vector, as `_added` makes them."""

    def __init__(self, model: ModelPatcher, patches: Sequence[Patches]) -> None:
        self.model, self.patches = model, patches
        self.last: tuple[tuple[float, ...], ModelPatcher] | None = None

    def at(self, weights: Sequence[float]) -> ModelPatcher:
        """A clone with the vectors at these weights. Returns the last clone again for the same
        weights, so that ComfyUI keeps it loaded."""
        key = tuple(map(float, weights))
        if self.last is not None and self.last[0] == key:
            return self.last[1]
        made = self.model.clone()
        for weight, patches in zip(key, self.patches, strict=True):
            if weight == 0:
                continue
            for name, entries in patches.items():
                scaled = [(strength * weight, *rest) for strength, *rest in entries]
                made.patches[name] = [*made.patches.get(name, []), *scaled]
        made.patches_uuid = uuid.uuid4()  # tells ComfyUI that the weights differ
        self.last = key, made
        return made


def _added(model: ModelPatcher, vector: Vector) -> Patches:
    """The patches of a vector at weight 1, by their keys."""
    require_sum(vector)
    after = apply(model, None, vector, 1.0, 0.0)[0]
    return {
        key: new
        for key, entries in after.patches.items()
        if (new := entries[len(model.patches.get(key, ())) :])
    }


class Studio:
    """The model, the vectors and the settings of one search.

    Raises:
        ValueError: the MODEL is set for few steps already, or a vector does not fit it.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        acceleration: Vector,
        styles: Sequence[Vector],
        latent: dict[str, Any],
        settings: Settings,
        tick: Callable[[int], None],
    ) -> None:
        """latent: an empty one, for its size. tick(n): called after n calls for a picture."""
        accelerations = sampling.applied_to(model).accelerations
        own = model.get_model_object("model_sampling")
        if accelerations or sampling.set_family(own):
            names = ", ".join(lora.source for lora in accelerations) or "LCM sampling"
            raise ValueError(
                f"The MODEL has {names} already. The search adds the acceleration itself: connect "
                "the MODEL of the checkpoint loader."
            )
        if latent["samples"].any():
            raise ValueError(
                "The latent holds a picture; the search draws from pure noise. Connect an empty "
                "latent of the size of your pictures."
            )
        self.settings, self.tick = settings, tick
        family = _family(acceleration, sampling.offered(model)[1])
        self.key = _key(styles, latent, settings) + family
        self.owners = model, clip
        fast, *patches = (_added(model, vector) for vector in (acceleration, *styles))
        self.bare = Weighable(model, patches)
        self.fast = Weighable(sampling.patch_sampling(model, family), [fast, *patches])
        self.empty = sampling.fitted(model, latent)[:1]
        for style, strength in zip(styles, settings.strengths, strict=True):
            if any(map(is_text, style.modules())):
                clip = apply(model, clip, style, 0.0, strength)[1]
        self.clip = clip
        self.negative = self._encode(settings.negative)
        self.sigmas = sampling.schedule(self.fast.model, settings.steps)

    def parts(self, prompts: Sequence[str], first: int) -> list[Part]:
        """One picture for each prompt, in parts. first: the number of the first picture."""
        most = max(1, AT_ONCE // self.empty.shape[-2:].numel())
        encoded = [(number, self._encode(prompt)) for number, prompt in enumerate(prompts, first)]
        made = []
        for _, alike in groupby(encoded, key=lambda item: form(item[1])):
            group = list(alike)
            for begin in range(0, len(group), most):
                numbers, texts = zip(*group[begin : begin + most], strict=True)
                made.append(Part(joined(texts) if len(texts) > 1 else texts[0], numbers))
        return made

    def reference(self, parts: Sequence[Part], styled: bool = True) -> Reference:
        """Pictures of the styles alone; with styled=False, of the bare model."""
        strengths = self.settings.strengths if styled else [0.0] * len(self.settings.strengths)
        model = self.bare.at(strengths)
        long = sampling.schedule(self.fast.model, self.settings.reference_steps)
        sigmas = torch.cat([long, self.sigmas]).unique().flip(0)
        wanted = [int((sigmas == sigma).nonzero()) for sigma in self.sigmas[:-1]]
        drawn = []
        for part in parts:
            states: list[Tensor] = []

            def walk(
                network: Any, x: Tensor, levels: Tensor, states: list[Tensor] = states,
                *, extra_args: dict[str, Any], **_: Any,
            ) -> Tensor:  # fmt: skip
                """DDIM (arXiv 2010.02502, equation 12 with sigma_t = 0) in the scale x0 + sigma
                eps; for flow models, Euler."""
                for i, level in enumerate(levels[:-1]):
                    if i in wanted:
                        states.append(x)
                    x0 = network(x, level.repeat(len(x)), **extra_args)
                    x = x0 + (x - x0) * (levels[i + 1] / level)
                    self.tick(len(x))
                states.append(x)
                return x

            latents = self._run(model, part, walk, sigmas, self.settings.guidance)
            drawn.append(Reference(torch.stack(states[:-1], 1).cpu(), states[-1].cpu(), latents))
        made = Reference(
            *(
                torch.cat([getattr(d, name) for d in drawn])
                for name in ("states", "ends", "latents")
            )
        )
        if not (made.ends.isfinite().all() and made.states.isfinite().all()):
            raise ValueError(
                "The reference pictures hold NaN or infinity: with these styles the MODEL "
                "overflows in its number format. Lower the strength of the styles, or start "
                "ComfyUI with --force-fp32."
            )
        return made

    def answers(self, weights: Sequence[float], parts: Sequence[Part], states: Tensor) -> Tensor:
        """The network's prediction in one call, at each of the reference's states."""
        model, answers, begin = self.fast.at(weights), [], 0
        for part in parts:
            at = states[begin : (begin := begin + len(part.numbers))]

            def call(
                network: Any, x: Tensor, levels: Tensor, at: Tensor = at,
                *, extra_args: dict[str, Any], **_: Any,
            ) -> Tensor:  # fmt: skip
                made = []
                for k, level in enumerate(levels[:-1]):
                    made.append(network(at[:, k].to(x), level.repeat(len(x)), **extra_args))
                    self.tick(len(x))
                answers.append(torch.stack(made, 1).float().cpu())
                return x

            self._run(model, part, call, self.sigmas, self.settings.cfg)
        return torch.cat(answers)

    def draw(self, weights: Sequence[float], parts: Sequence[Part]) -> Tensor:
        """The few-step pictures, as LCM KSampler draws them."""
        settings, model, drawn = self.settings, self.fast.at(weights), []
        run = sampling.Run(settings.seed, settings.steps, settings.cfg)
        for part in parts:
            size = len(part.numbers)
            samples = self.empty.repeat(size, *[1] * (self.empty.ndim - 1))
            latent = {"samples": samples, "batch_index": list(part.numbers)}
            made = sampling.sample(
                model, run, part.positive, self.negative, latent,
                callback=lambda *_, size=size: self.tick(size),
            )  # fmt: skip
            drawn.append(made["samples"].float().cpu())
        return torch.cat(drawn)

    def _run(
        self, model: ModelPatcher, part: Part, function: Any, sigmas: Tensor, cfg: float
    ) -> Tensor:
        """Samples with `function` as the sampling loop."""
        image = self.empty.repeat(len(part.numbers), *[1] * (self.empty.ndim - 1))
        seed = self.settings.seed
        with torch.no_grad():
            drawn = comfy.sample.sample_custom(
                model,
                comfy.sample.prepare_noise(image, seed, list(part.numbers)),
                cfg,
                comfy.samplers.KSAMPLER(function),
                sigmas,
                part.positive,
                self.negative,
                image,
                disable_pbar=True,
                seed=seed,
            )
        return drawn.float().cpu()

    def _encode(self, text: str) -> Conditioning:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


class Measured:
    """Pictures with their reference, on which weights are measured.

    targets, wanted: replace the reference's ends and statistics (benchmarks do).
    """

    def __init__(self, studio: Studio, parts: Sequence[Part], reference: Reference) -> None:
        self.studio, self.parts, self.reference = studio, parts, reference
        self.targets, self.wanted = reference.ends, statistics(reference.latents)

    def __call__(self, weights: Sequence[float] | Array) -> Residuals:
        weights = [float(weight) for weight in weights]
        answers = self.studio.answers(weights, self.parts, self.reference.states)
        drawn = self.studio.draw(weights, self.parts)
        if not (answers.isfinite().all() and drawn.isfinite().all()):
            numbers = ", ".join(f"{weight:.2f}" for weight in weights)
            raise ValueError(
                f"At the weights {numbers} the MODEL predicts NaN or infinity. Narrow the range of "
                "the weights."
            )
        return residuals(answers, self.targets, drawn, self.wanted)


def interrupted() -> type[BaseException]:
    """What ComfyUI raises when the user interrupts."""
    return comfy.model_management.InterruptProcessingException


def _family(acceleration: Vector, default: str) -> str:
    made = recorded(acceleration.metadata)
    if made is None:
        return default
    if len(made.families) > 1:
        raise ValueError(
            f"{acceleration.source} is a sum of accelerations of several families "
            f"({', '.join(made.families)}); expected one family. Use a single acceleration."
        )
    return made.families[0]


_KEPT: dict[str, tuple[list[weakref.ref[Any]], Any]] = {}
"""The last references by their keys, each with weak references to its MODEL and CLIP."""


def kept(studio: Studio, name: str, make: Callable[[], Any]) -> Any:
    """A kept reference. Draws it only once, as long as ComfyUI keeps this MODEL and CLIP and
    nothing else that it depends on changes."""
    key = f"{studio.key} {name}"
    owners, reference = _KEPT.get(key, ([], None))
    if owners and all(ref() is own for ref, own in zip(owners, studio.owners, strict=True)):
        return reference
    made = make()
    for old in [k for k in _KEPT if not k.startswith(studio.key)]:
        del _KEPT[old]
    _KEPT[key] = [weakref.ref(own) for own in studio.owners], made
    return made


def _key(styles: Sequence[Vector], latent: dict[str, Any], settings: Settings) -> str:
    """Changes with anything that a reference depends on, apart from the MODEL and the CLIP."""
    digest = hashlib.sha256()
    for style in styles:
        for name, delta in sorted(style.deltas.items()):
            digest.update(f"{name} {delta.scale}".encode())
            core = () if delta.mid is None else (delta.mid,)
            for factor in (delta.up, delta.down, *core):
                digest.update(factor.contiguous().view(torch.uint8).numpy().data)
        for name, diff in sorted(style.diffs.items()):
            digest.update(name.encode())
            digest.update(diff.contiguous().view(torch.uint8).numpy().data)
    # `steps` stays in the key, because the states are kept at the few-step timesteps.
    own = replace(settings, cfg=0.0)
    words = tuple(latent["samples"].shape), own
    return digest.hexdigest() + repr(words)
