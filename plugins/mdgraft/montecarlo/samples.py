"""What a sampler hands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError, WrongEnsembleError
from mdgraft.ensembles import Covariance, Ensemble
from mdgraft.frames import Frames
from mdgraft.montecarlo.moves.base import AbstractMove, Noise
from mdgraft.montecarlo.state import PATHWISE, ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.montecarlo.transition import Transition
from mdgraft.potentials import Potential


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One accept-or-reject update with everything that it followed from.

    ``transition(u.transition.before, u.move, target, u.noise, u.u)`` gives it again.

    Attributes
    ----------
    move
        With the scale that it had.
    noise, u
        The random numbers.
    transition
        What happened.
    """

    move: AbstractMove
    noise: Noise
    u: Tensor
    transition: Transition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """T samples of each of C chains, in the order of sampling.

    No gradient passes from here to what the chains depend on. Where the energy had trainable
    parameters, `positions`, `box` and `energies` remember that: ``backward()`` through them raises
    `UnsupportedDerivativeError` and says what to use. `detach` and `frames` give plain tensors.

    Attributes
    ----------
    states
        T states.
    target
        What the chains sample.
    adjusted
        False if some move takes every proposal, so that the samples are biased.
    leaves
        Tensors that the energies depend on and that require a gradient.
    updates
        One `Update` for each update of each step, if they were recorded.
    """

    states: Sequence[ChainState]
    target: Target
    adjusted: bool = True
    leaves: Sequence[Tensor] = ()
    updates: Sequence[Update] = ()

    def __len__(self) -> int:
        return len(self.states)

    @property
    def n_chains(self) -> int:
        """Number of chains C."""
        return self.states[0].n_chains

    @property
    def bias(self) -> str:
        """``"exact"`` for the stationary law, or ``"biased"`` where no proposal is rejected."""
        return "exact" if self.adjusted else "biased"

    @property
    def positions(self) -> Tensor:
        """``(T, C, N, 3)`` [nm]."""
        return self._guarded(torch.stack([s.positions for s in self.states]))

    @property
    def box(self) -> Tensor | None:
        """``(T, C, 3, 3)`` [nm], or None."""
        boxes = [s.box for s in self.states if s.box is not None]
        return self._guarded(torch.stack(boxes)) if boxes else None

    @property
    def energies(self) -> Tensor:
        """Potential energies ``(T, C)`` [kJ/mol]."""
        return self._guarded(
            torch.stack([s.energies for s in self.states if s.energies is not None])
        )

    @property
    def discrete(self) -> Mapping[str, Tensor]:
        """Discrete variables by name, each ``(T, C, ...)``."""
        names = self.states[0].discrete
        return {name: torch.stack([s.discrete[name] for s in self.states]) for name in names}

    @property
    def present(self) -> Tensor | None:
        """Which molecules are present ``(T, C, S)``, or None when their number is fixed."""
        masks = [s.present for s in self.states if s.present is not None]
        return torch.stack(masks) if masks else None

    @property
    def numbers(self) -> Tensor:
        """Numbers of molecules ``(T, C)``; of particles when that is fixed."""
        return torch.stack([s.numbers for s in self.states])

    @property
    def ensemble(self) -> str | None:
        """``"NVT"`` or ``"NPT"``; None where `Frames` has no word for it."""
        if not self.adjusted or self.states[0].present is not None:
            return None
        return "NVT" if self.target.pressure is None else "NPT"

    def detach(self) -> Samples:
        """The same samples as plain tensors, which remember nothing."""
        return dataclasses.replace(self, leaves=())

    def frames(self) -> Frames:
        """All samples as frames, one chain after the other, without a graph.

        Raises
        ------
        InvalidInputError
            If the number of molecules varies: frames have one number of particles.
        """
        if self.states[0].present is not None:
            raise InvalidInputError(
                "frames: the number of molecules varies, which Frames cannot say; use positions, "
                "present, numbers and energies"
            )
        boxes = [s.box for s in self.states if s.box is not None]
        return Frames(
            positions=_by_chain(torch.stack([s.positions for s in self.states])),
            box=_by_chain(torch.stack(boxes)) if boxes else None,
            sampled=self.ensemble,
        )

    def to_ensemble(
        self,
        potential: Potential | None = None,
        *,
        gradient: Covariance | None = None,
        **options: Any,
    ) -> Ensemble:
        """The samples as an `mdgraft.ensembles.Ensemble`, with the energies that are known already.

        Parameters
        ----------
        potential
            Whose parameters averages are differentiated in; by default the target's energy, if
            that is a `Potential`. It must be the potential that was sampled.
        gradient, options
            Passed on.

        Raises
        ------
        InvalidInputError
            If the target's energy is no `Potential` and none is given.
        WrongEnsembleError
            If the samples are biased.
        """
        if not self.adjusted:
            raise WrongEnsembleError(
                "samples: proposals were taken without a test, so that the samples have no "
                "Boltzmann distribution; use MALA instead of ULA"
            )
        chosen = self.target.energy if potential is None else potential
        if not isinstance(chosen, Potential):
            raise InvalidInputError(
                "potential: the energy that was sampled is no Potential; pass the one that it is of"
            )
        energies = torch.stack([s.energies for s in self.states if s.energies is not None])
        return Ensemble(
            chosen,
            self.frames(),
            temperature=self.target.temperature,
            pressure=self.target.pressure,
            gradient=gradient,
            generating_energies=_by_chain(energies),
            **options,
        )

    def _guarded(self, tensor: Tensor) -> Tensor:
        if not self.leaves or not torch.is_grad_enabled():
            return tensor
        apply: Any = _Guard.apply
        guarded: Tensor = apply(tensor, *self.leaves)
        return guarded


def _by_chain(tensor: Tensor) -> Tensor:
    """``(T, C, ...)`` to ``(C T, ...)``, each chain in its own order."""
    return tensor.transpose(0, 1).reshape(-1, *tensor.shape[2:])


class _Guard(torch.autograd.Function):
    """Gives a tensor unchanged, and no gradient."""

    @staticmethod
    def forward(tensor: Tensor, *leaves: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise UnsupportedDerivativeError(
            f"samples: {PATHWISE}. For plain tensors take samples.detach()"
        )
