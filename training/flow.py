"""A flow model as teacher: SD3 and SD3.5, as ComfyUI loads them from one checkpoint.

The network is called through ComfyUI's apply_model, so that what is trained is what is sampled.
"""

from __future__ import annotations

import re

import torch

from ..samplers.transfer import sent
from .adapter import OF_BLOCKS
from .objectives.solver import Line
from .teacher import Teacher, Tensors


class FlowTeacher(Teacher):
    """Its schedule is a Line. Texts have "context" [L, D] and "pooled" [P]; all captions have the
    length of the empty one."""

    schedule: Line

    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        """The clean latent x0 in float32, for z [B, C, h, w] on the line and t int64 [B]."""
        self.before_call()
        model = self._patcher.model
        return model.apply_model(z.float(), self.schedule.sigmas[t], **conditions).float()

    @property
    def targets(self) -> re.Pattern[str]:
        return OF_BLOCKS

    @property
    def has_sizes(self) -> bool:
        return False

    @torch.no_grad()
    def text(self, caption: str) -> Tensors:
        """Raises ValueError if the caption needs more tokens than the empty one has."""
        encoded = self._clip.encode_from_tokens(self._clip.tokenize(caption), return_dict=True)
        embeddings = {"context": encoded["cond"][0].float().cpu()}
        if (pooled := encoded.get("pooled_output")) is not None:
            embeddings["pooled"] = pooled[0].float().cpu()
        if self.uncond and embeddings["context"].shape != self.uncond["context"].shape:
            raise ValueError(
                f"A caption is too long: with this model at most 75 tokens can be used, about 50 "
                f"words: {caption[:60]!r}..."
            )
        return embeddings

    def conditions(self, texts: Tensors, sizes: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Conditional and unconditional inputs of apply_model, on the device. sizes: unused."""
        texts = {name: sent(tensor, self.device) for name, tensor in texts.items()}
        empty = {name: self.uncond[name].expand_as(tensor) for name, tensor in texts.items()}
        return self._inputs(texts), self._inputs(empty)

    def _inputs(self, texts: Tensors) -> Tensors:
        """Texts as apply_model's arguments, which ComfyUI makes from them for each class."""
        count = len(texts["context"])
        made = self._patcher.model.extra_conds(
            cross_attn=texts["context"], pooled_output=texts.get("pooled"), device=self.device,
            noise=torch.empty(count, self.channels, 1, 1, device=self.device),
        )  # fmt: skip
        return {name: value.process_cond(count).cond for name, value in made.items()}
