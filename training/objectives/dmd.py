"""Distribution matching distillation (DMD, arXiv 2311.18828) with two LoRAs on one frozen network.

The student draws pictures from pure noise, as the sampler will. They are noised again, and two
networks predict the clean picture: the guided teacher, and the fake score, which has learned the
student's own pictures. Where the two differ, the student's pictures are too likely or not likely
enough, and they move along that difference. Student and fake score are two adapters of one frozen
network; the teacher is that network without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..adapter import Adapter
from .batch import Batch, Inputs
from .solver import Network, Process, predict_guided


@dataclass(frozen=True)
class Draws:
    """The random numbers of a part of a batch, on the device of the network.

    run: [B, N, C, H, W], the start of a run of the sampler and the fresh noise after each step.
    eps: [B, 2, C, H, W] and tau: int64 [B, 2], the noise and the timesteps at which the drawn
    picture is judged, and at which the fake score learns it.
    """

    run: torch.Tensor
    eps: torch.Tensor
    tau: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """The two adapters on a network. The student is on, the fake score off.

    dtype: what their factors are cast to while they are used.
    """

    network: Network
    schedule: Process
    student: Adapter
    fake: Adapter
    dtype: torch.dtype = torch.float32

    def add_gradients(
        self, batch: Batch, draws: Draws, timesteps: list[int], scale: float, judged: bool = True
    ) -> torch.Tensor:
        """Adds `scale` times the gradients of both adapters to theirs; -> the student's loss.

        timesteps: of the sampler's run up to the call that is trained. judged: without it only the
        fake score learns, and its loss is returned.
        """
        schedule, cond = self.schedule, batch.cond
        z, t = arrive(self.network, schedule, draws.run, timesteps, cond)
        loss = torch.zeros((), device=z.device)
        with self.student.cast(self.dtype), torch.set_grad_enabled(judged):
            x = drawn(self.network, schedule, z, t, cond)
            if judged:
                moves = self._direction(x.detach(), batch, draws.eps[:, 0], draws.tau[:, 0])
                loss = matching_loss(x, moves)
                (loss * scale).backward()
        tau, eps = draws.tau[:, 1], draws.eps[:, 1]
        z_tau = schedule.noised(x.detach(), eps, tau)
        with self.fake_on(), self.fake.cast(self.dtype):
            predicted = schedule.predict(self.network, z_tau, tau, cond)[1]
            # Without guidance, because the student's pictures are drawn without.
            denoising = (predicted - eps).square().mean()  # DMD, equation 6
            (denoising * scale).backward()
        return (loss if judged else denoising).detach()

    @torch.no_grad()
    def _direction(
        self, x: torch.Tensor, batch: Batch, eps: torch.Tensor, tau: torch.Tensor
    ) -> torch.Tensor:
        z_tau = self.schedule.noised(x, eps, tau)
        with self.fake_on():
            fake, _ = self.schedule.predict(self.network, z_tau, tau, batch.cond)
        with self.student.off():
            real, _ = predict_guided(
                self.network, self.schedule, z_tau, tau, batch.cond, batch.uncond, batch.cfg
            )
        return direction(x, fake, real)

    @contextmanager
    def fake_on(self) -> Iterator[None]:
        """The network with the fake score instead of the student."""
        with self.student.off():
            self.fake.on = True
            try:
                yield
            finally:
                self.fake.on = False


@torch.no_grad()
def arrive(
    network: Network, schedule: Process, noise: torch.Tensor, timesteps: list[int], cond: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z [B, C, H, W], t int64 [B]) where the LCM sampler calls the network at the last of these
    timesteps, in a run from pure noise at the first. noise: as Draws.run.

    So the student is trained on what it sees in sampling. DMD2 calls it backward simulation (arXiv
    2405.14867, section 4.5).
    """
    z, times = noise[:, 0], [torch.full((len(noise),), t, device=noise.device) for t in timesteps]
    for i, (t, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
        z = schedule.noised(drawn(network, schedule, z, t, cond), noise[:, i + 1], following)
    return z, times[-1]


def drawn(
    network: Network, schedule: Process, z: torch.Tensor, t: torch.Tensor, cond: Inputs
) -> torch.Tensor:
    """The student's picture x [B, C, H, W] at (z, t)."""
    x0, _ = schedule.predict(network, z, t, cond)
    return schedule.consistency(z, x0, t)


def direction(x: torch.Tensor, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The gradient of the divergence at the pictures x [B, C, H, W] (DMD, equations 7 and 8).

    fake, real: the clean pictures that the fake score and the guided teacher see in the noised x.
    Each is divided by the mean distance of x to the teacher's, so that all timesteps weigh alike.
    """
    size = (x - real).abs().mean((1, 2, 3), keepdim=True)
    return (fake - real) / size.clamp(min=1e-6)


def matching_loss(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient at x is the direction / the number of x's elements. Its value is half
    of the direction's mean square."""
    return 0.5 * (x - (x - direction).detach()).square().mean()
