"""Figures of picture quality: Frechet distance, precision and recall, class accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ...training.state.likeness import share_inside
from . import assemble, world

CLASSIFIER = assemble.WEIGHTS / "classifier.safetensors"
FEATURES = 64
REAL = {"3d": 2_000}  # pictures, at most, that git holds the features of; 1,000 of the others


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
    """The Frechet distance extrapolated to an unlimited sample (arXiv 1911.07023, section 4).

    The distance of N pictures is too large by about a constant / N. So it is measured on random
    subsets of several sizes, from half of the pictures to all of them, and a straight line in 1/N
    is followed to 1/N = 0. features [N, D], N >= 4.
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
    """Sees objects, colour, pattern and hand on whole pictures; its features carry the distance.

    It works on all 128 pixels, so that pictures that are only soft are far from the real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 160)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 2 if a == 3 else 1, bias=False),
                nn.BatchNorm2d(b), nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1, bias=False, groups=b // 32),
                nn.BatchNorm2d(b), nn.ReLU(),
            )
            for a, b in zip(widths, widths[1:], strict=False)
        )  # fmt: skip
        self.embed = nn.Linear(2 * widths[-1], FEATURES)
        self.object = nn.Linear(FEATURES, len(world.NAMES))
        self.colour = nn.Linear(FEATURES, len(world.COLOURS))
        self.pattern = nn.Linear(FEATURES, len(world.PATTERNS))
        self.hand = nn.Linear(FEATURES, len(world.HANDS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, SIZE, SIZE] in 0..1 -> [N, FEATURES]."""
        x = images * 2 - 1
        for stage in self.stages:
            x = stage(x)
        # Left and right apart: two objects stand side by side.
        halves = F.adaptive_avg_pool2d(x, (1, 2)).flatten(1)
        return torch.relu(self.embed(halves))

    def heads(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features -> logits of each head, [N, classes]."""
        return {
            "object": self.object(features), "colour": self.colour(features),
            "pattern": self.pattern(features), "hand": self.hand(features),
        }  # fmt: skip


def names_both(logits: torch.Tensor, kinds: list[tuple[int, ...]]) -> torch.Tensor:
    """Whether the likeliest objects are the ones that the prompt names: bool [N]."""
    fits = []
    for row, wanted in zip(logits, kinds, strict=True):
        likeliest = row.topk(len(set(wanted))).indices.tolist()
        fits.append(set(likeliest) == set(wanted))
    return torch.tensor(fits)


def write(
    state: dict[str, torch.Tensor], seen: dict[str, torch.Tensor], names: Iterable[str]
) -> None:
    """Writes the classifier for git, with the features of the real pictures that it compares with.

    state: of a trained Classifier. seen: as `learn.labelled` gives it, of the collections `names`
    in their order. The scenes that went through the VAE are the real ones, because no sampler can
    do better than its VAE.
    """
    model = Classifier().eval()
    model.load_state_dict({name: tensor.float().cpu() for name, tensor in state.items()})
    kept = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    for number, name in enumerate(names):
        real = seen["pictures"][seen["collection"] == number][: 2 * REAL.get(name, 1_000) : 2]
        with torch.no_grad():
            parts = [model.features(part.cpu().float() / 255) for part in real.split(100)]
        kept[f"real.{name}"] = torch.cat(parts).half()
    save_file(kept, CLASSIFIER)


class Judge:
    """The shipped classifier, and what it sees in real pictures after the demo model's VAE.

    collection: the pictures that it compares with.
    """

    def __init__(self, collection: str = "3d") -> None:
        state = load_file(CLASSIFIER)
        real = {name: state.pop(name).float() for name in list(state) if name.startswith("real.")}
        self.real = real[f"real.{collection}"]
        self.moments = moments(self.real)
        model = Classifier().eval()
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, SIZE, SIZE] in 0..1 -> [N, FEATURES] on the CPU."""
        parts = images.split(100)
        return torch.cat([self.model.features(part.to(self.device)).cpu() for part in parts])

    @torch.no_grad()
    def logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features -> logits of each head, [N, classes]."""
        heads = self.model.heads(features.to(self.device))
        return {name: value.cpu() for name, value in heads.items()}

    def distance(self, features: torch.Tensor) -> float:
        """Frechet distance of a sample's features to the real ones, its size allowed for."""
        return unbiased(features, self.moments)

    def precision(self, features: torch.Tensor) -> float:
        """The share of drawn pictures among the real ones."""
        return share_inside(features, self.real[: len(features)])

    def recall(self, features: torch.Tensor) -> float:
        """The share of real pictures among the drawn ones. Needs as many of these each time."""
        return share_inside(self.real[: len(features)], features)

    def hand(self, features: torch.Tensor, name: str) -> float:
        """The share of pictures that the classifier takes for a drawing of this hand."""
        number = list(world.HANDS).index(name)
        return float((self.logits(features)["hand"].argmax(1) == number).float().mean())

    def accuracy(self, features: torch.Tensor, kinds: list[tuple[int, ...]]) -> float:
        """The share of pictures in which the classifier sees what the prompt names."""
        return float(names_both(self.logits(features)["object"], kinds).float().mean())
