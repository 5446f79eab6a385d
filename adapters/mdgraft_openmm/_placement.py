"""Positions for a System that comes without any."""

from __future__ import annotations

import numpy as np
import openmm
from mdgraft import InvalidInputError

from mdgraft_openmm._converter import number
from mdgraft_openmm._copies import faithful_copy

_VOLUME = 0.05  # [nm^3] a particle gets in an open system
_DISPLACEMENT = 0.005  # [nm] away from the minimum, where too many forces vanish
_LARGE = 300  # particles above which the CPU platform minimises
_DIRECTIONS = 24  # tried for each bond


def generate_positions(system: openmm.System, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Place molecules at random, minimise their energy, and displace every particle a little.

    Parameters
    ----------
    system
        Bonds and constraints say which particles are near each other.
    seed
        Of the random numbers.

    Returns
    -------
    positions
        ``(N, 3)`` [nm]; virtual sites are placed by their parents.
    box
        ``(3, 3)`` the System's default box [nm].

    Raises
    ------
    InvalidInputError
        If OpenMM cannot run the System, or no finite energy was found.
    """
    rng = np.random.default_rng(seed)
    box = np.array([[number(x) for x in row] for row in system.getDefaultPeriodicBoxVectors()])
    n = system.getNumParticles()
    large = n > _LARGE
    context = _context(faithful_copy(system), large)
    room = box
    if not system.usesPeriodicBoundaryConditions():
        room = np.eye(3) * (n * _VOLUME) ** (1 / 3)
    positions = _place(system, context.getMolecules(), room, rng)
    context.setPositions(positions)
    context.computeVirtualSites()
    try:
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
        found = context.getState(positions=True).getPositions(asNumpy=True)._value
        if np.isfinite(found).all():
            positions = np.array(found)
    except openmm.OpenMMException:
        pass  # Overlaps beyond floating point; the placement itself may still do.
    positions = positions + rng.uniform(-_DISPLACEMENT, _DISPLACEMENT, positions.shape)
    context.setPositions(positions)
    context.computeVirtualSites()
    state = context.getState(positions=True, energy=True)
    if not np.isfinite(number(state.getPotentialEnergy())):
        raise InvalidInputError(
            "state: none given, and no positions with a finite energy were found; pass a State "
            "XML or a structure file"
        )
    return np.array(state.getPositions(asNumpy=True)._value, float), box


def _context(system: openmm.System, large: bool) -> openmm.Context:
    names = {
        openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())
    }
    name = "CPU" if large and "CPU" in names else "Reference"
    platform = openmm.Platform.getPlatformByName(name)
    try:
        return openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    except openmm.OpenMMException as error:
        raise InvalidInputError(f"system: OpenMM cannot run it ({error})") from error


def _place(
    system: openmm.System,
    molecules: list[tuple[int, ...]],
    room: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Put molecules on a jittered grid and grow each along its bonds."""
    neighbours = _bonds(system)
    per_side = int(np.ceil(max(len(molecules), 1) ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(per_side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    order = rng.permutation(len(grid))[: len(molecules)]
    centres = ((grid[order] + rng.uniform(0.25, 0.75, (len(order), 3))) / per_side) @ room
    positions = np.zeros((system.getNumParticles(), 3))
    for molecule, centre in zip(molecules, centres, strict=True):
        placed: list[int] = []
        waiting = set(molecule)
        for root in molecule:
            if root not in waiting:
                continue
            positions[root] = centre if not placed else centre + rng.normal(0, 0.15, 3)
            waiting.discard(root)
            placed.append(root)
            stack = [root]
            while stack:
                parent = stack.pop()
                for child, length in neighbours.get(parent, []):
                    if child in waiting:
                        waiting.discard(child)
                        near = positions[placed[-200:]]
                        positions[child] = _grow(positions[parent], length, near, rng)
                        placed.append(child)
                        stack.append(child)
    return positions


def _grow(
    origin: np.ndarray, length: float, near: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Of several random directions, the one that keeps the largest distance to what is near."""
    directions = rng.normal(size=(_DIRECTIONS, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    trial = origin + length * directions
    clearance = np.linalg.norm(trial[:, None] - near[None], axis=-1).min(axis=1)
    return np.asarray(trial[clearance.argmax()])


def _bonds(system: openmm.System) -> dict[int, list[tuple[int, float]]]:
    """Neighbours of each particle by constraints and harmonic bonds, with lengths [nm]."""
    rows = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            rows += [force.getBondParameters(i)[:3] for i in range(force.getNumBonds())]
    found: dict[int, list[tuple[int, float]]] = {}
    for first, second, length in rows:
        found.setdefault(first, []).append((second, number(length)))
        found.setdefault(second, []).append((first, number(length)))
    return found
