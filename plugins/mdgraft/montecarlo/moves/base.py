"""What a Monte Carlo move is."""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Self, TypeAlias

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.potentials.held import Held

#: Everything random about a proposal, by name, each ``(C, ...)``, drawn from fixed distributions.
Noise: TypeAlias = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """Proposed configurations, one for each of C chains.

    Attributes
    ----------
    state
        The proposed configurations. Energies that the move knows are in ``state.energies``.
    log_ratio
        ``(C,)``: ``ln q(x | x') - ln q(x' | x)``, or for a deterministic map with random
        parameters the logarithm of its Jacobian determinant. ``-inf`` where nothing can be
        proposed, which is a rejection; ``state`` then holds the present configuration. With it the
        acceptance is ``min(1, exp(log_ratio) pi(x') / pi(x))`` with ``pi`` the target's density.
    known
        ``(C,)``: for which chains ``state.energies`` is meant; None for all or, without energies,
        none.
    before
        The present state, if forces have become known on the way.
    component
        ``(C,)``: which of ``move.components`` proposed; None if there is only one.
    """

    state: ChainState
    log_ratio: Tensor
    known: Tensor | None = None
    before: ChainState | None = None
    component: Tensor | None = None


class AbstractMove(abc.ABC):
    """Proposes new configurations for C chains at a time, in two stages.

    `draw` makes everything random, with distributions that depend on nothing but the shapes of a
    state. `apply` makes the proposal, a deterministic function of state, noise and `scale`,
    differentiable in these where the move is continuous. Two chains that are given the same noise
    are coupled by common random numbers; a replayed noise replays the proposal.

    A subclass makes sure of detailed balance: the law of the proposal and ``log_ratio`` belong
    together.
    """

    #: Whether proposals are accepted or rejected; otherwise all are taken, and the chain is biased.
    adjusted = True
    #: ``"volume"`` or ``"numbers"``, if the move changes these.
    changes: frozenset[str] = frozenset()
    #: Acceptance that burn-in adapts `scale` to; None for moves without one.
    target_acceptance: float | None = None

    def __init__(self, *, name: str | None = None, scale: float | Tensor | None = None) -> None:
        self.name = type(self).__name__ if name is None else name
        self._scale = None if scale is None else self._checked_scale(scale)

    @property
    def scale(self) -> Tensor:
        """Size of the move, float64 ``()``; what it measures is said by each class."""
        if self._scale is None:
            raise InvalidInputError(f"{self.name}: has no scale that could be adapted")
        return self._scale

    @property
    def has_scale(self) -> bool:
        """Whether the move has a size."""
        return self._scale is not None

    def with_scale(self, scale: float | Tensor) -> Self:
        """A copy with another scale, which may require a gradient."""
        self.scale  # noqa: B018  raises if there is none
        made = self.copied()
        made._scale = self._checked_scale(scale)
        return made

    def rescale(self, scale: float) -> None:
        """Change the scale in place, as adaptation does."""
        self._scale = self._checked_scale(scale)

    def largest_scale(self, state: ChainState) -> float:
        """Beyond which a larger scale means nothing more."""
        return math.inf

    def copied(self) -> Self:
        """A copy whose scale can be changed without changing this one's."""
        return copy.copy(self)

    def _checked_scale(self, scale: float | Tensor) -> Tensor:
        value = torch.as_tensor(scale, dtype=torch.float64)
        if value.ndim or not (math.isfinite(float(value.detach())) and float(value.detach()) > 0):
            raise InvalidInputError(f"scale: got {scale!r}, wanted one number above zero")
        return value

    @property
    def components(self) -> tuple[AbstractMove, ...]:
        """The moves that are counted: this one, or those that it is composed of."""
        return (self,)

    @property
    def updates(self) -> tuple[AbstractMove, ...]:
        """The moves that are accepted or rejected one after the other in one step."""
        return (self,)

    @property
    def held(self) -> Held | None:
        """What proposals hold fixed whatever the energy, as a host's trajectories do; or None."""
        return None

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor | None:
        """Which distances no proposal ever changes.

        Parameters
        ----------
        pairs
            ``(P, 2)`` indices of particles; -1 stands for a point that stays where it is.
        state
            Any state of the chains, for its shapes.

        Returns
        -------
        Tensor or None
            ``(P,)`` booleans. None, the default, if the move cannot say: where a host holds
            distances fixed they are then measured after each of its updates.
        """
        return None

    @abc.abstractmethod
    def check(self, state: ChainState, target: Target) -> None:
        """Raise a typed error unless the move makes sense for these chains."""

    @abc.abstractmethod
    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Random numbers for one proposal of each chain.

        The shapes depend on the shapes of the state alone, each with the chains first, so that two
        states of the same shapes can be given the same noise.
        """

    @abc.abstractmethod
    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """The proposal that follows from the noise."""

    def propose(self, state: ChainState, target: Target, generator: torch.Generator) -> Proposal:
        """Draw and apply."""
        return self.apply(state, self.draw(state, generator), target)


class AbstractGaussianMove(AbstractMove):
    """A move of positions with normal proposals, ``x' = mean(x) + deviation * noise["normal"]``.

    Estimators that couple two chains, or that need the density of a proposal, ask for these.
    """

    @abc.abstractmethod
    def mean(self, state: ChainState, target: Target) -> Tensor:
        """Mean of the proposed positions, of the shape of ``noise["normal"]``."""

    @abc.abstractmethod
    def deviation(self, state: ChainState, target: Target) -> Tensor:
        """Standard deviation of the proposed positions, broadcast against the noise."""


def check_all_move(move: AbstractMove, state: ChainState) -> None:
    """Raise unless there are particles, none of which can be absent: the move moves all of them."""
    if state.n_particles == 0:
        raise InvalidInputError(f"{move.name}: the state has no particles to move")
    if state.present is not None:
        raise InvalidInputError(
            f"{move.name}: moves all particles, but here some may be absent; use Translation"
        )


def uniform(state: ChainState, generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers in [0, 1) for each chain, float64 ``(C, *shape)``."""
    x = state.positions
    made = torch.rand(
        (x.shape[0], *shape), generator=generator, dtype=torch.float64, device=generator.device
    )
    return made.to(x.device)


def normal(state: ChainState, generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers for each chain, float64 ``(C, *shape)``.

    Each is made of one uniform number, so that those of many steps can be drawn at once.
    """
    made = torch.rand(
        (state.n_chains, *shape),
        generator=generator,
        dtype=torch.float64,
        device=generator.device,
    )
    return normal_of(made).to(state.positions.device)


def normal_of(u: Tensor, out: Tensor | None = None) -> Tensor:
    """The normal numbers that uniform ones in [0, 1) are mapped to, by inversion.

    Of k 2^-53, as generators give them, the middle of the interval to the next is mapped: it has a
    finite image, and for each number there is its negative.
    """
    made = torch.add(_FIRST, u, alpha=2.0, out=out)
    return made.erfinv_().mul_(math.sqrt(2.0))


#: Where the middle of the first interval is if [0, 1) is stretched to [-1, 1), exactly.
_FIRST = torch.tensor(2.0**-53 - 1.0, dtype=torch.float64)


def pick(u: Tensor, allowed: Tensor) -> Tensor:
    """Index of one allowed entry, each equally likely.

    Parameters
    ----------
    u
        ``(C,)`` in [0, 1).
    allowed
        ``(C, K)`` booleans.

    Returns
    -------
    Tensor
        ``(C,)`` int64; 0 where nothing is allowed.
    """
    rank = allowed.cumsum(dim=1)
    count = rank[:, -1]
    wanted = (u * count).floor().clamp(max=(count - 1).clamp(min=0).to(u.dtype)) + 1
    return ((rank == wanted[:, None]) & allowed).to(torch.int8).argmax(dim=1)
