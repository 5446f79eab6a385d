"""What a sampler hands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, overload

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


class StackedStates(Sequence[ChainState]):
    """T states of a run in which nothing but positions and energies changes, each made when asked.

    Parameters
    ----------
    before
        The state before the run.
    positions, energies
        ``(T, C, N, 3)`` [nm] and ``(T, C)`` [kJ/mol].
    stride
        Steps from one state to the next.
    """

    def __init__(
        self, before: ChainState, positions: Tensor, energies: Tensor, stride: int
    ) -> None:
        self._before, self._stride = before.replace(forces=None), stride
        self._positions, self._energies = positions, energies

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> ChainState: ...

    @overload
    def __getitem__(self, index: slice) -> list[ChainState]: ...

    def __getitem__(self, index: int | slice) -> ChainState | list[ChainState]:
        if isinstance(index, slice):
            return [self[t] for t in range(len(self))[index]]
        t = range(len(self))[index]
        # Copies: a state may live longer than the run, and must not change with another.
        return self._before.replace(
            positions=_own(self._positions[t]),
            energies=_own(self._energies[t]),
            step=self._before.step + (t + 1) * self._stride,
        )

    def stacked(self, name: str) -> Tensor | None:
        """An attribute of all states ``(T, C, ...)``, or None if they have none of that name."""
        if name == "positions":
            return _own(self._positions)
        if name == "energies":
            return _own(self._energies)
        value: Tensor | None = getattr(self._before, name)
        return None if value is None else value.expand(len(self), *value.shape).clone()


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
        return self._guarded(self._all("positions"))

    @property
    def box(self) -> Tensor | None:
        """``(T, C, 3, 3)`` [nm], or None."""
        boxes = self._stacked("box")
        return None if boxes is None else self._guarded(boxes)

    @property
    def energies(self) -> Tensor:
        """Potential energies ``(T, C)`` [kJ/mol]."""
        return self._guarded(self._all("energies"))

    @property
    def discrete(self) -> Mapping[str, Tensor]:
        """Discrete variables by name, each ``(T, C, ...)``."""
        names = self.states[0].discrete
        return {name: torch.stack([s.discrete[name] for s in self.states]) for name in names}

    @property
    def present(self) -> Tensor | None:
        """Which molecules are present ``(T, C, S)``, or None when their number is fixed."""
        return self._stacked("present")

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
        boxes = self._stacked("box")
        return Frames(
            positions=_by_chain(self._all("positions")),
            box=None if boxes is None else _by_chain(boxes),
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
        return Ensemble(
            chosen,
            self.frames(),
            temperature=self.target.temperature,
            pressure=self.target.pressure,
            gradient=gradient,
            generating_energies=_by_chain(self._all("energies")),
            **options,
        )

    def _stacked(self, name: str) -> Tensor | None:
        """An attribute of all states ``(T, C, ...)``, or None if they have none of that name."""
        if isinstance(self.states, StackedStates):
            return self.states.stacked(name)
        found = [value for s in self.states if (value := getattr(s, name)) is not None]
        return torch.stack(found) if found else None

    def _all(self, name: str) -> Tensor:
        """One that every state has."""
        found = self._stacked(name)
        assert found is not None
        return found

    def _guarded(self, tensor: Tensor) -> Tensor:
        if not self.leaves or not torch.is_grad_enabled():
            return tensor
        apply: Any = _Guard.apply
        guarded: Tensor = apply(tensor, *self.leaves)
        return guarded


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


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
