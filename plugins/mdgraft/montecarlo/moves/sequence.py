"""Several moves one after the other."""

from __future__ import annotations

import collections.abc
from typing import Self

import torch

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Sequence(AbstractMove):
    """In each step, every move once and in this order, each accepted or rejected by itself.

    Each keeps the distribution, so all of them do; the whole has no detailed balance, which
    averages do not need. A move may occur several times.

    Parameters
    ----------
    moves
        Moves, mixtures, or sequences, whose moves are taken one by one.

    Raises
    ------
    InvalidInputError
        For no moves.
    """

    def __init__(self, moves: collections.abc.Sequence[AbstractMove]) -> None:
        super().__init__()
        for move in moves:
            if not isinstance(move, AbstractMove):
                raise InvalidInputError(f"moves: got {type(move).__name__}, wanted moves")
        self._moves = [update for move in moves for update in move.updates]
        if not self._moves:
            raise InvalidInputError("moves: got none, wanted one or more")

    @property
    def updates(self) -> tuple[AbstractMove, ...]:
        """The moves."""
        return tuple(self._moves)

    @property
    def components(self) -> tuple[AbstractMove, ...]:
        """The components of all moves, each once."""
        found = {id(c): c for move in self._moves for c in move.components}
        return tuple(found.values())

    @property
    def adjusted(self) -> bool:  # type: ignore[override]
        """Whether all of them are accepted or rejected."""
        return all(move.adjusted for move in self._moves)

    def copied(self) -> Self:
        """A copy with copies of the moves; what occurs twice still does."""
        made = super().copied()
        copies = {id(move): move.copied() for move in self._moves}
        made._moves = [copies[id(move)] for move in self._moves]
        return made

    def check(self, state: ChainState, target: Target) -> None:
        """Check each move."""
        for move in self._moves:
            move.check(state, target)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Raise: a sequence is several updates."""
        raise InvalidInputError("moves: a Sequence is several updates; go through its updates")

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Raise: a sequence is several updates."""
        raise InvalidInputError("moves: a Sequence is several updates; go through its updates")
