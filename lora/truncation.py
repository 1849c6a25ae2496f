"""What an approximation of a vector leaves out, told as a whole and by parts of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .blocks import group_of


@dataclass(frozen=True)
class Loss:
    """Per module, by its canonical name.

    Attributes:
        energies: (squared Frobenius norm of what is left out, of the whole).
        ranks: (before, after); before is the stacked rank, or the layer's size where there is none.
    """

    energies: Mapping[str, tuple[float, float]]
    ranks: Mapping[str, tuple[int, int]]

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept, 0 to 1, over all modules."""
        return 1.0 - _share(self.energies.values())

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm, over all modules."""
        return _share(self.energies.values()) ** 0.5

    def __str__(self) -> str:
        before, after = zip(*self.ranks.values(), strict=True)
        lines = [
            f"Rank {_range(before)} becomes {_range(after)}, {sum(after) / len(after):.1f} on "
            f"average: {100 * self.energy:.3f} % of the energy kept, relative error "
            f"{self.error:.2e}."
        ]
        groups: dict[str, list[tuple[float, float]]] = {}
        for name, pair in self.energies.items():
            groups.setdefault(group_of(name), []).append(pair)
        lines += [
            f"  {group}: error {_share(pairs) ** 0.5:.2e} in {len(pairs)} modules"
            for group, pairs in sorted(groups.items())
        ]
        worst = max(self.energies, key=lambda name: _share([self.energies[name]]))
        lines.append(f"  at worst {_share([self.energies[worst]]) ** 0.5:.2e}, in {worst}")
        return "\n".join(lines)


def _share(pairs) -> float:
    """Lost of whole, summed; 0 where there is nothing to lose."""
    lost, whole = (sum(column) for column in zip(*pairs, strict=True))
    return max(0.0, lost / whole) if whole else 0.0


def _range(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
