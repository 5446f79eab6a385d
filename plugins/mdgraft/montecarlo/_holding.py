"""Moves of particles whose distances, or places, a host holds fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, WrongEnsembleError
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.potentials.held import Held

# Relative: what rounding in files of coordinates leaves of a length.
_LENGTH = 5e-3
# Particles that stay must do so to this accuracy [nm].
_PLACE = 1e-5

_INSTEAD = (
    "use moves that keep them: Translation, Rotation and Volume with whole molecules, Torsion, "
    "Displacement(particles=) of others, or mdgraft_openmm.HybridMonteCarlo; or an energy without "
    "constraints; or Target(..., ignore_constraints=True) to sample all positions as if free"
)


class Holding:
    """Sees to it that chains keep what the energy's host, or trajectories by a host, hold fixed.

    Parameters
    ----------
    target, moves, state
        The distribution, the single moves, and where the chains start.

    Raises
    ------
    WrongEnsembleError
        If a move changes distances, or moves particles, that are held; or if trajectories hold
        distances although the target is to ignore constraints.
    InvalidInputError
        If the chains start from other distances.
    """

    def __init__(self, target: Target, moves: Sequence[AbstractMove], state: ChainState) -> None:
        found = [target.held, *(move.held for move in moves)]
        self._held = [held for held in found if held is not None]
        if target.ignore_constraints:
            _check_free(moves)
            self._held = []
        #: Names of the moves whose updates have to be looked at.
        self._watched: set[str] = set()
        for held in self._held:
            for move in moves:
                kept = _kept(move, held.rows, state)
                if kept is None:
                    self._watch(move, state)
                elif not bool(kept.all()):
                    raise _refusal(move.name, held, kept)
        if self._held:
            _check_one_law(moves, state)
        self._start = state.positions
        self.check_lengths(state)

    def _watch(self, move: AbstractMove, state: ChainState) -> None:
        if state.present is not None:
            raise WrongEnsembleError(
                f"moves: {move.name} does not say which distances it keeps, while a host holds "
                "some fixed and molecules come and go; define its method keeps()"
            )
        self._watched.add(move.name)

    @property
    def watches(self) -> bool:
        """Whether some updates have to be looked at."""
        return bool(self._watched)

    def check_lengths(self, state: ChainState) -> None:
        """Raise unless a state has the distances that are held."""
        if state.present is not None:
            # Molecules that are absent are anywhere; those that come are as their template is.
            return
        for held in self._held:
            wrong = held.errors(state.positions) > _LENGTH
            if bool(wrong.any()):
                chain, k = wrong.nonzero()[0].tolist()
                i, j = held.pairs[k].tolist()
                x = state.positions[chain]
                raise InvalidInputError(
                    f"state: particles {i} and {j} of chain {chain} are "
                    f"{float((x[i] - x[j]).norm()):.6g} nm apart, but their host holds them at "
                    f"{float(held.lengths[k]):.6g} nm, one of {len(held.pairs)} constraints; apply "
                    "the constraints and make molecules whole before sampling"
                )

    def look(self, update: AbstractMove, state: ChainState) -> None:
        """Raise if an update by moves that cannot say what they keep has led to something else."""
        if not self.watches:
            return
        names = [move.name for move in update.components if move.name in self._watched]
        if not names:
            return
        for held in self._held:
            there, here = (x[:, held.pinned] for x in (self._start, state.positions))
            moved = (there - here).abs().amax(dim=-1) > _PLACE
            off = torch.cat((held.errors(state.positions) > _LENGTH, moved), dim=1).any(dim=0)
            if bool(off.any()):
                raise _refusal(" or ".join(names), held, ~off.cpu())


def _kept(move: AbstractMove, pairs: Tensor, state: ChainState) -> Tensor | None:
    """Which distances a move keeps; None if it cannot say.

    What a class says of its proposals is not true of those that a subclass makes.
    """
    for kind in type(move).__mro__:
        if "keeps" in vars(kind):
            break
        if "apply" in vars(kind):
            return None
    return move.keeps(pairs, state)


def _check_free(moves: Sequence[AbstractMove]) -> None:
    """Raise for trajectories that hold distances where positions are to be sampled as if free."""
    for move in moves:
        # Particles that trajectories leave in place are for other moves to move.
        if move.held is not None and len(move.held.pairs):
            raise WrongEnsembleError(
                f"ignore_constraints: trajectories of {move.name} hold {len(move.held.pairs)} "
                "distances fixed, so that positions are not sampled as if free; leave it out, or "
                "make the move from the energy of a System without constraints"
            )


def _check_one_law(moves: Sequence[AbstractMove], state: ChainState) -> None:
    """Raise if trajectories and other moves would sample different laws.

    That of rigid dynamics has a factor of the constraints' metric, which depends on the angles
    between constraints; moves that change these do not know of it.
    """
    for trajectories in moves:
        if trajectories.held is None:
            continue
        hinges = trajectories.held.hinges
        for move in moves:
            kept = _kept(move, hinges, state) if move.held is None else None
            if kept is not None and not bool(kept.all()):
                i, j = hinges[~kept][0].tolist()
                raise WrongEnsembleError(
                    f"moves: {move.name} changes angles between constraints that share a particle "
                    f"(whose other ends are {i} and {j}), and with them the metric factor that "
                    f"the law of {trajectories.name} has and its own has not; leave out one of "
                    "the two, or constrain bonds alone"
                )


def _refusal(name: str, held: Held, kept: Tensor) -> WrongEnsembleError:
    lost = held.rows[~kept].tolist()
    pairs = [(i, j) for i, j in lost if j >= 0]
    pins = [i for i, j in lost if j < 0]
    what = []
    if pairs:
        i, j = pairs[0]
        what.append(
            f"changes {len(pairs)} of the {len(held.pairs)} distances that the host constrains "
            f"(that of particles {i} and {j} is the first)"
        )
    if pins:
        what.append(
            f"moves {len(pins)} of the {len(held.pinned)} particles that the host keeps in place "
            f"(particle {pins[0]} is the first)"
        )
    return WrongEnsembleError(f"moves: {name} {' and '.join(what)}; {_INSTEAD}")
