"""Averages over sampled frames as differentiable functions of a potential's parameters."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError, WrongEnsembleError
from mdgraft._types import Observable
from mdgraft._units import BAR_NM3, BOLTZMANN, plain
from mdgraft.ensembles import _influence
from mdgraft.ensembles.covariance import Covariance
from mdgraft.ensembles.overlap import Overlap
from mdgraft.ensembles.per_frame import per_frame_gradients, per_frame_jacobian
from mdgraft.ensembles.recompute import leaves_of, recompute
from mdgraft.ensembles.selection import select_parameters
from mdgraft.estimate import Estimate
from mdgraft.frames import Frames
from mdgraft.kernels.periodic import volume
from mdgraft.potentials import Potential

#: Particles that are evaluated at a time unless the caller says otherwise.
_BATCH_PARTICLES = 8192


class Ensemble:
    """Frames sampled from the Boltzmann distribution of a potential, and averages over them.

    The energies at construction are remembered as those that generated the frames. When the
    potential's parameters change later, in place or by an optimiser, averages are reweighted to
    the present parameters.

    Parameters
    ----------
    potential
        The potential; its present parameters are those that the frames were sampled with.
    frames
        F >= 2 frames, in the order of sampling.
    temperature
        [K], a number or a quantity.
    pressure
        [bar], a number or a quantity, for frames sampled at constant pressure; None for a
        constant box.
    gradient
        How gradients of averages are taken, and when overlap is too small for it.
    batch_size
        Frames that are evaluated at a time, which bounds the memory; by default as many as hold
        about 8000 particles.
    generating_energies
        ``(F,)`` [kJ/mol] energies that generated the frames, when they are not those of the
        potential's present parameters.

    Raises
    ------
    InvalidInputError
        For a temperature that is not positive, too few frames, a wrong number of particles, or
        frames of infinite energy.
    MissingBoxError
        If a pressure is given but the frames have no box.
    WrongEnsembleError
        If the frames were sampled at constant energy, or at constant pressure and no pressure is
        given, or at constant volume and one is.
    """

    def __init__(
        self,
        potential: Potential,
        frames: Frames,
        *,
        temperature: Any,
        pressure: Any = None,
        gradient: Covariance | None = None,
        batch_size: int | None = None,
        generating_energies: Tensor | None = None,
    ) -> None:
        self.potential = potential
        self.temperature = _temperature(temperature)
        self.pressure = _pressure(pressure)
        self.gradient = Covariance() if gradient is None else gradient
        if not isinstance(self.gradient, Covariance):
            raise InvalidInputError(
                f"gradient: got {type(gradient).__name__}, wanted mdgraft.ensembles.Covariance()"
            )
        _check_state(potential, frames, self.pressure)
        if batch_size is None:
            batch_size = max(1, _BATCH_PARTICLES // max(1, frames.n_particles))
        if batch_size < 1:
            raise InvalidInputError(f"batch_size: got {batch_size}, wanted at least 1 frame")
        self.batch_size = batch_size
        self.frames = _detached(frames, potential)
        if generating_energies is None:
            generating_energies = self._energies()
        energies = torch.as_tensor(generating_energies).detach()
        energies = energies.to(device=potential.device, dtype=torch.float64)
        if energies.shape != (len(frames),):
            raise InvalidInputError(
                f"generating_energies: got shape {tuple(energies.shape)}, wanted ({len(frames)},)"
            )
        _check_energies(energies)
        #: Energies [kJ/mol] that generated the frames, float64 ``(F,)``.
        self.generating_energies = energies

    @property
    def beta(self) -> float:
        """Inverse temperature ``1 / kT`` [mol/kJ]."""
        return 1.0 / (BOLTZMANN * self.temperature)

    def __len__(self) -> int:
        return len(self.frames)

    # Averages ---------------------------------------------------------------------------------

    def average(self, observable: Observable) -> Tensor:
        """Average of an observable at the potential's present parameters, with a graph.

        ``backward()`` gives the gradient of the reweighted average with respect to every
        parameter of the potential, and to every other tensor that the observable depends on.
        Batches of frames are evaluated again during ``backward()``, so that memory does not grow
        with the number of frames. Higher derivatives (``create_graph=True``) are exact too.

        Parameters
        ----------
        observable
            Maps F frames to ``(F, *S)``; it is called with batches of frames.

        Returns
        -------
        Tensor
            float64, shape S.

        Raises
        ------
        InsufficientOverlapError
            If the parameters have moved too far from those that generated the frames.
        InvalidInputError
            If the observable returns a wrong shape or NaN, or the energy of a frame is not
            finite.
        """
        parts = [
            recompute(functools.partial(self._evaluate, batch, observable))
            for batch in self.frames.batches(self.batch_size)
        ]
        energies = torch.cat([energy for energy, _ in parts])
        values = torch.cat([value for _, value in parts])
        log_weights = self._log_weights(energies)
        self.gradient.require(self.gradient.overlap(log_weights))
        weights = log_weights.softmax(dim=0)
        mean: Tensor = torch.tensordot(weights, values, dims=1)
        return mean

    def weights(self) -> Tensor:
        """Normalised weights of the frames ``(F,)`` at the present parameters, with a graph."""
        parts = [
            recompute(functools.partial(self._evaluate, batch, _nothing))[0]
            for batch in self.frames.batches(self.batch_size)
        ]
        return self._log_weights(torch.cat(parts)).softmax(dim=0)

    def overlap(self) -> Overlap:
        """How well the frames represent the present parameters; never raises for a bad overlap."""
        return self.gradient.overlap(self._log_weights(self._energies()))

    def halves(self) -> tuple[Ensemble, Ensemble]:
        """The first and the second half of the frames.

        A value from one and a gradient from the other give unbiased gradients of nonlinear
        losses; agreement of both within their errors is a check of convergence.

        Raises
        ------
        InvalidInputError
            For fewer than four frames.
        """
        if len(self) < 4:
            raise InvalidInputError(f"frames: got {len(self)}, two halves need at least 4")
        middle = len(self) // 2
        first, second = (
            Ensemble(
                self.potential,
                self.frames[part],
                temperature=self.temperature,
                pressure=self.pressure,
                gradient=self.gradient,
                batch_size=self.batch_size,
                generating_energies=self.generating_energies[part],
            )
            for part in (slice(None, middle), slice(middle, None))
        )
        return first, second

    # Estimates --------------------------------------------------------------------------------

    def estimate(
        self,
        observable: Observable,
        parameters: Sequence[str] | None = None,
        *,
        function: Callable[[Tensor], Tensor] | None = None,
    ) -> Estimate:
        """Average of an observable, its gradient, and standard errors of both.

        Standard errors come from the influence series of value and gradient and account for the
        correlation of successive frames; see `mdgraft.ensembles.statistics.standard_error`.

        Parameters
        ----------
        observable
            Maps F frames to ``(F, *S)``.
        parameters
            Names or shell-style patterns of the parameters that the gradient is taken for; by
            default all trainable ones. Give an empty list for none.
        function
            Applied to the average: the estimate is that of ``function(<O>)``, with errors by the
            delta method. It must be twice differentiable by ``torch.func``.

        Returns
        -------
        Estimate
            Its gradient has shapes ``(*S, *parameter.shape)``.

        Raises
        ------
        InsufficientOverlapError
            If the parameters have moved too far from those that generated the frames.
        InvalidInputError
            For an unknown parameter, a wrong shape, or an energy that is not finite.
        """
        names = select_parameters(self.potential, parameters)
        energies, values, energy_gradients, value_gradients = self._sweep(observable, names)
        log_weights = self._log_weights(energies)
        overlap = self.gradient.overlap(log_weights)
        self.gradient.require(overlap)
        named = dict(self.potential.named_parameters())
        return _influence.estimate(
            weights=log_weights.softmax(dim=0),
            values=values,
            energy_gradients=energy_gradients,
            value_gradients=value_gradients,
            shapes={name: named[name].shape for name in names},
            beta=self.beta,
            function=function,
            overlap=overlap,
        )

    def temperature_derivative(self, observable: Observable) -> Estimate:
        """Derivative of an average with respect to temperature [unit of the observable / K].

        ``d<O>/dT = Cov(O, U + P V) / kT^2``, for an O that does not depend on T itself.
        Arguments and errors as in `estimate`.
        """
        energies, values, _, _ = self._sweep(observable, [])
        enthalpy = energies
        if self.pressure is not None:
            enthalpy = enthalpy + self.pressure * BAR_NM3 * self._volumes()
        return self._response(energies, values, -enthalpy / self.temperature)

    def pressure_derivative(self, observable: Observable) -> Estimate:
        """Derivative of an average with respect to pressure [unit of the observable / bar].

        ``d<O>/dP = -beta Cov(O, V)``, for an O that does not depend on P itself. Arguments and
        errors as in `estimate`.

        Raises
        ------
        WrongEnsembleError
            If the ensemble has no pressure, or the volume never changes.
        """
        if self.pressure is None:
            raise WrongEnsembleError(
                "pressure: is None, and frames of constant volume have no pressure derivative; "
                "sample at constant pressure and pass pressure= in bar"
            )
        volumes = self._volumes()
        if float(volumes.max() - volumes.min()) <= 1e-12 * float(volumes.max()):
            raise WrongEnsembleError(
                "frames: all have the same volume, so that no pressure derivative can be taken; "
                "sample with a barostat"
            )
        energies, values, _, _ = self._sweep(observable, [])
        return self._response(energies, values, BAR_NM3 * volumes)

    # Evaluation -------------------------------------------------------------------------------

    def _response(self, energies: Tensor, values: Tensor, conjugate: Tensor) -> Estimate:
        """``-beta Cov(O, X)`` for a per-frame X ``(F,)``."""
        log_weights = self._log_weights(energies)
        overlap = self.gradient.overlap(log_weights)
        self.gradient.require(overlap)
        return _influence.response(
            weights=log_weights.softmax(dim=0),
            values=values,
            conjugate=conjugate,
            beta=self.beta,
            overlap=overlap,
        )

    def _log_weights(self, energies: Tensor) -> Tensor:
        """Unnormalised log weights ``(F,)``; P V and the ideal-gas factor cancel at fixed P, T."""
        _check_energies(energies.detach())
        return -self.beta * (energies - self.generating_energies)

    def _volumes(self) -> Tensor:
        assert self.frames.box is not None
        return volume(self.frames.box.double())

    def _energy(self, batch: Frames) -> Tensor:
        energy: Tensor = self.potential(batch.positions, batch.box)
        return energy.double()

    def _energies(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._energy(b) for b in self.frames.batches(self.batch_size)])

    def _evaluate(self, batch: Frames, observable: Observable) -> tuple[Tensor, Tensor]:
        return self._energy(batch), _observe(observable, batch)

    def _sweep(
        self, observable: Observable, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Energies ``(F,)``, values ``(F, *S)``, and their derivatives ``(F, ..., P)``.

        The last is None for an observable that does not depend on these parameters.
        """
        explicit = self._is_explicit(observable, names)

        def function(batch: Frames) -> tuple[Tensor, ...]:
            return self._evaluate(batch, observable)

        energies, values = [], []
        jacobians: list[tuple[Tensor, ...]] = []
        for batch in self.frames.batches(self.batch_size):
            with torch.no_grad():
                energy, value = self._evaluate(batch, observable)
            energies.append(energy)
            values.append(value)
            if names and not explicit:
                jacobians.append((per_frame_gradients(self.potential, batch, names),))
            elif names:
                n_outputs = 1 + value[0].numel()
                jacobians.append(
                    per_frame_jacobian(self.potential, function, batch, names, n_outputs=n_outputs)
                )
        joined = [torch.cat(parts) for parts in zip(*jacobians, strict=True)]
        all_energies = torch.cat(energies)
        gradients = joined[0] if joined else all_energies.new_zeros(len(self), 0)
        return all_energies, torch.cat(values), gradients, joined[1] if len(joined) > 1 else None

    def _is_explicit(self, observable: Observable, names: Sequence[str]) -> bool:
        """Whether the observable's graph leads back to one of these parameters."""
        named = dict(self.potential.named_parameters())
        with torch.enable_grad():
            frozen = [named[name] for name in names if not named[name].requires_grad]
            try:
                for parameter in frozen:
                    parameter.requires_grad_(True)
                leaves = {id(leaf) for leaf in leaves_of([_observe(observable, self.frames[:1])])}
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
        return any(id(named[name]) in leaves for name in names)


def _nothing(frames: Frames) -> Tensor:
    return frames.positions.new_empty(len(frames), 0)


def _observe(observable: Observable, batch: Frames) -> Tensor:
    value = observable(batch)
    if not torch.is_tensor(value) or value.ndim < 1 or value.shape[0] != len(batch):
        got = f"shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        raise InvalidInputError(
            f"observable: returned {got} for {len(batch)} frames, wanted a tensor "
            f"({len(batch)}, ...) with one value for each frame"
        )
    if value.is_complex():
        raise InvalidInputError(f"observable: returned {value.dtype}, wanted real numbers")
    if not bool(torch.isfinite(value).all()):
        raise InvalidInputError("observable: returned NaN or infinity for one or more frames")
    return value.double()


def _temperature(value: Any) -> float:
    try:
        kelvin = plain(value, "kelvin")
    except TypeError as error:
        raise InvalidInputError(f"temperature: got {value!r}; {error}") from None
    number = _number("temperature", kelvin, "K")
    if not number > 0.0:
        raise InvalidInputError(f"temperature: got {number:g}, wanted a positive number of K")
    return number


def _pressure(value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "value_in_unit"):
        # The unit system's own pressure is Da/(nm ps^2), so bar is asked for by name.
        try:
            value = value.value_in_unit(sys.modules["openmm.unit"].bar)
        except TypeError as error:
            raise InvalidInputError(f"pressure: got {value!r}; {error}") from None
    return _number("pressure", value, "bar")


def _number(name: str, value: Any, unit: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"{name}: got {value!r}, wanted a number or quantity in {unit}"
        ) from None
    if not math.isfinite(number):
        raise InvalidInputError(f"{name}: got {number}, wanted a finite number of {unit}")
    return number


def _check_state(potential: Potential, frames: Frames, pressure: float | None) -> None:
    for name, value, wanted in (("potential", potential, Potential), ("frames", frames, Frames)):
        if not isinstance(value, wanted):
            raise InvalidInputError(
                f"{name}: got {type(value).__name__}, wanted a {wanted.__module__.split('.')[0]}."
                f"{wanted.__name__}"
            )
    if len(frames) < 2:
        raise InvalidInputError(f"frames: got {len(frames)}, an ensemble needs at least 2")
    if frames.n_particles != potential.n_particles:
        raise InvalidInputError(
            f"frames: have {frames.n_particles} particles, the potential "
            f"{potential.n_particles}; both must describe the same system"
        )
    if frames.sampled == "NVE":
        raise WrongEnsembleError(
            "frames: were sampled at constant energy (NVE), where canonical averages and their "
            "covariances are wrong; sample with a thermostat"
        )
    if frames.sampled == "NPT" and pressure is None:
        raise WrongEnsembleError(
            "pressure: got None, but the frames were sampled at constant pressure (NPT); pass "
            "pressure= in bar, the one that the barostat had"
        )
    if frames.sampled == "NVT" and pressure is not None:
        raise WrongEnsembleError(
            f"pressure: got {pressure:g} bar, but the frames were sampled at constant volume "
            "(NVT); leave pressure out, or sample with a barostat"
        )
    if pressure is not None and frames.box is None:
        raise MissingBoxError(
            "frames: have no box, but a pressure is given; pass frames with boxes, or no pressure"
        )


def _check_energies(energies: Tensor) -> None:
    bad = (~torch.isfinite(energies)).nonzero()
    if bad.numel():
        raise InvalidInputError(
            f"frames: {bad.numel()} have an energy that is not finite, the first is frame "
            f"{int(bad[0])}; remove them, or check parameters and overlapping particles"
        )


def _detached(frames: Frames, potential: Potential) -> Frames:
    moved = frames.to(device=potential.device)
    return Frames(
        positions=moved.positions.detach(),
        box=None if moved.box is None else moved.box.detach(),
        velocities=None if moved.velocities is None else moved.velocities.detach(),
        sampled=moved.sampled,
    )
