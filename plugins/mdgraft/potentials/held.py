"""What a host holds fixed while particles move."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Distances between particles, and particles, that a host's dynamics never changes.

    Energies know nothing of them; whoever moves particles has to.

    Attributes
    ----------
    pairs
        ``(P, 2)`` int64: particles whose distance is held.
    lengths
        ``(P,)`` float64 [nm].
    pinned
        ``(F,)`` int64: particles that stay where they are.
    """

    pairs: Tensor
    lengths: Tensor
    pinned: Tensor

    @staticmethod
    def of(
        pairs: Sequence[tuple[int, int]], lengths: Sequence[float], pinned: Iterable[int]
    ) -> Held | None:
        """From plain numbers; None where nothing is held."""
        fixed = sorted({int(i) for i in pinned})
        if not pairs and not fixed:
            return None
        return Held(
            pairs=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
            lengths=torch.tensor(lengths, dtype=torch.float64),
            pinned=torch.tensor(fixed, dtype=torch.long),
        )

    @property
    def rows(self) -> Tensor:
        """Everything as pairs ``(P + F, 2)``, with -1 for a point that stays where it is."""
        still = torch.full_like(self.pinned, -1)
        return torch.cat((self.pairs, torch.stack((self.pinned, still), dim=1)))

    @property
    def hinges(self) -> Tensor:
        """The other ends of any two distances that share a particle, ``(H, 2)``.

        Angles between constraints, on which their metric depends, stay if these distances do.
        """
        partners: dict[int, list[int]] = {}
        for i, j in self.pairs.tolist():
            partners.setdefault(i, []).append(j)
            partners.setdefault(j, []).append(i)
        ends = [pair for found in partners.values() for pair in itertools.combinations(found, 2)]
        return torch.tensor(ends, dtype=torch.long).reshape(-1, 2)

    def shifted(self, particles: Tensor) -> Held:
        """The same of particles that have other indices, ``particles[i]`` for i."""
        return dataclasses.replace(self, pairs=particles[self.pairs], pinned=particles[self.pinned])

    def errors(self, positions: Tensor) -> Tensor:
        """Relative errors of the distances ``(C, P)`` at positions ``(C, N, 3)`` [nm]."""
        first, second = self.pairs.to(positions.device).unbind(dim=1)
        lengths = self.lengths.to(positions.device)
        found = (positions[:, first] - positions[:, second]).double().norm(dim=-1)
        error: Tensor = (found - lengths).abs() / lengths.clamp(min=1e-12)
        return error
