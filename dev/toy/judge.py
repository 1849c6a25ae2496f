"""Figures of picture quality on the toy: Frechet distance, class accuracy, endpoint error."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from . import assemble, data

CLASSIFIER = assemble.WEIGHTS / "classifier.safetensors"


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] -> mean [D] and covariance [D, D], float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of two Gaussians (arXiv 1706.08500)."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    value, vector = torch.linalg.eigh(cov_a)
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def unbiased(
    features: torch.Tensor, real: tuple[torch.Tensor, torch.Tensor], sizes: int = 12, draws: int = 8
) -> float:
    """The Frechet distance of endlessly many such pictures (arXiv 1911.07023, section 4).

    The distance of N pictures is too large by about a constant / N, so it is taken for random parts
    of several sizes, from half of the pictures to all of them, and a line in 1/N gives N without
    end. features [N, D], N >= 4.
    """
    generator = torch.Generator().manual_seed(0)
    total, points = len(features), []
    for size in torch.linspace(total / 2, total, sizes).round().long().tolist():
        parts = (features[torch.randperm(total, generator=generator)[:size]] for _ in range(draws))
        mean = sum(frechet(moments(part), real) for part in parts) / draws
        points.append((1 / size, mean))
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return max(0.0, float(y.mean() - slope * x.mean()))


class Classifier(nn.Module):
    """Predicts garment, dye and backdrop from 32 x 32 pixels; the distance uses its 32 features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for a, b in zip(widths, widths[1:], strict=False)
        )  # fmt: skip
        self.embed = nn.Linear(96 * 4 * 4, 32)
        self.garment = nn.Linear(32, len(data.NAMES))
        self.dye = nn.Linear(32, len(data.DYES))
        self.backdrop = nn.Linear(32, data.HUES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, 64, 64] in 0..1 -> [N, 32]."""
        x = nn.functional.avg_pool2d(images, 2) * 2 - 1
        for stage in self.stages:
            x = stage(x)
        return torch.relu(self.embed(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, 3, 64, 64] in 0..1 -> logits of garment [N, 10], dye [N, 8] and hue [N, 6]."""
        features = self.features(images)
        return self.garment(features), self.dye(features), self.backdrop(features)


class Judge:
    """The shipped classifier and what it sees in 10,000 real test pictures, after the toy's VAE."""

    def __init__(self) -> None:
        state = load_file(CLASSIFIER)
        self.real = state.pop("real.mean").double(), state.pop("real.covariance").double()
        self.model = Classifier().eval()
        self.model.load_state_dict({name: tensor.float() for name, tensor in state.items()})

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, 64, 64] in 0..1 -> [N, 32]."""
        return torch.cat([self.model.features(part) for part in images.split(250)])

    def distance(self, features: torch.Tensor) -> float:
        """Frechet distance of a sample's features to the real ones, its size allowed for."""
        return unbiased(features, self.real)

    @torch.no_grad()
    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """The share of pictures in which the classifier sees what the prompt named."""
        return float((self.model.garment(features).argmax(1) == labels).float().mean())
