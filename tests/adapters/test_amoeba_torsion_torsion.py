"""AmoebaTorsionTorsionForce against OpenMM's Reference platform."""

import pathlib
import xml.etree.ElementTree as ET

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, reference_context

TRICLINIC = np.array([[0.9, 0.0, 0.0], [0.2, 0.95, 0.0], [-0.1, 0.3, 1.0]])


# OpenMM needs at least seven points: it reads beyond the end of smaller grids.
def grid(size, *, derivatives=False, closed=True, transposed=False, seed=0):
    """A smooth random table as OpenMM takes it."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(-180.0, 180.0, size)
    x, y = np.meshgrid(np.deg2rad(angles), np.deg2rad(angles), indexing="ij")
    c = rng.normal(0.0, 6.0, 5)
    energy = c[0] * np.cos(x) + c[1] * np.sin(y) + c[2] * np.cos(x + y) + c[3] * np.sin(2 * x - y)
    if closed:
        energy[-1], energy[:, -1] = energy[0], energy[:, 0]
        energy[-1, -1] = energy[0, 0]
    else:
        energy += c[4] * x
    columns = [np.rad2deg(x), np.rad2deg(y), energy]
    if derivatives:
        columns += [0.02 * rng.normal(size=x.shape) for _ in range(3)]
    table = np.stack(columns, axis=-1)
    return (table.transpose(1, 0, 2) if transposed else table).tolist()


def narrow(table):
    """The same over less than 360 degrees, as some force fields have it."""
    return (np.array(table) * np.array([0.9, 0.8, 1.0])).tolist()


def torsion_system(*, grids, n_torsions=3, check=True, periodic=False, seed=2):
    """Separate chains of five particles with a sixth at the centre."""
    rng = np.random.default_rng(seed)
    system, force = openmm.System(), openmm.AmoebaTorsionTorsionForce()
    system.setDefaultPeriodicBoxVectors(*TRICLINIC)
    for i, table in enumerate(grids):
        force.setTorsionTorsionGrid(i, table)
    positions = []
    for t in range(n_torsions):
        zigzag = np.array([[0.13 * k, 0.09 * (k % 2), 0.0] for k in range(5)])
        chain = zigzag + rng.uniform(-0.05, 0.05, (5, 3))
        # The sixth on alternating sides, so that both senses occur.
        side = chain[2] + np.array([0.0, -0.05, 0.09 * (-1) ** t])
        positions += [*(chain + 0.3 * t), side + 0.3 * t]
        first = 6 * t
        force.addTorsionTorsion(
            *range(first, first + 5), first + 5 if check else -1, t % len(grids)
        )
        for _ in range(6):
            system.addParticle(1.0)
    force.setUsesPeriodicBoundaryConditions(periodic)
    system.addForce(force)
    return system, np.array(positions)


@pytest.mark.parametrize(
    "options",
    [
        dict(grids=[grid(9)]),
        dict(grids=[grid(9)], check=False),
        dict(grids=[grid(7, derivatives=True), grid(8, seed=4)]),
        dict(grids=[grid(8, closed=False), grid(7, transposed=True)]),
        dict(grids=[narrow(grid(9))], n_torsions=2, seed=5),
        dict(grids=[grid(9), grid(7, derivatives=True, seed=3)], periodic=True, n_torsions=4),
    ],
)
def test_agrees(options):
    """Energy, forces, box, tables and second derivatives, in every variant."""
    system, positions = torsion_system(**options)
    assert_agrees(system, positions)


def test_sense_of_the_centre():
    """The mirror image has the same energy with a check particle, and another one without."""
    for check in (True, False):
        system, positions = torsion_system(grids=[grid(9)], check=check)
        potential = mdgraft.graft(system)
        mirrored = positions * np.array([1.0, 1.0, -1.0])
        energies = potential(torch.tensor(np.stack([positions, mirrored])))
        assert bool(torch.isclose(energies[0], energies[1])) is check


def test_particles_in_line():
    """Three collinear particles have no energy, and finite derivatives."""
    system, positions = torsion_system(grids=[grid(9)], n_torsions=1)
    positions[1:4] = [[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]]
    potential = mdgraft.graft(system)
    x = torch.tensor(positions, requires_grad=True)
    energy = potential(x).sum()
    (gradient,) = torch.autograd.grad(energy, x)
    context = reference_context(system)
    context.setPositions(positions)
    assert energy.item() == context.getState(energy=True).getPotentialEnergy()._value == 0.0
    assert gradient.abs().max() == 0


def test_next_to_the_end_of_the_grid():
    """Dihedrals on both sides of 180 degrees; closer to it OpenMM reads beyond its grid."""
    system, positions = torsion_system(grids=[grid(9)], n_torsions=1, check=False)
    context, potential = reference_context(system), mdgraft.graft(system)
    near = []
    for z in (1e-4, -1e-4, 1e-2, -1e-2):
        positions[:4] = [[0, 0, 0], [0.1, 0.1, 0], [0.2, 0, 0], [0.3, 0.1, z]]
        context.setPositions(positions)
        near.append(context.getState(energy=True).getPotentialEnergy()._value)
        assert potential(torch.tensor(positions)).item() == pytest.approx(near[-1], rel=1e-9)
    positions[3, 2] = 0.0
    assert potential(torch.tensor(positions)).item() == pytest.approx(
        0.5 * (near[0] + near[1]), rel=1e-3
    )


def test_amoeba_tables():
    """The grids of the AMOEBA force field, as OpenMM's reader gives them."""
    from openmm import app

    path = pathlib.Path(app.__file__).parent / "data" / "amoeba2018.xml"
    table = ET.parse(path).getroot().find("AmoebaTorsionTorsionForce/TorsionTorsionGrid")
    points = [[float(p.get(key)) for key in ("angle1", "angle2", "f")] for p in table]
    size = int(table.get("nx"))
    system, positions = torsion_system(grids=[np.reshape(points, (size, size, 3)).tolist()])
    assert_agrees(system, positions, gradients=False)


def test_write_back():
    """Tables go into the System with all derivatives; no live Context takes them."""
    system, positions = torsion_system(grids=[grid(9), grid(7, derivatives=True)])
    potential = mdgraft.graft(system)
    with torch.no_grad():
        for value in potential.parameters():
            value.mul_(1.1).add_(0.01)
    with pytest.raises(mdgraft.ParameterMismatchError, match="cannot take over"):
        mdgraft_openmm.write_parameters(potential, reference_context(system))
    mdgraft_openmm.write_parameters(potential, system)
    context = reference_context(system)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(torch.tensor(positions)).item() == pytest.approx(energy, rel=1e-11)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.addTorsionTorsion(0, 1, 2, 3, 99, -1, 0), "entry 3 refers to"),
        (lambda f: f.addTorsionTorsion(0, 1, 2, 3, 4, -2, 0), "chirality check particle -2"),
        (lambda f: f.addTorsionTorsion(0, 1, 2, 3, 4, -1, 1), "entry 3 refers to"),
        (lambda f: f.setTorsionTorsionGrid(0, grid(7)[:4]), "as many points"),
        (lambda f: f.setTorsionTorsionGrid(0, (np.array(grid(7)) ** 3).tolist()), "equal steps"),
    ],
)
def test_refuses_what_makes_no_sense(spoil, message):
    """OpenMM would read beyond its arrays."""
    system, _ = torsion_system(grids=[grid(7)])
    spoil(system.getForce(0))
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)
