"""What a single step of the finished LoRA lacks of the bank's latents (samplers/correction.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..lora.acceleration import ONE_STEP
from ..samplers.correction import fitted
from ..samplers.noise import picture_noise
from .bank import Bank
from .watch import few_steps

log = logging.getLogger("lcm_lora")
PICTURES = 128


def correction(
    teacher, bank: Bank, seed: int, progress: Callable[[str, int, int], None]
) -> dict[str, str]:
    """Metadata with the correction of one step, from rows and noise that are functions of the seed;
    none where the answers are not finite or all alike.

    teacher: the network with the LoRA on. progress(what, done, of) is called after each picture.
    """
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
    rows = order[:PICTURES].tolist()
    found, wanted = [], []
    for number, row in enumerate(rows, 1):
        latents, texts = bank.batch([row])
        cond, _ = teacher.conditions(texts)
        noise = picture_noise(latents, seed, [row])
        start = noise(0).to(teacher.device)
        found.append(few_steps(teacher, start, 1, cond, noise).cpu())
        wanted.append(latents)
        progress("colours of one step", number, len(rows))
    try:
        return {ONE_STEP: str(fitted(found, wanted))}
    except ValueError as error:
        log.warning("the file will not correct single steps: %s", error)
        return {}
