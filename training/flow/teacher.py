"""A flow model as teacher: a transformer that ComfyUI samples as rectified flow.

Calls go through ComfyUI's apply_model, with the conditions that ComfyUI makes for each class. So
training calls the network exactly as sampling does. kinds.py lists the tested classes.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ...samplers.transfer import sent
from ..adapter import OF_BLOCKS
from ..data.bank import FEATURES, apart, grown, shape_of, together
from ..objectives.solver import Line
from ..teacher import Teacher, Tensors

VIDEO = 3  # dimensions of its latents: frames, height, width


class FlowTeacher(Teacher):
    """A Teacher whose schedule is a Line. Texts have the names of ComfyUI's conditions:
    "cross_attn" [1, L, D], and whatever else the text encoder gives: "pooled_output" [1, P],
    "attention_mask" [1, L], ...

    guidance: the input of a network with a guidance embedding (Flux-dev, Flux2-dev), for teacher,
    target and student. It replaces a second call for the empty prompt.
    """

    schedule: Line
    guidance: float = 3.5

    def __call__(self, z: torch.Tensor, t: torch.Tensor, **texts: torch.Tensor) -> torch.Tensor:
        """The clean latent x0 in float32, for z [B, C, h, w] on the line and t int64 [B].

        As in ComfyUI's sampling, texts of different lengths are called one after another.
        """
        self.before_call()
        z = z.float().unsqueeze(2) if self._is_video else z.float()
        sigmas = self.schedule.sigmas[t]
        calls = self._calls(z, apart(texts))
        made = [
            self._patcher.model.apply_model(z[rows], sigmas[rows], **conditions).float()
            for rows, conditions in calls
        ]
        x0 = made[0]
        if len(made) > 1:
            order = torch.tensor([row for rows, _ in calls for row in rows])
            x0 = torch.cat(made)[order.argsort().to(z.device)]
        return x0.squeeze(2) if self._is_video else x0

    def _calls(self, z: torch.Tensor, texts: list[Tensors]) -> list[tuple[list[int], Any]]:
        """The rows whose conditions fit together, with these conditions as apply_model takes them.
        ComfyUI itself makes, compares and joins them."""
        from comfy.samplers import cond_cat, cond_equal_size

        model, calls = self._patcher.model, list[tuple[list[int], list[dict[str, Any]]]]()
        # What a text encoder does not have is None in ComfyUI too.
        given: dict[str, Any] = {"pooled_output": None, "device": self.device}
        if self.has_guidance:
            given["guidance"] = self.guidance
        for row, text in enumerate(texts):
            made = model.extra_conds(**given | text, noise=z[row : row + 1].detach())
            made = {name: cond.process_cond(batch_size=1, area=None) for name, cond in made.items()}
            for rows, conditions in calls:
                if cond_equal_size(conditions[0], made):
                    rows.append(row)
                    conditions.append(made)
                    break
            else:
                calls.append(([row], [made]))
        return [(rows, cond_cat(conditions)) for rows, conditions in calls]

    @property
    def _is_video(self) -> bool:
        return self.latent_dimensions == VIDEO

    @property
    def has_guidance(self) -> bool:
        """Whether the network has an input for the guidance scale, and so needs no empty prompt."""
        return bool(getattr(getattr(self.network, "params", None), "guidance_embed", False))

    @property
    def guided_calls(self) -> int:
        return 1 if self.has_guidance else 2

    def use_guidance(self, scale: tuple[float, ...]) -> None:
        if self.has_guidance and len(set(scale)) > 1:
            raise ValueError(
                f"guidance is a range, {scale[0]:g} to {scale[-1]:g}; expected one number, because "
                f"{self.architecture} has its guidance as an input of the network. Use the number "
                "that you give FluxGuidance."
            )
        self.guidance = scale[0]

    @property
    def targets(self) -> re.Pattern[str]:
        return OF_BLOCKS

    @property
    def has_sizes(self) -> bool:
        return False

    @property
    def shrink(self) -> int:
        return int(self._patcher.model.latent_format.spacial_downscale_ratio)

    @torch.no_grad()
    def text(self, caption: str) -> Tensors:
        encoded = self._clip.encode_from_tokens(self._clip.tokenize(caption), return_dict=True)
        encoded[FEATURES] = encoded.pop("cond")
        tensors = {name: value for name, value in encoded.items() if torch.is_tensor(value)}
        return {
            name: tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in tensors.items()
        }

    def conditions(self, texts: Tensors, sizes: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Conditional and unconditional inputs of a call, on the device; no unconditional ones if
        the guidance is embedded. sizes: unused."""
        cond = self._sent(texts)
        if self.has_guidance:
            return cond, {}
        empty = self._sent(together([self.uncond] * len(texts[FEATURES])))
        for name in [name for name in cond if shape_of(name) in cond]:
            shape = [max(both) for both in zip(cond[name].shape, empty[name].shape, strict=True)]
            cond[name], empty[name] = grown(cond[name], shape), grown(empty[name], shape)
        return cond, empty

    def _sent(self, texts: Tensors) -> Tensors:
        """Texts on the device. Their shapes stay on the CPU, because every call reads them."""
        shapes = {shape_of(name) for name in texts}
        return {
            name: tensor if name in shapes else sent(tensor, self.device)
            for name, tensor in texts.items()
        }

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self._is_video:
            return super().encode(pixels)
        latents = [self._vae.encode(picture[None]) for picture in pixels]
        return self._patcher.model.process_latent_in(torch.cat(latents).float())[:, :, 0].cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if not self._is_video:
            return super().decode(latents)
        raw = self._patcher.model.process_latent_out(latents.float().cpu().unsqueeze(2))
        return self._vae.decode(raw)[:, 0].float().cpu().clamp(0, 1)
