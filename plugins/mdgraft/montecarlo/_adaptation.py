"""Sizes of moves that bring their acceptance to what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.state import ChainState

# Beyond which a scale has lost touch with what the user had in mind, relative.
_LARGEST = 1e3


class Adaptation:
    """A stochastic approximation for each move (Robbins and Monro, 1951).

    Parameters
    ----------
    moves
        Single moves, each with the scale that it starts from.

    Attributes
    ----------
    steps
        How often the scale of each has been changed.
    """

    def __init__(self, moves: Sequence[AbstractMove]) -> None:
        self._moves = list(moves)
        self._initial = [
            float(m.scale.detach()) if m.has_scale and m.target_acceptance is not None else None
            for m in moves
        ]
        self.steps = [0] * len(self._moves)

    def scale(self, k: int, scale: float, log_alpha: np.ndarray, state: ChainState) -> float:
        """The next scale of a move.

        Parameters
        ----------
        k
            Its place among the moves.
        scale
            That of the proposals.
        log_alpha
            Logarithms of their acceptance ratios, one or more.
        state
            The chains.
        """
        move, initial = self._moves[k], self._initial[k]
        if initial is None or move.target_acceptance is None:
            return scale
        self.steps[k] += 1
        gain = 2.0 / self.steps[k] ** 0.6
        change = math.exp(gain * (_acceptance(log_alpha) - move.target_acceptance))
        return min(scale * change, move.largest_scale(state), _LARGEST * initial)


def _acceptance(log_alpha: np.ndarray) -> float:
    """Mean of ``min(1, alpha)``, where NaN is what cannot be."""
    if len(log_alpha) == 1:
        # A tenth of the time, in which a host evaluates a small system.
        value = float(log_alpha[0])
        return 0.0 if math.isnan(value) else math.exp(min(value, 0.0))
    probability = np.exp(np.minimum(log_alpha, 0.0))
    probability[np.isnan(probability)] = 0.0
    return float(probability.mean())
