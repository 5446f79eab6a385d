"""Write system.xml and state.xml: 100 Br2 molecules, equilibrated at the starting parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
from mdgraft_openmm import Sampler

N_MOLECULES = 100
MASS = 79.904  # Da
BOND = 0.228  # nm
SIGMA, EPSILON = 0.367, 2.46648  # nm, kJ/mol
TEMPERATURE, PRESSURE = 298.15, 1.01325  # K, bar
BOX = 2.3  # nm, more than twice the cutoff


def make_system() -> openmm.System:
    """Rigid molecules of two Lennard-Jones sites without charges."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([BOX, 0, 0], [0, BOX, 0], [0, 0, BOX])
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.85)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.80)
    force.setUseDispersionCorrection(True)
    for molecule in range(N_MOLECULES):
        first, second = 2 * molecule, 2 * molecule + 1
        for _ in range(2):
            system.addParticle(MASS)
            force.addParticle(0.0, SIGMA, EPSILON)
        system.addConstraint(first, second, BOND)
        force.addException(first, second, 0.0, SIGMA, 0.0)
    system.addForce(force)
    return system


def make_positions() -> np.ndarray:
    """Molecules on a lattice, turned at random: ``(2 N_MOLECULES, 3)`` nm."""
    per_side = int(np.ceil(N_MOLECULES ** (1 / 3)))
    lattice = np.array(list(np.ndindex(per_side, per_side, per_side)))[:N_MOLECULES]
    centres = (lattice + 0.5) * BOX / per_side
    directions = np.random.default_rng(1).normal(size=(N_MOLECULES, 3))
    directions *= 0.5 * BOND / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.stack([centres - directions, centres + directions], axis=1).reshape(-1, 3)


def main() -> None:
    """Equilibrate and write."""
    folder = Path(__file__).parent
    system = make_system()
    sampler = Sampler(
        system,
        temperature=TEMPERATURE,
        pressure=PRESSURE,
        timestep=0.004,
        barostat_frequency=5,
        equilibration=300.0,
        seed=1,
    )
    state = sampler.equilibrate(make_positions())
    assert state.box is not None
    context = openmm.Context(system, openmm.VerletIntegrator(0.001))
    context.setPeriodicBoxVectors(*state.box[0].numpy())
    context.setPositions(state.positions[0].numpy())
    final = context.getState(positions=True)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    (folder / "state.xml").write_text(openmm.XmlSerializer.serialize(final))


if __name__ == "__main__":
    main()
