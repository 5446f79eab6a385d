"""Chains whose energy and moves work on arrays: a host's, moved by compiled loops.

A host evaluates small systems in microseconds, in which torch does a few operations. Proposals
and decisions are here what they are in `transition`, bit by bit, without tensors on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.switch import compiled_kernels, under_transform
from mdgraft.montecarlo._program import Program, compilable, own
from mdgraft.montecarlo.moves._rotations import loops
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.montecarlo.transition import checked

#: The next scale of the move that is counted in a row, from its present scale and the logarithms
#: of the acceptance ratios of its proposals.
NextScale = Callable[[int, float, np.ndarray], float]


class EvaluatesArrays(Protocol):
    """An energy of positions and boxes alone that a host computes from arrays."""

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """Energies ``(C,)`` [kJ/mol] of ``(C, N, 3)`` and ``(C, 3, 3)`` [nm], float64."""


class BindsArrays(EvaluatesArrays, Protocol):
    """One that can be bound to arrays, so that what is the same for many calls is done once."""

    def bound(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        """A function that evaluates what ``positions`` then hold, and writes to ``energies``."""


def work_on_arrays(target: Target, moves: AbstractMove, state: ChainState) -> bool:
    """Whether `ArrayChains` can run these chains."""
    x = state.positions
    return (
        own(target.energy, "__call__", "energies_of_arrays")
        and compilable(moves)
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


class ArrayChains:
    """C chains as arrays.

    Parameters
    ----------
    target
        The distribution, whose energy evaluates arrays.
    program
        The moves of a step.
    state
        Where the chains are.
    """

    def __init__(self, target: Target, program: Program, state: ChainState) -> None:
        assert state.energies is not None
        self._program, self._beta, self._start = program, target.beta, state
        n_chains, n = state.n_chains, state.n_particles
        #: See `mdgraft.kernels.fused.chains.propose`.
        self._places = np.zeros((2, n_chains, n + 1, 3))
        self._places[0, :, :n] = state.positions.numpy()
        self._places[0, :, n, loops().ENERGY] = state.energies.numpy()
        proposed = self._places[1]
        #: Energies of the proposals.
        self._proposed = proposed[:, n, loops().ENERGY]
        boxes = None if state.box is None else state.box.double().numpy()
        self._evaluate = _evaluation(target.energy, proposed[:, :n], boxes, self._proposed)
        self._step = state.step

    def run(
        self,
        n_samples: int,
        stride: int,
        generator: torch.Generator,
        counts: np.ndarray,
        next_scale: NextScale | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples of every chain, ``stride`` steps from one to the next.

        Parameters
        ----------
        n_samples, stride
            Their number T, and that of the steps of each.
        generator
            Of all random numbers.
        counts
            ``(2, R + 1, C)``: attempts and acceptances in R rows, which are counted on, and room
            for one more.
        next_scale
            How scales adapt after each update; None, the default, if they stay.

        Returns
        -------
        tuple of Tensor
            Positions ``(T, C, N, 3)`` [nm] and energies ``(T, C)`` [kJ/mol].

        Raises
        ------
        SimulationError
            If an energy is NaN or ``-inf``, or the host fails. `state`, the generator and the
            counts are then those after the last update.
        InvalidInputError
            If there is not one energy for each chain.
        """
        n_chains, n = self._start.n_chains, self._start.n_particles
        trajectory = np.empty((n_samples, n_chains, n + 1, 3))
        program, evaluate = self._program, self._evaluate
        places, groups, kept = self._places, program.groups, (trajectory, self._beta)
        propose = partial(loops().propose, places, counts, groups)
        decide = partial(loops().decide, places, counts, *kept)
        advance = partial(loops().advance, places, counts, groups, *kept)

        first, *others = program.updates
        following = [*others, first]
        numbers, end = program.numbers, self._step + n_samples * stride
        program.take_scales()
        try:
            table = numbers.draw(generator, end - self._step)
            at, size = propose(first.motions, table, 0), table.shape[1]
            for t in range(n_samples):
                for _ in range(stride):
                    for motions, n_numbers in following:
                        # Those of the next proposal are given back if it is not evaluated.
                        numbers.used = at
                        evaluate()
                        enough = size - at >= n_numbers
                        if enough and next_scale is None:
                            at = advance(motions, table, at, t)
                        elif decide(t):
                            if next_scale is not None:
                                self._adapt(next_scale, counts[0, -1], counts[1, -1])
                            if not enough:
                                left = end - self._step - (motions is first.motions)
                                if not left:
                                    # This was the last update.
                                    continue
                                table = numbers.draw(generator, left)
                                at, size = 0, table.shape[1]
                            at = propose(motions, table, at)
                        else:
                            at = -1
                        if at < 0:
                            checked(torch.from_numpy(self._proposed.copy()), "of a proposal")
                    self._step += 1
        finally:
            numbers.give_back(generator)
            if next_scale is not None:
                program.give_scales()
        return _split(trajectory)

    def _adapt(self, next_scale: NextScale, chosen: np.ndarray, rows: np.ndarray) -> None:
        """Change the scales of the moves that chains chose, after an update."""
        log_alpha = self._places[1, :, -1, loops().LOG_ALPHA]
        taken = dict(zip(chosen.tolist(), rows.tolist(), strict=True))
        for p, row in sorted(taken.items()):
            ratios = log_alpha if len(taken) == 1 else log_alpha[chosen == p]
            self._program.rescale(row, next_scale(row, self._program.scales[row], ratios))

    @property
    def state(self) -> ChainState:
        """Where the chains are now."""
        positions, energies = _split(self._places[0])
        return self._start.replace(
            positions=positions.clone(memory_format=torch.contiguous_format),
            energies=energies.clone(memory_format=torch.contiguous_format),
            forces=None,
            step=self._step,
        )


def _split(tables: np.ndarray) -> tuple[Tensor, Tensor]:
    """Positions ``(..., N, 3)`` and energies ``(...)`` of what compiled loops keep together."""
    positions, energies = tables[..., :-1, :], tables[..., -1, loops().ENERGY]
    return torch.from_numpy(positions), torch.from_numpy(energies)


def _evaluation(
    energy: object,
    positions: np.ndarray,
    boxes: np.ndarray | None,
    energies: np.ndarray,
) -> Callable[[], None]:
    """A function that evaluates what ``positions`` then hold, and writes to ``energies``."""
    if own(energy, "bound"):
        return cast(BindsArrays, energy).bound(positions, boxes, energies)
    evaluates = cast(EvaluatesArrays, energy)

    def evaluate() -> None:
        # A copy: an energy may keep what it was given.
        found = np.asarray(evaluates.energies_of_arrays(positions.copy(), boxes), np.float64)
        if found.shape != energies.shape:
            # Compiled loops look at no shape.
            raise InvalidInputError(
                f"energy: energies_of_arrays returned shape {found.shape}, wanted "
                f"{energies.shape}, one energy for each chain"
            )
        energies[:] = found

    return evaluate
