"""A small few-step process whose best weights are known, because changes add up."""

import torch
from lcm_lora.search.objective import Residuals, residuals, statistics

PICTURES, STEPS, SHAPE = 6, 3, (4, 6, 6)
WIDTH = 4 * 6 * 6


class Process:
    """f_l(z) = tanh((W + sum_i l_i D_i) z), one call; and a run of STEPS calls with noise.

    changes: how many D there are. vectors: D in place of the random ones.
    """

    def __init__(self, seed: int, changes: int = 2, vectors: list | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def matrix() -> torch.Tensor:
            return torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

        self.weight = matrix()
        self.changes = vectors or [matrix() / 2 for _ in range(changes)]
        self.states = torch.randn(PICTURES, STEPS, WIDTH, generator=generator)
        self.noise = 0.2 * torch.randn(PICTURES, WIDTH, generator=generator)

    def call(self, weights, x: torch.Tensor) -> torch.Tensor:
        change = sum(float(w) * d for w, d in zip(weights, self.changes, strict=True))
        return torch.tanh(x @ (self.weight + change).T)

    def answers(self, weights) -> torch.Tensor:
        return self.call(weights, self.states).view(PICTURES, STEPS, *SHAPE)

    def drawn(self, weights) -> torch.Tensor:
        x = self.states[:, 0]
        for step in range(STEPS):
            x = self.call(weights, x) + 0.3 * self.states[:, step]
        return x.view(PICTURES, *SHAPE)

    def against(self, weights, blurred: bool = False):
        """-> what measures the distance to these weights' own answers; `blurred`: to what no
        weights reach, too."""
        noise = self.noise.view(PICTURES, *SHAPE) if blurred else 0
        targets = self.answers(weights) + (noise[:, None] if blurred else 0)
        wanted = statistics(self.drawn(weights) + noise)

        def measure(at) -> Residuals:
            return residuals(self.answers(at), targets, self.drawn(at), wanted)

        return measure
