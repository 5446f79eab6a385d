"""What a host holds fixed while particles move."""

from __future__ import annotations

import dataclasses
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

    def shifted(self, particles: Tensor) -> Held:
        """The same of particles that have other indices, ``particles[i]`` for i."""
        return dataclasses.replace(
            self, pairs=particles[self.pairs], pinned=particles[self.pinned]
        )

    def errors(self, positions: Tensor) -> Tensor:
        """Relative errors of the distances ``(C, P)`` at positions ``(C, N, 3)`` [nm]."""
        first, second = self.pairs.to(positions.device).unbind(dim=1)
        lengths = self.lengths.to(positions.device)
        found = (positions[:, first] - positions[:, second]).double().norm(dim=-1)
        error: Tensor = (found - lengths).abs() / lengths.clamp(min=1e-12)
        return error
