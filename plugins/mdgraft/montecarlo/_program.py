"""The moves of a step as tables of numbers for compiled loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

import numpy as np

from mdgraft.montecarlo._numbers import RandomNumbers
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.moves.mixture import Mixture
from mdgraft.montecarlo.state import ChainState


class MovesGroups(Protocol):
    """A move that compiled loops can make."""

    def motion(self, state: ChainState) -> Motion:
        """What it does, bit by bit, in chains of these shapes with every molecule present."""


def own(thing: object, *methods: str) -> bool:
    """Whether its very class defines all of them: who changes one in a subclass may mean all."""
    instance = getattr(thing, "__dict__", {})
    return all(name in vars(type(thing)) and name not in instance for name in methods)


def compilable(moves: AbstractMove) -> bool:
    """Whether compiled loops can make each of these moves."""
    return all(
        update.adjusted
        and (type(update) is Mixture or update.components == (update,))
        and all(own(move, "draw", "apply", "motion") for move in update.components)
        for update in moves.updates
    )


class Update(NamedTuple):
    """One update, by a move or a mixture of P moves; see `mdgraft.kernels.fused.chains.propose`."""

    #: ``(P, 7)``.
    motions: np.ndarray
    #: Random numbers that it may use.
    n_numbers: int


class Program:
    """One step of C chains.

    Parameters
    ----------
    moves
        Those of the step, which must be `compilable`.
    state
        Any state of the chains, for its shapes.
    rows
        In which row each single move is counted, by its id.

    Attributes
    ----------
    updates
        In order.
    scales
        Of each single move, by the row in which it is counted.
    groups
        Of all moves; see `mdgraft.kernels.fused.chains.propose`.
    numbers
        The random numbers of steps.
    """

    def __init__(self, moves: AbstractMove, state: ChainState, rows: Mapping[int, int]) -> None:
        self._moves = {rows[id(m)]: m for update in moves.updates for m in update.components}
        motions = {row: cast(MovesGroups, m).motion(state) for row, m in self._moves.items()}
        self.groups, first = _table(motions)
        self.updates: list[Update] = []
        self.scales = dict.fromkeys(motions, 1.0)
        #: Where each scale is.
        self._places: dict[int, list[np.ndarray]] = {row: [] for row in motions}
        n_numbers = 0
        deciding: list[slice] = []
        for update in moves.updates:
            parts = [rows[id(move)] for move in update.components]
            table = np.zeros((len(parts), 7))
            for p, row in enumerate(parts):
                motion = motions[row]
                table[p, :5] = motion.kind, first[row], len(motion.sizes), motion.numbers, row
                self._places[row].append(table[p, 5:6])
            # Those of the proposals and of the decisions.
            needed = state.n_chains * (int(table[:, 3].sum()) + 1)
            if isinstance(update, Mixture):
                table[:, 6] = update.cumulative.numpy()
                needed += state.n_chains
            self.updates.append(Update(table, needed))
            n_numbers += needed
            deciding.append(slice(n_numbers - state.n_chains, n_numbers))
        if any(len(update.motions) > 1 for update in self.updates):
            # What decides depends on what mixtures choose.
            deciding = [slice(None)]
        self.numbers = RandomNumbers(n_numbers, deciding)

    def take_scales(self) -> None:
        """Go on with the scales that the moves have now."""
        for row, move in self._moves.items():
            if move.has_scale:
                self.rescale(row, float(move.scale.detach()))

    def give_scales(self) -> None:
        """Let the moves have the scales that they have here."""
        for row, move in self._moves.items():
            if move.has_scale and float(move.scale.detach()) != self.scales[row]:
                move.rescale(self.scales[row])

    def rescale(self, row: int, scale: float) -> None:
        """Change the scale of one move, wherever it occurs."""
        self.scales[row] = scale
        for place in self._places[row]:
            place[0] = scale


def _table(motions: Mapping[int, Motion]) -> tuple[np.ndarray, dict[int, int]]:
    """The groups of all motions in one array, and the first group of each."""
    sizes = np.concatenate([motion.sizes for motion in motions.values()])
    bonds = [
        np.zeros((len(motion.sizes), 2)) if motion.bonds is None else motion.bonds
        for motion in motions.values()
    ]
    # Members follow the table.
    ends = 4 * len(sizes) + sizes.cumsum()
    table = np.column_stack((ends - sizes, ends, np.concatenate(bonds))).astype(np.int64)
    first, n_groups = {}, 0
    for row, motion in motions.items():
        first[row] = n_groups
        n_groups += len(motion.sizes)
    return np.concatenate((table.ravel(), *(m.members for m in motions.values()))), first
