"""Energies of whole Systems by OpenMM, as Monte Carlo wants them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, MissingBoxError
from mdgraft._errors import SimulationError
from mdgraft.montecarlo import ChainState
from torch import Tensor

from mdgraft_openmm._adapter import _PROPERTIES, as_host
from mdgraft_openmm._converter import number
from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm._held import held_by
from mdgraft_openmm.forces import WITHOUT_ENERGY
from mdgraft_openmm.virtual_sites import read_sites


class ContextEnergy:
    """The potential energy of a System in one Context, for `mdgraft.montecarlo.Target`.

    The fastest way to have OpenMM evaluate: all forces in one Context, and no derivatives but
    forces. For gradients of averages hand the samples to an `Ensemble` with a `Potential` of the
    same System (``samples.to_ensemble(mdgraft.graft(system))``).

    Parameters
    ----------
    host_object
        ``openmm.System``, which runs on Reference, or a ``Context`` or ``Simulation``, whose
        platform, properties and global parameters are used. Neither is changed: the energy has a
        Context of its own, without barostats, thermostats and CMMotionRemover.
    platform, properties
        Instead of those.

    Raises
    ------
    UnsupportedHostError
        If ``host_object`` is none of these.
    InvalidInputError
        If OpenMM cannot run the System.
    """

    def __init__(
        self,
        host_object: Any,
        *,
        platform: str | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        host = as_host(host_object)
        name, chosen = platform or "Reference", dict(properties or {})
        if host.context is not None and platform is None:
            used = host.context.getPlatform()
            name = used.getName()
            own = {
                key: used.getPropertyValue(host.context, key)
                for key in used.getPropertyNames()
                if key in _PROPERTIES
            }
            chosen = own | chosen
        self._platform, self._properties = name, chosen
        self._globals = dict(host.context.getParameters()) if host.context is not None else {}
        self.system = _without_ensembles(host.system)
        self.periodic = bool(self.system.usesPeriodicBoundaryConditions())
        self.n_particles = self.system.getNumParticles()
        #: Virtual sites, or None.
        self.sites = read_sites(self.system)
        #: Constrained distances and particles that stay in place, or None.
        self.held = held_by(self.system)
        self.context = self.open(openmm.VerletIntegrator(0.001))

    @property
    def platform(self) -> str:
        """Name of the platform that evaluates."""
        return self._platform

    @property
    def double_precision(self) -> bool:
        """Whether positions and forces are double precision throughout."""
        precision = self._properties.get("Precision")
        return self._platform == "Reference" or precision == "double"

    def open(self, integrator: openmm.Integrator) -> openmm.Context:
        """A Context of the System with another integrator, otherwise the same."""
        try:
            platform = openmm.Platform.getPlatformByName(self._platform)
            context = openmm.Context(self.system, integrator, platform, self._properties)
        except openmm.OpenMMException as error:
            raise InvalidInputError(
                f"host_object: OpenMM's {self._platform} platform cannot run it ({error})"
            ) from error
        known = dict(context.getParameters())
        for key, value in self._globals.items():
            if key in known:
                context.setParameter(key, value)
        return context

    def put(self, context: openmm.Context, positions: np.ndarray, box: np.ndarray | None) -> None:
        """Bring one configuration into a Context: ``(N, 3)`` and ``(3, 3)`` [nm]."""
        self._check(positions.shape[0], box)
        if self.periodic and box is not None:
            context.setPeriodicBoxVectors(*box)
        context.setPositions(positions)
        if self.sites is not None:
            context.computeVirtualSites()

    def _check(self, n_particles: int, box: np.ndarray | None) -> None:
        """Raise for configurations that are not of this System."""
        if n_particles != self.n_particles:
            raise InvalidInputError(
                f"state: has {n_particles} particles, the System {self.n_particles}"
            )
        if self.periodic and box is None:
            raise MissingBoxError("state: has no box, but the System is periodic; pass box=")

    def __call__(self, state: ChainState) -> Tensor:
        """Energies ``(C,)`` [kJ/mol], float64, one chain after the other."""
        found = torch.from_numpy(self.energies_of_arrays(*state.arrays()))
        return found.to(state.positions.device)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """Energies ``(C,)`` [kJ/mol] of ``(C, N, 3)`` and ``(C, 3, 3)`` [nm], float64."""
        energies = np.empty(len(positions))
        self._evaluation(positions, boxes, energies)()
        return energies

    def bound(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        """Evaluation of arrays that change in place, for many calls.

        Parameters
        ----------
        positions, boxes
            ``(C, N, 3)`` and ``(C, 3, 3)`` or None [nm], float64. Boxes stay as they are.
        energies
            ``(C,)`` [kJ/mol], float64, where results go.

        Returns
        -------
        callable
            A function of nothing that evaluates what ``positions`` hold when it is called. Nobody
            else may change the Context's box between its calls.

        Raises
        ------
        InvalidInputError
            For another number of particles than that of the System.
        MissingBoxError
            If the System is periodic and there are no boxes.
        SimulationError
            If OpenMM refuses the box; and by the function that is returned, if it cannot evaluate
            a configuration.
        """
        return self._evaluation(positions, boxes, energies)

    def _evaluation(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        # Apart from `bound`, which a subclass may make of `energies_of_arrays` or the reverse.
        self._check(positions.shape[1], boxes)
        context, follow = self.context, self.sites is not None
        put, get = context.setPositions, context.getState
        boxes = boxes if self.periodic else None
        if boxes is not None and len(boxes) and (boxes == boxes[0]).all():
            # One for all chains is set but once.
            try:
                context.setPeriodicBoxVectors(*boxes[0])
            except openmm.OpenMMException as error:
                raise _failure(error) from error
            boxes = None
        chains = [(c, x, box) for c, (x, box) in enumerate(_paired(positions, boxes))]

        def evaluate() -> None:
            try:
                for c, x, box in chains:
                    if box is not None:
                        context.setPeriodicBoxVectors(*box)
                    put(x)
                    if follow:
                        context.computeVirtualSites()
                    energies[c] = get(energy=True).getPotentialEnergy()._value
            except openmm.OpenMMException as error:
                raise _failure(error) from error

        return evaluate

    def energies_and_forces(self, state: ChainState) -> tuple[Tensor, Tensor]:
        """Energies ``(C,)`` [kJ/mol] and forces ``(C, N, 3)`` [kJ/mol/nm], float64.

        Forces on virtual sites are those that their parents feel, and zero on themselves.
        """
        energies, forces = [], []
        try:
            for x, box in configurations(state):
                self.put(self.context, x, box)
                found = self.context.getState(energy=True, forces=True)
                energies.append(number(found.getPotentialEnergy()))
                forces.append(self.forces_of(found))
        except openmm.OpenMMException as error:
            raise _failure(error) from error
        device = state.positions.device
        return (
            torch.from_numpy(np.array(energies)).to(device),
            torch.from_numpy(np.stack(forces)).to(device),
        )

    def forces_of(self, state: openmm.State) -> np.ndarray:
        """Forces ``(N, 3)`` of a State [kJ/mol/nm], zero on virtual sites."""
        forces = np.array(state.getForces(asNumpy=True)._value, dtype=np.float64)
        if self.sites is not None:
            forces[list(self.sites.indices)] = 0.0
        return forces


def _failure(error: openmm.OpenMMException) -> SimulationError:
    return SimulationError(f"energy: OpenMM cannot evaluate a configuration ({error})")


def configurations(state: ChainState) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Positions and box of each chain as float64 arrays."""
    return list(_paired(*state.arrays()))


def _paired(
    positions: np.ndarray, boxes: np.ndarray | None
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    each = itertools.repeat(None, len(positions)) if boxes is None else boxes
    return zip(positions, each, strict=True)


def _without_ensembles(system: openmm.System) -> openmm.System:
    """A System without what changes boxes or velocities; itself if it has nothing of the kind."""
    if not any(type(force).__name__ in WITHOUT_ENERGY for force in system.getForces()):
        return system
    copied = faithful_copy(system)
    for index in reversed(range(copied.getNumForces())):
        if type(copied.getForce(index)).__name__ in WITHOUT_ENERGY:
            copied.removeForce(index)
    return copied
