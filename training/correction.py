"""What a single step of the finished LoRA lacks of the bank's latents (samplers/correction.py)."""

from __future__ import annotations

from ..lora.acceleration import ONE_STEP
from ..samplers.correction import fitted
from ..samplers.noise import picture_noise
from .bank import Bank
from .watch import few_steps

PICTURES = 128


def correction(teacher, bank: Bank, seed: int) -> dict[str, str]:
    """Metadata with the correction of one step, from noise that is a function of seed and row; none
    where the answers have no deviation to be moved.

    teacher: the network with the LoRA on.
    """
    count = min(len(bank), PICTURES)
    rows = [i * len(bank) // count for i in range(count)]
    found, wanted = [], []
    for row in rows:
        latents, texts = bank.batch([row])
        cond, _ = teacher.conditions(texts)
        noise = picture_noise(latents, seed, [row])
        start = noise(0).to(teacher.device)
        found.append(few_steps(teacher, start, 1, cond, noise).cpu())
        wanted.append(latents)
    try:
        return {ONE_STEP: str(fitted(found, wanted))}
    except ValueError:
        return {}
