"""Exchanges of unlike particles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves._molecules import (
    Groups,
    MoleculesLike,
    available,
    gather,
    shift,
)
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, pick, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class IdentitySwap(AbstractMove):
    """Exchange two molecules, or two sites of a lattice, that are of different species.

    The first is uniform among all, the second among those that differ from it. The composition
    does not change, so that the way back is as likely.

    Parameters
    ----------
    species
        Which species each molecule is of, for potentials that know particles by their index:
        the two exchange their positions. Leave out for a lattice.
    molecules
        Indices of the particles of each molecule, whose geometric centres are exchanged; by default
        each particle is one.
    variable
        Name of a discrete variable ``(C, ...)``, two entries of which are exchanged, as in
        Kawasaki's dynamics.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        If both or neither of ``species`` and ``variable`` are given.
    """

    def __init__(
        self,
        *,
        species: Sequence[int] | Tensor | None = None,
        molecules: MoleculesLike | None = None,
        variable: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if (species is None) == (variable is None):
            raise InvalidInputError(
                "species: wanted the species of each molecule, or variable= the name of a discrete "
                "variable, and not both"
            )
        self.species = None if species is None else torch.as_tensor(species)
        self.variable = variable
        self.molecules = None if molecules is None else Groups("molecules", molecules)

    def _groups(self, state: ChainState) -> Groups:
        return Groups.singles(state) if self.molecules is None else self.molecules

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for unlike numbers of molecules, or a variable that does not exist."""
        if self.variable is not None:
            value = state.discrete.get(self.variable)
            if value is None or value.ndim < 2:
                raise InvalidInputError(
                    f"variable: no discrete variable {self.variable!r} of shape (chains, sites); "
                    f"there are {sorted(state.discrete)}"
                )
            return
        groups = self._groups(state)
        groups.check(state, places=True)
        assert self.species is not None
        if self.species.shape != (len(groups),) or self.species.is_floating_point():
            raise InvalidInputError(
                f"species: got {self.species.dtype} of shape {tuple(self.species.shape)}, wanted "
                f"{len(groups)} integers, one for each molecule"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those within a molecule; all where a variable changes."""
        if self.variable is not None:
            return torch.ones(len(pairs), dtype=torch.bool)
        return self._groups(state).keeps(pairs, state)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which two, ``(C,)`` each."""
        return {"first": uniform(state, generator), "second": uniform(state, generator)}

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one. Impossible where all are alike."""
        if self.variable is not None:
            kinds = state.discrete[self.variable].flatten(1)
            there = torch.ones_like(kinds, dtype=torch.bool)
        else:
            assert self.species is not None
            kinds = self.species.to(state.positions.device).expand(state.n_chains, -1)
            there = available(state, kinds.shape[1])
        first = pick(noise["first"], there)
        unlike = there & (kinds != kinds.gather(1, first[:, None]))
        second = pick(noise["second"], unlike)
        possible = unlike.any(dim=1)
        # Where there is no partner the first one is exchanged with itself.
        second = torch.where(possible, second, first)
        return Proposal(
            state=self._exchanged(state, kinds, first, second),
            log_ratio=noise["first"].new_zeros(state.n_chains).masked_fill(~possible, -torch.inf),
        )

    def _exchanged(
        self, state: ChainState, kinds: Tensor, first: Tensor, second: Tensor
    ) -> ChainState:
        if self.variable is not None:
            both = torch.stack((first, second), dim=1)
            swapped = kinds.scatter(1, both, kinds.gather(1, both.flip(1)))
            shape = state.discrete[self.variable].shape
            return state.replace(discrete={**state.discrete, self.variable: swapped.reshape(shape)})
        x = state.positions
        if self.molecules is None:
            both = torch.stack((first, second), dim=1)
            return state.replace(
                positions=x.scatter(1, both[..., None].expand(-1, -1, 3), gather(x, both.flip(1)))
            )
        centres = self.molecules.centres(x)
        by = gather(centres, second[:, None]) - gather(centres, first[:, None])
        for which, step in ((first, by), (second, -by)):
            rows, mask = self.molecules.rows(which, x)
            x = shift(x, rows, step * mask)
        return state.replace(positions=x)
