"""Groups of particles of different sizes, as padded tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves.base import pick
from mdgraft.montecarlo.state import ChainState

#: Indices of the particles of each molecule.
MoleculesLike = Sequence[Sequence[int]]


class Groups:
    """M groups of particles, each a row of a table padded to the largest.

    Attributes
    ----------
    index
        ``(M, K)`` int64, padded with zeros.
    mask
        ``(M, K)`` booleans: which entries are meant; the first ones of each row.
    """

    def __init__(self, name: str, groups: MoleculesLike) -> None:
        rows = [[int(i) for i in group] for group in groups]
        if not rows or not all(rows):
            raise InvalidInputError(
                f"{name}: got {len(rows)} groups, wanted some, none of them empty"
            )
        for row in rows:
            if min(row) < 0 or len(set(row)) != len(row):
                raise InvalidInputError(
                    f"{name}: {row[:6]} holds an index twice, or a negative one"
                )
        width = max(map(len, rows))
        self.index = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])
        self._name = name
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def singles(cls, state: ChainState) -> Groups:
        """Every particle a molecule of its own."""
        made = cls.__new__(cls)
        made.index = torch.arange(state.n_particles)[:, None]
        made.mask = torch.ones_like(made.index, dtype=torch.bool)
        made._name = "particles"
        made._arrays = None
        return made

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`index`, and the number of particles of each group ``(M,)``, for compiled loops."""
        if self._arrays is None:
            self._arrays = self.index.numpy(), self.mask.sum(dim=1).numpy()
        return self._arrays

    def motion(self, kind: int, numbers: int, bonds: Tensor | None = None) -> Motion:
        """One group at random moves."""
        members = self.index[self.mask].numpy()
        return Motion(
            kind=kind,
            numbers=1 + numbers,
            members=members,
            sizes=self.mask.sum(dim=1).numpy(),
            bonds=None if bonds is None else bonds.numpy(),
        )

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def check(self, state: ChainState, *, places: bool = False, disjoint: bool = True) -> None:
        """Raise for indices that the state lacks, or molecules that overlap.

        With ``places``, and if the number of molecules varies, there must be one for each place.
        """
        used = self.index[self.mask]
        if int(used.max()) >= state.n_particles:
            raise InvalidInputError(
                f"{self._name}: got index {int(used.max())}, wanted indices below "
                f"{state.n_particles}"
            )
        if disjoint and len(set(used.tolist())) != len(used):
            raise InvalidInputError(f"{self._name}: a particle occurs in two of them")
        if places and state.present is not None and len(self) != state.present.shape[1]:
            raise InvalidInputError(
                f"{self._name}: got {len(self)}, wanted one for each of the "
                f"{state.present.shape[1]} places of state.present"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Which distances stay when groups move as rigid bodies; see `AbstractMove.keeps`."""
        owner = torch.full((state.n_particles + 1,), -1)
        number = torch.arange(len(self))[:, None].expand_as(self.index)
        owner[self.index[self.mask]] = number[self.mask]
        first, second = owner[pairs].unbind(dim=1)
        return first == second

    def choose(self, state: ChainState, u: Tensor) -> tuple[Tensor, Tensor]:
        """One group that is there for each chain ``(C,)``, by uniform numbers; and if there is."""
        if state.present is None:
            which = (u * len(self)).long().clamp_(max=len(self) - 1)
            return which, torch.ones_like(which, dtype=torch.bool)
        return pick(u, state.present), state.present.any(dim=1)

    def rows(self, which: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Particle indices ``(C, K)`` and mask ``(C, K, 1)`` of one group for each chain."""
        index, mask = self.index.to(like.device), self.mask.to(like.device)
        return index[which], mask[which][..., None]

    def arms(self, positions: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Particles of one group for each chain ``(C, K)``, and where they are ``(C, K, 3)``.

        Relative to the geometric centre of the group; zero where there is no particle.
        """
        rows, mask = self.rows(which, positions)
        members, weights = gather(positions, rows), mask.to(positions)
        centre = (members * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        return rows, (members - centre) * weights

    def centres(self, positions: Tensor) -> Tensor:
        """Geometric centres ``(C, M, 3)`` of all groups."""
        index, mask = self.index.to(positions.device), self.mask.to(positions)
        summed = (positions[:, index] * mask[..., None]).sum(dim=2)
        return summed / mask.sum(dim=1)[:, None]


def gather(positions: Tensor, rows: Tensor) -> Tensor:
    """Positions ``(C, K, 3)`` of the particles ``(C, K)``."""
    return positions.gather(1, rows[..., None].expand(-1, -1, 3))


def shift(positions: Tensor, rows: Tensor, by: Tensor) -> Tensor:
    """Positions with ``by`` ``(C, K, 3)`` added to the particles ``(C, K)``."""
    return positions.scatter_add(1, rows[..., None].expand(-1, -1, 3), by)


def available(state: ChainState, n_groups: int) -> Tensor:
    """Which molecules there are ``(C, M)``."""
    if state.present is not None:
        return state.present
    return torch.ones(state.n_chains, n_groups, dtype=torch.bool, device=state.positions.device)
