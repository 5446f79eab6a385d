"""Constraints of a System, and projections by a Context."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, SimulationError
from mdgraft.constraints import ConstraintSet
from torch import Tensor

from mdgraft_openmm._adapter import as_host
from mdgraft_openmm._converter import number
from mdgraft_openmm._held import constraint_indices
from mdgraft_openmm.virtual_sites import read_sites


def constraints(
    host_object: Any,
    *,
    exact_lengths: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> ConstraintSet:
    """The constraints, masses and virtual sites of a System.

    Constraints between two massless particles are left out, as OpenMM does. Distances are those
    between the particles themselves, never their images.

    Parameters
    ----------
    host_object
        An ``openmm.System``, ``Context`` or ``app.Simulation``.
    exact_lengths
        OpenMM rounds the lengths of rigid water (what it gives to SETTLE) to single precision, on
        every platform. By default this set does so too, and agrees with OpenMM to the last digits;
        True takes lengths as the System states them.
    dtype, device
        Where and in which precision to project.

    Returns
    -------
    ConstraintSet
        Its constraints are those of the System in the same order, but for those left out.

    Raises
    ------
    InvalidInputError
        For constraints that OpenMM refuses.
    UnsupportedForceError
        For a virtual site without a torch form.
    UnsupportedHostError
        If ``host_object`` is none of these.
    """
    system = as_host(host_object).system
    rows = [system.getConstraintParameters(k) for k in constraint_indices(system)]
    pairs = [(int(i), int(j)) for i, j, _ in rows]
    masses = [number(system.getParticleMass(i)) for i in range(system.getNumParticles())]
    for i, j in pairs:
        if masses[i] == 0 or masses[j] == 0:
            raise InvalidInputError(
                f"host_object: the constraint between particles {i} and {j} involves a massless "
                "particle, which OpenMM refuses too; give both a mass or remove the constraint"
            )
    lengths = np.array([number(d) for _, _, d in rows])
    if not exact_lengths:
        settled = _settled(pairs, lengths)
        lengths[settled] = lengths[settled].astype(np.float32)
    found = ConstraintSet(
        torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        torch.from_numpy(lengths),
        torch.tensor(masses, dtype=torch.float64),
        sites=read_sites(system),
    )
    return found.to(device=device, dtype=dtype)


def _settled(pairs: list[tuple[int, int]], lengths: np.ndarray) -> list[int]:
    """Constraints that OpenMM gives to SETTLE: triangles of their own with two equal sides."""
    of_particle: dict[int, list[int]] = {}
    for k, pair in enumerate(pairs):
        for particle in pair:
            of_particle.setdefault(particle, []).append(k)
    found: set[int] = set()
    for own in of_particle.values():
        if len(own) != 2:
            continue
        corners = {particle for k in own for particle in pairs[k]}
        sides = {k for corner in corners for k in of_particle[corner]}
        if len(corners) != 3 or len(sides) != 3 or any(len(of_particle[c]) != 2 for c in corners):
            continue
        if len({np.float32(lengths[k]) for k in sides}) < 3:
            found |= sides
    return sorted(found)


class HostProjection:
    """Projections that OpenMM computes, for the ``solver`` argument of a `ConstraintSet`.

    ``Context.applyConstraints`` and ``applyVelocityConstraints`` on a Context of its own, on the
    platform of the one that is given. Derivatives are those of the map that OpenMM computes; they
    need a tight tolerance, hence double precision: the Reference platform, or CUDA and OpenCL with
    ``Precision`` "double".

    Parameters
    ----------
    host_object
        ``openmm.Context`` or ``app.Simulation``; also a ``System``, which runs on Reference.
    tolerance
        What OpenMM is asked for, a relative error of a length. Its own default, 1e-5, is too loose
        for derivatives and makes them raise `ConstraintError`.

    Raises
    ------
    UnsupportedHostError
        If ``host_object`` is none of these.
    InvalidInputError
        For a tolerance that is not positive.
    """

    def __init__(self, host_object: Any, *, tolerance: float = 1e-10) -> None:
        host = as_host(host_object)
        if not 0.0 < tolerance < 1.0:
            raise InvalidInputError(
                f"tolerance: got {tolerance!r}, wanted a relative error such as 1e-10"
            )
        self.tolerance = tolerance
        self._context = _context(host.system, host.context)

    def project_positions(self, positions: Tensor) -> Tensor:
        """Positions ``(F, N, 3)`` [nm] by ``applyConstraints``."""
        return torch.stack([self._projected(frame) for frame in positions])

    def project_velocities(self, velocities: Tensor, positions: Tensor) -> Tensor:
        """Velocities ``(F, N, 3)`` [nm/ps] by ``applyVelocityConstraints``."""
        return torch.stack(
            [self._projected(x, v) for x, v in zip(positions, velocities, strict=True)]
        )

    def _projected(self, positions: Tensor, velocities: Tensor | None = None) -> Tensor:
        context = self._context
        try:
            context.setPositions(positions.detach().cpu().double().numpy())
            if velocities is None:
                context.applyConstraints(self.tolerance)
                state = context.getState(positions=True)
                found = state.getPositions(asNumpy=True)
            else:
                context.setVelocities(velocities.detach().cpu().double().numpy())
                context.applyVelocityConstraints(self.tolerance)
                state = context.getState(velocities=True)
                found = state.getVelocities(asNumpy=True)
        except openmm.OpenMMException as error:
            raise SimulationError(
                f"solver: OpenMM could not apply the constraints ({error}); check that positions "
                "are near to meeting them"
            ) from error
        return torch.from_numpy(np.array(found._value))


def _context(system: openmm.System, used: openmm.Context | None) -> openmm.Context:
    """A Context with the constraints alone, which leaves the user's as it is."""
    bare = openmm.System()
    for i in range(system.getNumParticles()):
        bare.addParticle(system.getParticleMass(i))
    for k in constraint_indices(system):
        bare.addConstraint(*system.getConstraintParameters(k))
    integrator = openmm.VerletIntegrator(0.001)
    if used is None:
        return openmm.Context(bare, integrator, openmm.Platform.getPlatform("Reference"))
    platform = used.getPlatform()
    properties = {
        name: platform.getPropertyValue(used, name)
        for name in ("Precision", "DeviceIndex", "Threads")
        if name in platform.getPropertyNames()
    }
    return openmm.Context(bare, integrator, platform, properties)
