"""Chains whose energy and moves work on arrays: a host's, moved by compiled loops.

A host evaluates small systems in microseconds, in which torch does a few operations. Proposals
and decisions are here what they are in `transition`, bit by bit, without tensors on the way.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.switch import compiled_kernels, under_transform
from mdgraft.montecarlo.moves._rotations import loops
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.montecarlo.transition import checked


class EvaluatesArrays(Protocol):
    """An energy of positions and boxes alone that a host computes from arrays."""

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """Energies ``(C,)`` [kJ/mol] of ``(C, N, 3)`` and ``(C, 3, 3)`` [nm], float64."""


class MovesArrays(Protocol):
    """A move of positions alone whose ratio is one, as a function of arrays."""

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """See `AbstractMove.draw`."""

    def moved_arrays(self, positions: np.ndarray, noise: Noise) -> np.ndarray:
        """Proposed positions ``(C, N, 3)``, float64; the same as those of ``apply``."""


def work_on_arrays(target: Target, moves: AbstractMove, state: ChainState) -> bool:
    """Whether `ArrayChains` can run these chains."""
    x = state.positions
    return (
        _own(target.energy, "__call__", "energies_of_arrays")
        and all(
            _own(move, "apply", "moved_arrays")
            for update in moves.updates
            for move in (update, *update.components)
        )
        and type(target) is Target
        and target.sites is None
        and target.pressure is None
        and state.present is None
        and not state.discrete
        and x.dtype == torch.float64
        and x.device.type == "cpu"
        and compiled_kernels(x)
        and not under_transform()
    )


def _own(thing: object, *methods: str) -> bool:
    """Whether its very class defines both: who changes one in a subclass may mean both."""
    return all(name in vars(type(thing)) for name in methods)


class ArrayChains:
    """C chains as arrays.

    Parameters
    ----------
    target
        The distribution, whose energy evaluates arrays.
    state
        Where the chains are.
    """

    def __init__(self, target: Target, state: ChainState) -> None:
        assert state.energies is not None
        self._energy, self._beta = cast(EvaluatesArrays, target.energy), target.beta
        #: The last state that went in or out.
        self.known = state
        self._x = np.ascontiguousarray(state.positions.numpy()).copy()
        self._energies = state.energies.numpy().copy()
        self._boxes = None if state.box is None else state.box.double().numpy()

    def update(
        self, move: MovesArrays, generator: torch.Generator, acceptances: np.ndarray
    ) -> Noise:
        """One update of every chain; ``acceptances`` ``(C,)`` are counted on.

        Returns the random numbers of the proposal.

        Raises
        ------
        SimulationError
            If an energy is NaN or ``-inf``.
        InvalidInputError
            If there is not one energy for each chain.
        """
        noise = move.draw(self.known, generator)
        log_u = uniform(self.known, generator).log().numpy()
        proposed = move.moved_arrays(self._x, noise)
        energies = np.asarray(self._energy.energies_of_arrays(proposed, self._boxes), np.float64)
        if energies.shape != self._energies.shape:
            # Compiled loops look at no shape.
            raise InvalidInputError(
                f"energy: energies_of_arrays returned shape {energies.shape}, wanted "
                f"{self._energies.shape}, one energy for each chain"
            )
        good = loops().decide(
            self._x, self._energies, proposed, energies, log_u, self._beta, acceptances
        )
        if not good:
            checked(torch.from_numpy(energies), "of a proposal")
        return noise

    def state(self, step: int) -> ChainState:
        """What the chains are in, after so many steps."""
        self.known = self.known.replace(
            positions=torch.from_numpy(self._x.copy()),
            energies=torch.from_numpy(self._energies.copy()),
            forces=None,
            step=step,
        )
        return self.known
