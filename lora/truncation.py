"""What a vector loses when its ranks are lowered, in total and by parts of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .blocks import group_of

Energies = tuple[float, float]
"""(the squared Frobenius norm of the part that is left out, that of the full change)"""


@dataclass(frozen=True)
class Truncation:
    """What each module loses, by its canonical name.

    Attributes:
        energies: of each module.
        ranks: (before, after). Before is the sum of the ranks, or the smaller side of the layer if
            its change had no factors.
    """

    energies: Mapping[str, Energies]
    ranks: Mapping[str, tuple[int, int]]

    @property
    def energy(self) -> float:
        """The share of the squared norm that is kept, 0 to 1, over all modules."""
        return 1.0 - _lost_share(self.energies.values())

    @property
    def error(self) -> float:
        """The relative error in the Frobenius norm, over all modules."""
        return _lost_share(self.energies.values()) ** 0.5

    def __str__(self) -> str:
        before, after = zip(*self.ranks.values(), strict=True)
        lines = [
            f"Rank {_range(before)} becomes {_range(after)}, {sum(after) / len(after):.1f} on "
            f"average: {100 * self.energy:.3f} % of the energy kept, relative error "
            f"{self.error:.2e}."
        ]
        groups: dict[str, list[Energies]] = {}
        for name, energies in self.energies.items():
            groups.setdefault(group_of(name), []).append(energies)
        lines += [
            f"  {group}: error {_lost_share(members) ** 0.5:.2e} in {len(members)} modules"
            for group, members in sorted(groups.items())
        ]
        worst = max(self.energies, key=lambda name: _lost_share([self.energies[name]]))
        lines.append(f"  at worst {_lost_share([self.energies[worst]]) ** 0.5:.2e}, in {worst}")
        return "\n".join(lines)


def _lost_share(energies: Collection[Energies]) -> float:
    """The share of the summed energy that is left out; 0 if there is no energy."""
    lost, total = (sum(column) for column in zip(*energies, strict=True))
    return max(0.0, lost / total) if total else 0.0


def _range(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
