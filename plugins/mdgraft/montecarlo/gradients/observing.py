"""Observables of Markov chains and their explicit dependence on parameters."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError
from mdgraft.ensembles.recompute import leaves_of
from mdgraft.montecarlo.gradients.jacobians import by_seed
from mdgraft.montecarlo.gradients.parameters import Conjugates, trainable
from mdgraft.montecarlo.state import ChainState


class ChainObservable(Protocol):
    """A quantity with one value, of any shape, in each chain.

    A `ChainState` has ``positions`` and ``box`` as `mdgraft.Frames` has them, so that observables
    of frames serve as they are.
    """

    def __call__(self, state: ChainState) -> Tensor:
        """Map the state of C chains to a tensor of shape ``(C, ...)``."""


class Observer:
    """Values of an observable and its derivatives at fixed configurations.

    Parameters
    ----------
    observable
        Maps the state of C chains to ``(C, *S)``.
    conjugates
        The parameters. An observable that depends on those of the energy, such as the energy
        itself, is differentiated by them; one that depends on temperature, pressure or activity
        through numbers of its own is not, and must not be handed in.
    state
        Any state of the chains; shows whether the observable depends on parameters.

    Raises
    ------
    InvalidInputError
        If the observable returns something else than one real, finite value for each chain.
    """

    def __init__(
        self, observable: ChainObservable, conjugates: Conjugates, state: ChainState
    ) -> None:
        self.observable = observable
        self.conjugates = conjugates
        self.shape = self.values(state[:1]).shape[1:]
        self.explicit = self._is_explicit(state[:1])

    @torch.no_grad()
    def values(self, state: ChainState) -> Tensor:
        """Values, float64 ``(C, *S)``."""
        return self._observe(state).detach()

    def derivatives(self, state: ChainState) -> Tensor | None:
        """Derivatives ``(C, *S, P)`` at fixed configurations; None where they are all zero."""
        if not self.explicit:
            return None
        (found,) = self.conjugates.jacobian(lambda chains: (self._observe(chains),), state)
        rest = self.conjugates.n_scalars - self.conjugates.n_energy_scalars
        return torch.cat([found, found.new_zeros(*found.shape[:-1], rest)], dim=-1)

    def directional(self, state: ChainState, tangents: Tensor) -> Tensor:
        """Derivatives along displacements of the positions.

        Parameters
        ----------
        state
            C chains.
        tangents
            ``(P, C, N, 3)`` [nm per unit of a parameter].

        Returns
        -------
        Tensor
            ``(C, *S, P)``.

        Raises
        ------
        UnsupportedDerivativeError
            If the observable has no derivative in the positions.
        """
        with torch.enable_grad():
            x = state.positions.detach().clone().requires_grad_(True)
            value = self._observe(state.replace(positions=x, energies=state.energies))
            seed = torch.ones_like(value, requires_grad=True)
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(
                    value, x, seed, create_graph=True, allow_unused=True
                )
            if gradient is None:
                raise UnsupportedDerivativeError(
                    "observable: does not depend on the positions in a way that can be "
                    "differentiated, as a histogram or a discrete variable does not, but here "
                    "positions depend on parameters; use a smooth observable, or Covariance() or "
                    "Score(), which need no derivative of it"
                )
            columns = [
                by_seed((gradient * tangent.to(gradient)).sum(), [seed])[0] for tangent in tangents
            ]
        return torch.stack(columns, dim=-1)

    def _observe(self, state: ChainState) -> Tensor:
        value = self.observable(state)
        n = state.n_chains
        if not torch.is_tensor(value) or value.ndim < 1 or value.shape[0] != n:
            got = f"shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
            raise InvalidInputError(
                f"observable: returned {got} for {n} chains, wanted a tensor ({n}, ...) with one "
                "value for each chain"
            )
        if value.is_complex():
            raise InvalidInputError(f"observable: returned {value.dtype}, wanted real numbers")
        if not bool(torch.isfinite(value).all()):
            raise InvalidInputError("observable: returned NaN or infinity for one or more chains")
        return value.double()

    def _is_explicit(self, state: ChainState) -> bool:
        energy = self.conjugates.target.energy
        if not isinstance(energy, nn.Module) or not self.conjugates.energy_names:
            return False
        named = dict(energy.named_parameters())
        chosen = [named[name] for name in self.conjugates.energy_names]
        with trainable(chosen), torch.enable_grad():
            leaves = {id(leaf) for leaf in leaves_of([self._observe(state)])}
        return any(id(parameter) in leaves for parameter in chosen)
