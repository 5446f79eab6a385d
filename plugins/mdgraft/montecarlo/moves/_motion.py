"""How a move moves groups of particles, as compiled loops want to know it."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Motion:
    """One of G groups of particles moves by normal numbers times the scale of the move.

    The proposal is symmetric, and depends on positions alone.

    Attributes
    ----------
    kind
        How the particles of the group move, one of those in `mdgraft.kernels.fused.chains`.
    numbers
        Random numbers of a chain. Where groups do not move apart, the first says which group.
    members
        Particles of all groups, one group after the other.
    sizes
        ``(G,)``.
    bonds
        ``(G, 2)`` to turn about, or None.
    """

    kind: int
    numbers: int
    members: np.ndarray
    sizes: np.ndarray
    bonds: np.ndarray | None = None
