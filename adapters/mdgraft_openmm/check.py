"""Comparing the graft of a user's own System with OpenMM, force by force."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mdgraft
import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, MDGraftError, Potential
from mdgraft.testing import (
    Comparison,
    HostFunctions,
    Progress,
    Tolerances,
    compare_with_host,
)

from mdgraft_openmm._adapter import energy_forces
from mdgraft_openmm._converter import number
from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm._known import precision, remarks
from mdgraft_openmm._placement import generate_positions
from mdgraft_openmm.files import check_box, read_positions, read_system
from mdgraft_openmm.write import write_parameters

# One of the 32 force groups takes the forces that are not asked about.
_PER_CONTEXT = 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `check` found.

    Attributes
    ----------
    system, state
        The files; ``state`` is None when positions were generated.
    positions
        Where the positions come from, in words.
    n_particles, n_virtual_sites
        Of the System.
    routes
        How each term is evaluated, ``"native"`` or ``"host"``.
    comparisons
        One entry for each quantity compared.
    tolerances
        Relative differences that pass.
    seed
        Of generated positions and random directions.
    remarks
        What is known to be wrong in OpenMM and may matter here.
    versions
        Of the packages involved.
    seconds
        Wall time.
    """

    system: str
    state: str | None
    positions: str
    n_particles: int
    n_virtual_sites: int
    routes: dict[str, str]
    comparisons: list[Comparison]
    tolerances: Tolerances
    seed: int
    remarks: list[str]
    versions: dict[str, str]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not any(row.status == "differs" for row in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold; what is not finite becomes None."""
        found: dict[str, Any] = {"agrees": self.agrees, **dataclasses.asdict(self)}
        finite: dict[str, Any] = _finite(found)
        return finite


def check(
    system_path: str | Path,
    state_path: str | Path | None = None,
    *,
    gradients: bool = False,
    trust: bool = False,
    tolerances: Tolerances | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare the graft of a System with OpenMM's Reference platform.

    Parameters
    ----------
    system_path
        A serialised System.
    state_path
        A serialised State, or a ``.pdb`` or ``.cif`` file; without one, positions are generated.
    gradients
        Also compare the derivatives with respect to parameters with differences of OpenMM's
        energies.
    trust
        Load a System that holds pickled code.
    tolerances
        Relative differences that pass.
    seed
        Of generated positions and random directions.
    progress
        Told about long work.

    Returns
    -------
    CheckReport

    Raises
    ------
    InvalidInputError
        If a file is missing, corrupt, of another kind, or does not fit the System.
    BoxTooSmallError
        If a cutoff exceeds half of the box.
    UnsupportedForceError
        If the file holds forces of plug-ins, which it lists.
    UntrustedInputError
        If loading would run code and ``trust`` is false.
    """
    start = time.perf_counter()
    judge = tolerances or Tolerances()
    system = read_system(system_path, trust=trust)
    if system.getNumParticles() == 0:
        raise InvalidInputError(f"system: {system_path} has no particles")
    potential = mdgraft.graft(system)
    default = np.array([[number(x) for x in v] for v in system.getDefaultPeriodicBoxVectors()])
    if state_path is None:
        check_box(system, default)
        if progress:
            progress("generating positions", 0, 1)
        positions, box = generate_positions(system, seed=seed)
        source = (
            f"generated: molecules placed at random (seed {seed}), energy minimised, then "
            "displaced by up to 0.005 nm"
        )
    else:
        positions, found = read_positions(
            state_path, n_particles=system.getNumParticles(), trust=trust
        )
        box = default if found is None else found
        source = f"read from {state_path}"
        if found is None and potential.periodic:
            source += "; box vectors are the System's default"
        check_box(system, box)
    host = OpenMMReference(system, positions, box)
    sites = np.array([system.isVirtualSite(i) for i in range(system.getNumParticles())], bool)
    rows = compare_with_host(
        potential,
        host.positions,
        box if potential.periodic else None,
        HostFunctions(
            energies=host.energies,
            forces=host.forces,
            parameter_energies=host.parameter_energies,
            precision=precision(system),
        ),
        comparable=~sites,
        gradients=gradients,
        tolerances=judge,
        seed=seed,
        progress=progress,
    )
    return CheckReport(
        system=str(system_path),
        state=None if state_path is None else str(state_path),
        positions=source,
        n_particles=system.getNumParticles(),
        n_virtual_sites=int(sites.sum()),
        routes=dict(potential.routes),
        comparisons=rows,
        tolerances=judge,
        seed=seed,
        remarks=remarks(system, box),
        versions={
            "mdgraft": mdgraft.__version__,
            "openmm": openmm.__version__,
            "torch": torch.__version__,
        },
        seconds=time.perf_counter() - start,
    )


class OpenMMReference:
    """Energies and forces of each force of a System by OpenMM's Reference platform.

    Every force gets a force group of its own in a copy of the System; Systems with more forces
    than groups are spread over several Contexts.

    Parameters
    ----------
    system
        Stays unchanged.
    positions
        ``(N, 3)`` [nm]; `positions` holds them with virtual sites placed by their parents.
    box
        ``(3, 3)`` [nm].

    Raises
    ------
    InvalidInputError
        If OpenMM cannot run the System, or its energy is not finite.
    """

    def __init__(self, system: openmm.System, positions: np.ndarray, box: np.ndarray) -> None:
        self._has_sites = any(system.isVirtualSite(i) for i in range(system.getNumParticles()))
        self._contexts: list[openmm.Context] = []
        self._where: dict[str, tuple[int, int]] = {}
        self.box = box
        # A Context with plain Ewald sums takes a skewed box later on, but ignores that it is.
        self._rectangular = {
            name
            for name, force in energy_forces(system).items()
            if isinstance(force, openmm.NonbondedForce)
            and force.getNonbondedMethod() == openmm.NonbondedForce.Ewald
        }
        names = list(energy_forces(system))
        for start in range(0, max(len(names), 1), _PER_CONTEXT):
            part = names[start : start + _PER_CONTEXT]
            for group, name in enumerate(part):
                self._where[name] = (len(self._contexts), group)
            self._contexts.append(_context(_with_groups(system, part)))
        try:
            self._put(self._contexts[0], positions, box)
            state = self._contexts[0].getState(positions=True)
            self.positions = np.array(state.getPositions(asNumpy=True)._value, float)
            for context in self._contexts:
                self._put(context, self.positions, box)
                energy = number(context.getState(energy=True).getPotentialEnergy())
                if not math.isfinite(energy):
                    raise InvalidInputError(
                        f"state: OpenMM's energy is {energy} at these positions; are particles "
                        "on top of each other?"
                    )
        except openmm.OpenMMException as error:
            raise InvalidInputError(
                f"state: OpenMM cannot evaluate the System here ({error})"
            ) from error

    def energies(
        self, positions: np.ndarray, box: np.ndarray | None, terms: Sequence[str]
    ) -> dict[str, float]:
        """Energies [kJ/mol] by term; NaN if OpenMM refuses the box."""
        try:
            return {name: self._energy(name, positions, box) for name in terms}
        except openmm.OpenMMException:
            return dict.fromkeys(terms, math.nan)

    def forces(
        self, positions: np.ndarray, box: np.ndarray | None, terms: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Forces ``(N, 3)`` [kJ/mol/nm] by term."""
        found = {}
        for name in terms:
            index, group = self._where[name]
            context = self._contexts[index]
            self._put(context, positions, box)
            state = context.getState(forces=True, groups=1 << group)
            found[name] = np.array(state.getForces(asNumpy=True)._value, float)
        return found

    def parameter_energies(self, potential: Potential, terms: Sequence[str]) -> Mapping[str, float]:
        """Energies [kJ/mol] by term with the potential's parameters; NaN if OpenMM refuses them."""
        try:
            for index in sorted({self._where[name][0] for name in terms}):
                self._write(index, potential)
            return {name: self._energy(name, self.positions, self.box) for name in terms}
        except (MDGraftError, openmm.OpenMMException):
            return dict.fromkeys(terms, math.nan)

    def _write(self, index: int, potential: Potential) -> None:
        try:
            write_parameters(potential, self._contexts[index])
        except (MDGraftError, openmm.OpenMMException):
            # Changes of exclusions and the like need a Context of their own.
            system = faithful_copy(self._contexts[index].getSystem())
            write_parameters(potential, system)
            self._contexts[index] = _context(system)

    def _energy(self, name: str, positions: np.ndarray, box: np.ndarray | None) -> float:
        index, group = self._where[name]
        context = self._contexts[index]
        if box is not None and name in self._rectangular and np.tril(box, -1).any():
            return math.nan
        self._put(context, positions, box)
        return number(context.getState(energy=True, groups=1 << group).getPotentialEnergy())

    def _put(self, context: openmm.Context, positions: np.ndarray, box: np.ndarray | None) -> None:
        # Rounding in a file may leave a box a hair outside the reduced form that OpenMM wants.
        if context.getSystem().usesPeriodicBoundaryConditions():
            context.setPeriodicBoxVectors(*(self.box if box is None else box))
        context.setPositions(positions)
        if self._has_sites:
            context.computeVirtualSites()


def _with_groups(system: openmm.System, names: Sequence[str]) -> openmm.System:
    """A copy in which the forces named have groups 0, 1, ... and all others share another."""
    copied = faithful_copy(system)
    for force in copied.getForces():
        force.setForceGroup(_PER_CONTEXT)
        if isinstance(force, openmm.AmoebaMultipoleForce):
            # As the graft has them, whatever the System says.
            force.setMutualInducedTargetEpsilon(min(force.getMutualInducedTargetEpsilon(), 1e-8))
            force.setMutualInducedMaxIterations(max(force.getMutualInducedMaxIterations(), 500))
        if isinstance(force, openmm.NonbondedForce):
            force.setReciprocalSpaceForceGroup(-1)
    forces = energy_forces(copied)
    for group, name in enumerate(names):
        forces[name].setForceGroup(group)
    return copied


def _context(system: openmm.System) -> openmm.Context:
    platform = openmm.Platform.getPlatformByName("Reference")
    try:
        return openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    except openmm.OpenMMException as error:
        raise InvalidInputError(f"system: OpenMM cannot run it ({error})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
