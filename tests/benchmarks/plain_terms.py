"""Ratio of the plain torch terms to OpenMM's CPU platform, measured alternately in one process."""

import argparse
import statistics
import time
from pathlib import Path

import mdgraft
import numpy as np
import openmm
import openmm.app as app
import torch
from rich.console import Console
from rich.table import Table


def lennard_jones(n_side=22):
    """A switched Lennard-Jones fluid of argon-like atoms near a simple cubic lattice."""
    spacing, n = 0.365, n_side**3
    system, force = openmm.System(), openmm.NonbondedForce()
    system.addForce(force)
    length = n_side * spacing
    system.setDefaultPeriodicBoxVectors((length, 0, 0), (0, length, 0), (0, 0, length))
    for _ in range(n):
        system.addParticle(39.9)
        force.addParticle(0.0, 0.34, 0.996)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(1.0)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.9)
    lattice = np.stack(np.meshgrid(*[np.arange(n_side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    jitter = np.random.default_rng(0).normal(size=(n, 3)) * 0.02
    return system, lattice * spacing + jitter


def water():
    """OpenMM's own box of 895 TIP3P molecules with PME."""
    pdb = app.PDBFile(str(Path(app.__file__).parent / "data" / "tip3p.pdb"))
    system = app.ForceField("tip3p.xml").createSystem(
        pdb.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9
    )
    return system, pdb.positions


def ratios(system, positions, threads, repeats):
    """Pairwise ratios: graft with all gradients over OpenMM's energy and forces."""
    torch.set_num_threads(threads)
    context = openmm.Context(
        system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("CPU"),
        {"Threads": str(threads)},
    )
    context.setPositions(positions)
    state = context.getState(positions=True)
    box = torch.tensor(state.getPeriodicBoxVectors(asNumpy=True)._value)
    start = torch.tensor(state.getPositions(asNumpy=True)._value)
    potential = mdgraft.graft(context)
    rng = np.random.default_rng(1)
    found = []
    for repeat in range(repeats + 1):
        # Both sides rebuild their neighbour lists.
        x = start + 0.001 * repeat * torch.tensor(rng.normal(size=start.shape))
        context.setPositions(x.numpy())
        begin = time.perf_counter()
        context.getState(energy=True, forces=True)
        middle = time.perf_counter()
        potential.zero_grad()
        potential(x.requires_grad_(), box).backward()
        end = time.perf_counter()
        if repeat:
            found.append((end - middle) / (middle - begin))
    return found


def main():
    """Print one row for each system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    table = Table(
        title=f"torch energy, forces and all gradients / OpenMM CPU, {arguments.threads} thread(s)"
    )
    for column in ("system", "atoms", "median ratio", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, build in {"Lennard-Jones": lennard_jones, "TIP3P water, PME": water}.items():
        system, positions = build()
        found = ratios(system, positions, arguments.threads, arguments.repeats)
        values = (statistics.median(found), min(found), max(found))
        table.add_row(name, str(system.getNumParticles()), *(f"{value:.1f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
