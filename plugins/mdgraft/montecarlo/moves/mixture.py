"""One of several moves, chosen at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Mixture(AbstractMove):
    """Each chain chooses one of several moves, with fixed probabilities.

    Probabilities that do not depend on the state keep the detailed balance of each move.

    Parameters
    ----------
    moves
        The moves; those of a mixture among them are taken one by one.
    probabilities
        One for each, positive; they are normalised. Equal by default.

    Raises
    ------
    InvalidInputError
        For no moves, a `Sequence`, a move that takes every proposal, or wrong probabilities.
    """

    def __init__(
        self, moves: Sequence[AbstractMove], probabilities: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        moves = list(moves)
        weights = [1.0] * len(moves) if probabilities is None else [float(p) for p in probabilities]
        if not moves or len(weights) != len(moves) or not all(0.0 < p < 1e300 for p in weights):
            raise InvalidInputError(
                f"probabilities: got {weights} for {len(moves)} moves, wanted a positive number "
                "for each"
            )
        self._moves: list[AbstractMove] = []
        shares: list[float] = []
        for move, weight in zip(moves, weights, strict=True):
            if not isinstance(move, AbstractMove) or len(move.updates) != 1 or not move.adjusted:
                raise InvalidInputError(
                    f"moves: {type(move).__name__} cannot be in a mixture; wanted moves that are "
                    "each accepted or rejected once"
                )
            if isinstance(move, Mixture):
                self._moves += move.components
                shares += [weight * p for p in move.probabilities]
            else:
                self._moves.append(move)
                shares.append(weight)
        #: Probability of each component.
        self.probabilities: tuple[float, ...] = tuple(share / sum(weights) for share in shares)
        #: Probability of each component or one before it ``(K,)``, float64.
        self.cumulative = torch.tensor(self.probabilities, dtype=torch.float64).cumsum(0)
        self._bounds = self.cumulative[:-1]

    @property
    def components(self) -> tuple[AbstractMove, ...]:
        """The moves."""
        return tuple(self._moves)

    def copied(self) -> Self:
        """A copy with copies of the moves."""
        made = super().copied()
        made._moves = [move.copied() for move in self._moves]
        return made

    def check(self, state: ChainState, target: Target) -> None:
        """Check each move."""
        for move in self._moves:
            move.check(state, target)

    def choice(self, noise: Noise) -> Tensor:
        """Which component each chain has chosen ``(C,)``."""
        return torch.bucketize(noise["choice"], self._bounds.to(noise["choice"].device), right=True)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """The choice ``(C,)``, and the noise of every move that some chain chose."""
        noise = {"choice": uniform(state, generator)}
        for k in sorted(set(self.choice(noise).tolist())):
            drawn = self._moves[k].draw(state, generator)
            noise |= {f"{k}.{name}": value for name, value in drawn.items()}
        return noise

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """The proposal of the move that each chain chose."""
        choice = self.choice(noise)
        chosen = sorted(set(choice.tolist()))
        if len(chosen) == 1:
            only = self._moves[chosen[0]].apply(state, _of(noise, chosen[0], None), target)
            return Proposal(
                state=only.state,
                log_ratio=only.log_ratio,
                known=only.known,
                before=only.before,
                component=choice,
            )
        unknown = state.positions.new_zeros(state.n_chains, dtype=torch.float64)
        proposed = state.replace(energies=unknown, forces=None)
        log_ratio, known = unknown, torch.zeros_like(choice, dtype=torch.bool)
        for k in chosen:
            (rows,) = (choice == k).nonzero(as_tuple=True)
            part = self._moves[k].apply(state[rows], _of(noise, k, rows), target)
            energies = part.state.energies
            is_known = part.known
            if is_known is None:
                is_known = torch.full_like(rows, energies is not None, dtype=torch.bool)
            if energies is None:
                energies = unknown[rows]
            proposed = proposed.put(rows, part.state.replace(energies=energies, forces=None))
            log_ratio = log_ratio.index_copy(0, rows, part.log_ratio)
            known = known.index_copy(0, rows, is_known)
        return Proposal(state=proposed, log_ratio=log_ratio, known=known, component=choice)


def _of(noise: Noise, k: int, rows: Tensor | None) -> Noise:
    """The noise of one move, for some of the chains."""
    prefix = f"{k}."
    return {
        name.removeprefix(prefix): value if rows is None else value[rows]
        for name, value in noise.items()
        if name.startswith(prefix)
    }
