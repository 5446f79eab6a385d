"""What one step of a chain is judged by, averaged over its decision."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.state import ChainState


class AbstractObjective(abc.ABC):
    """A number for a proposal, as if it were accepted."""

    #: What it is called in reports.
    name: str

    @abc.abstractmethod
    def __call__(self, before: ChainState, proposed: ChainState) -> Tensor:
        """``(C,)``, with a graph in the proposed positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredJump(AbstractObjective):
    """Squared jumping distance: its expectation is large where a chain forgets fast.

    For a stationary chain the autocovariance of each feature, one step apart, is its variance less
    half of its squared jump (Pasarica and Gelman, Statist. Sinica 20, 343 (2010)).

    Parameters
    ----------
    features
        Maps the state of C chains to ``(C, ...)``, whose changes are squared and summed; by
        default all coordinates [nm]. It must be differentiable in the positions. For angles take
        sines and cosines.
    """

    features: ChainObservable | None = None
    name = "squared jump"

    def __call__(self, before: ChainState, proposed: ChainState) -> Tensor:
        """``|f(x') - f(x)|^2``."""
        if self.features is None:
            change = proposed.positions - before.positions
        else:
            change = self.features(proposed) - self.features(before)
            if change.ndim < 1 or change.shape[0] != before.n_chains:
                raise InvalidInputError(
                    f"features: returned shape {tuple(change.shape)}, wanted "
                    f"({before.n_chains}, ...)"
                )
        squared: Tensor = change.double().square().reshape(before.n_chains, -1).sum(dim=1)
        return squared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance(AbstractObjective):
    """One: the expectation is the mean acceptance."""

    name = "acceptance"

    def __call__(self, before: ChainState, proposed: ChainState) -> Tensor:
        """One for each chain."""
        return torch.ones(before.n_chains, dtype=torch.float64, device=before.positions.device)
