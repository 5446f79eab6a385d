"""Averages of a system's observables and their gradients, from one pass over the frames."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._types import Observable
from mdgraft._units import BAR_NM3, BOLTZMANN, DALTON_PER_NM3
from mdgraft.ensembles import Covariance, Ensemble, Overlap, _influence
from mdgraft.ensembles.per_frame import per_frame_gradients
from mdgraft.estimate import Estimate
from mdgraft.fitting.host import AbstractSimulation
from mdgraft.frames import Frames
from mdgraft.kernels.periodic import volume

#: Observables that follow from energies and volumes alone.
SIMPLE = ("density", "volume", "potential_energy", "enthalpy_per_molecule", "energy_per_molecule")

# Threads cost more than they save on systems smaller than this.
_SMALL = 10_000


@contextlib.contextmanager
def reproducibly(n_particles: int) -> Iterator[None]:
    """Make torch give the same bits each time, whatever the number of cores for small systems."""
    threads = torch.get_num_threads()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if n_particles < _SMALL:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """A mean with its standard error and gradient; plain numbers.

    Attributes
    ----------
    value, standard_error
        In the observable's unit.
    gradient, gradient_standard_error
        By parameter name.
    """

    value: float
    standard_error: float
    gradient: dict[str, float]
    gradient_standard_error: dict[str, float]


class SampledSystem:
    """Frames of one system, and averages over them at its potential's present parameters.

    Parameters
    ----------
    simulation
        The system; the potential's present parameters are those that generated the frames.
    frames
        F frames.
    temperature
        [K].
    names
        Trainable parameters that the system depends on, tied as ``tied.<name>``.
    """

    def __init__(
        self,
        simulation: AbstractSimulation,
        frames: Frames,
        *,
        temperature: float,
        names: Sequence[str],
    ) -> None:
        self.simulation = simulation
        self.frames = frames
        self.names = list(names)
        self._tied = [f"tied.{name}" for name in names]
        self._covariance = Covariance()
        with reproducibly(frames.n_particles):
            # The ensemble checks the frames and remembers the energies that generated them.
            self._ensemble = Ensemble(
                simulation.potential,
                frames,
                temperature=temperature,
                pressure=simulation.pressure,
                gradient=self._covariance,
            )
        self._energies = self._ensemble.generating_energies
        self._at = self._parameters()
        self._gradients: Tensor | None = None

    def overlap(self) -> Overlap:
        """How well the frames represent the present parameters."""
        return self._covariance.overlap(self._log_weights())

    def averages(
        self, simple: Sequence[str], functions: Sequence[Observable]
    ) -> tuple[list[Average], list[Average]]:
        """Averages of observables.

        Parameters
        ----------
        simple
            Names out of `SIMPLE`.
        functions
            Other observables; each maps F frames to ``(F,)``.

        Raises
        ------
        InsufficientOverlapError
            If the frames say too little about the present parameters.
        """
        with reproducibly(self.frames.n_particles):
            first = self._simple(simple) if simple else []
            second = [
                self._unpack(self._ensemble.estimate(function, self._tied), None)
                for function in functions
            ]
        return first, second

    def _parameters(self) -> list[float]:
        named = dict(self.simulation.potential.named_parameters())
        return [named[name].item() for name in self._tied]

    def _log_weights(self) -> Tensor:
        self._refresh()
        return -self._ensemble.beta * (self._energies - self._ensemble.generating_energies)

    def _refresh(self) -> None:
        """Energies at the present parameters."""
        now = self._parameters()
        if now == self._at:
            return
        potential = self.simulation.potential
        with torch.no_grad(), reproducibly(self.frames.n_particles):
            self._energies = torch.cat(
                [
                    potential(batch.positions, batch.box).double()
                    for batch in self.frames.batches(self._ensemble.batch_size)
                ]
            )
        bad = (~torch.isfinite(self._energies)).nonzero()
        if bad.numel():
            raise InvalidInputError(
                f"parameters: {dict(zip(self.names, now, strict=True))} give frame "
                f"{int(bad[0])} an energy that is not finite"
            )
        self._at, self._gradients = now, None

    def _energy_gradients(self) -> Tensor:
        """G, ``(F, P)``, at the present parameters."""
        if self._gradients is None:
            self._gradients = per_frame_gradients(
                self.simulation.potential,
                self.frames,
                self._tied,
                batch_size=self._ensemble.batch_size,
            )
        return self._gradients

    def _simple(self, simple: Sequence[str]) -> list[Average]:
        log_weights = self._log_weights()
        overlap = self._covariance.overlap(log_weights)
        self._covariance.require(overlap)
        gradients = self._energy_gradients()
        columns = [self._column(name, gradients) for name in simple]
        estimate = _influence.estimate(
            weights=log_weights.softmax(dim=0),
            values=torch.stack([values for values, _ in columns], dim=-1),
            energy_gradients=gradients,
            value_gradients=(
                torch.stack([explicit for _, explicit in columns], dim=1) if self._tied else None
            ),
            shapes={name: torch.Size() for name in self._tied},
            beta=self._ensemble.beta,
            function=None,
            overlap=overlap,
        )
        return [self._unpack(estimate, place) for place in range(len(simple))]

    def _column(self, name: str, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(F,)`` and explicit derivatives ``(F, P)`` of one observable."""
        per_molecule = 1.0 / self.simulation.n_molecules
        constant = torch.zeros_like(gradients)
        if name == "potential_energy":
            return self._energies, gradients
        if name == "energy_per_molecule":
            return self._energies * per_molecule, gradients * per_molecule
        if self.frames.box is None:
            raise InvalidInputError(f"{name}: the frames have no box")
        volumes = volume(self.frames.box.double())
        if name == "volume":
            return volumes, constant
        if name == "density":
            return self.simulation.total_mass * DALTON_PER_NM3 / volumes, constant
        pressure = self.simulation.pressure
        assert name == "enthalpy_per_molecule" and pressure is not None
        enthalpy = self._energies + pressure * BAR_NM3 * volumes
        return enthalpy * per_molecule, gradients * per_molecule

    def _unpack(self, estimate: Estimate, place: int | None) -> Average:
        def pick(tensor: Tensor) -> float:
            if place is None and tensor.ndim:
                raise InvalidInputError(
                    f"observable: returned shape (frames, {', '.join(map(str, tensor.shape))}), "
                    "wanted one number for each frame, (frames,)"
                )
            return float(tensor if place is None else tensor[place])

        return Average(
            value=pick(estimate.value),
            standard_error=pick(estimate.standard_error),
            gradient={n: pick(estimate.gradient[f"tied.{n}"]) for n in self.names},
            gradient_standard_error={
                n: pick(estimate.gradient_standard_error[f"tied.{n}"]) for n in self.names
            },
        )


def exact_energy(simulation: AbstractSimulation, names: Sequence[str]) -> Average:
    """Energy per molecule of a system whose energy is the same in every configuration."""
    one = simulation.configuration()
    with reproducibly(one.n_particles):
        energy = simulation.potential(one.positions, one.box).detach()
        gradients = per_frame_gradients(
            simulation.potential, one, [f"tied.{name}" for name in names]
        )
    scale = 1.0 / simulation.n_molecules
    return Average(
        value=float(energy[0]) * scale,
        standard_error=0.0,
        gradient={n: float(g) * scale for n, g in zip(names, gradients[0], strict=True)},
        gradient_standard_error=dict.fromkeys(names, 0.0),
    )


def thermal_energy(temperature: float) -> float:
    """RT [kJ/mol]."""
    return BOLTZMANN * temperature
