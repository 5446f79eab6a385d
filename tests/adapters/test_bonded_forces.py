"""Bonded forces and virtual sites against OpenMM's Reference platform.

HarmonicBondForce, HarmonicAngleForce, PeriodicTorsionForce, RBTorsionForce, CMAPTorsionForce.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from mdgraft_openmm import virtual_sites
from openmm import Vec3, unit
from torch import Tensor

N = 9
BOX = np.array([[1.3, 0.0, 0.0], [0.3, 1.2, 0.0], [-0.4, 0.2, 1.1]])
SIZES = (6, 3, 2, 6)


def _pick(rng: np.random.Generator, n: int) -> list[int]:
    return [int(i) for i in rng.permutation(N)[:n]]


def bonds(rng: np.random.Generator) -> openmm.HarmonicBondForce:
    force = openmm.HarmonicBondForce()
    for _ in range(6):
        force.addBond(*_pick(rng, 2), rng.uniform(0.1, 0.3), rng.uniform(50, 500))
    return force


def angles(rng: np.random.Generator) -> openmm.HarmonicAngleForce:
    force = openmm.HarmonicAngleForce()
    for _ in range(6):
        force.addAngle(*_pick(rng, 3), rng.uniform(0.1, math.pi - 0.1), rng.uniform(5, 50))
    return force


def torsions(rng: np.random.Generator) -> openmm.PeriodicTorsionForce:
    force = openmm.PeriodicTorsionForce()
    for n in (1, 2, 3, 4, 5, 6):
        force.addTorsion(*_pick(rng, 4), n, rng.uniform(-4, 4), rng.uniform(-9, 9))
    return force


def rb_torsions(rng: np.random.Generator) -> openmm.RBTorsionForce:
    force = openmm.RBTorsionForce()
    for _ in range(5):
        force.addTorsion(*_pick(rng, 4), *rng.uniform(-9, 9, 6))
    return force


def cmap_torsions(rng: np.random.Generator) -> openmm.CMAPTorsionForce:
    force = openmm.CMAPTorsionForce()
    for size in SIZES:
        force.addMap(size, rng.normal(size=size * size).tolist())
    for m in (0, 2, 1, 3, 0):
        force.addTorsion(m, *_pick(rng, 8))
    return force


FORCES: list[Callable[[np.random.Generator], Any]] = [
    bonds,
    angles,
    torsions,
    rb_torsions,
    cmap_torsions,
]
# Name of the getter and setter, and where each parameter stands in them.
ENTRIES: dict[str, tuple[str, dict[str, int]]] = {
    "HarmonicBondForce": ("Bond", {"length": 2, "k": 3}),
    "HarmonicAngleForce": ("Angle", {"angle": 3, "k": 4}),
    "PeriodicTorsionForce": ("Torsion", {"phase": 5, "k": 6}),
    "RBTorsionForce": ("Torsion", {f"c{n}": 4 + n for n in range(6)}),
}
each_force = pytest.mark.parametrize("make", FORCES, ids=lambda make: make.__name__)
open_or_periodic = pytest.mark.parametrize("periodic", [False, True], ids=["open", "periodic"])


def _system(force: Any, periodic: bool, n_particles: int = N) -> openmm.System:
    system = openmm.System()
    for _ in range(n_particles):
        system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors(*BOX)
    force.setUsesPeriodicBoundaryConditions(periodic)
    system.addForce(force)
    return system


def _context(system: openmm.System) -> openmm.Context:
    platform = openmm.Platform.getPlatformByName("Reference")
    return openmm.Context(system, openmm.VerletIntegrator(0.001), platform)


def _positions(seed: int, n_frames: int = 1, n_particles: int = N) -> np.ndarray:
    """Frames whose particles lie in and around the box."""
    rng = np.random.default_rng(seed)
    inside = rng.uniform(0.0, 1.0, (n_frames, n_particles, 3)) @ BOX
    return inside + rng.integers(-1, 2, inside.shape) @ BOX * 0.5


def _energy(context: openmm.Context, positions: np.ndarray, box: np.ndarray = BOX) -> float:
    context.setPeriodicBoxVectors(*box)
    context.setPositions(positions)
    context.computeVirtualSites()
    return context.getState(energy=True).getPotentialEnergy()._value


def _forces(context: openmm.Context, positions: np.ndarray) -> np.ndarray:
    context.setPositions(positions)
    context.computeVirtualSites()
    return context.getState(forces=True).getForces(asNumpy=True)._value


def _slope(function: Callable[[float], Any], h: float = 1e-4) -> Any:
    """Derivative at zero to fourth order."""
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


def _box_slopes(context: openmm.Context, positions: np.ndarray) -> np.ndarray:
    """Derivatives with respect to the lower triangle of the box, at fixed positions."""
    slopes = np.zeros((3, 3))
    for i, j in zip(*np.tril_indices(3), strict=True):

        def energy(h: float, i: int = i, j: int = j) -> float:
            box = BOX.copy()
            box[i, j] += h
            return _energy(context, positions, box)

        slopes[i, j] = _slope(energy)
    return slopes


def _box_gradient(potential: mdgraft.Potential, positions: np.ndarray) -> np.ndarray:
    box = torch.tensor(BOX, requires_grad=True)
    (gradient,) = torch.autograd.grad(potential(positions, box), box)
    return np.tril(gradient.numpy())


# Forces -----------------------------------------------------------------------------------------


@each_force
@open_or_periodic
def test_energies_and_forces(make: Callable[..., Any], periodic: bool) -> None:
    system = _system(make(np.random.default_rng(1)), periodic)
    context, potential = _context(system), mdgraft.graft(system)
    assert potential.periodic is periodic
    frames = _positions(2, 8)
    energies = potential(frames, BOX if periodic else None).detach().numpy()
    forces = potential.forces(frames, BOX if periodic else None).detach().numpy()
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        expected = _forces(context, frame)
        assert energy == pytest.approx(_energy(context, frame), rel=1e-9, abs=1e-9)
        np.testing.assert_allclose(force, expected, rtol=1e-8, atol=1e-9 * abs(expected).max())


@each_force
def test_box_derivatives(make: Callable[..., Any]) -> None:
    system = _system(make(np.random.default_rng(3)), True)
    positions = _positions(4)[0]
    expected = _box_slopes(_context(system), positions)
    found = _box_gradient(mdgraft.graft(system), positions)
    assert abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def _changed(
    force: Any, context: openmm.Context, positions: np.ndarray, change: Callable[[float], None]
) -> Callable[[float], float]:
    """Energy of the host as a function of a change of its parameters."""

    def energy(h: float) -> float:
        change(h)
        force.updateParametersInContext(context)
        return _energy(context, positions)

    return energy


@pytest.mark.parametrize("make", FORCES[:-1], ids=lambda make: make.__name__)
def test_parameter_gradients(make: Callable[..., Any]) -> None:
    system = _system(make(np.random.default_rng(5)), True)
    force, context, positions = system.getForce(0), _context(system), _positions(6)[0]
    potential = mdgraft.graft(system)
    potential(positions, BOX).backward()
    parameters = dict(potential.named_parameters())
    name = force.getName()
    kind, columns = ENTRIES[name]
    assert set(parameters) == {f"{name}.{column}" for column in columns}
    getter = getattr(force, f"get{kind}Parameters")
    setter = getattr(force, f"set{kind}Parameters")
    for column, place in columns.items():
        for i in range(getattr(force, f"getNum{kind}s")()):
            row = [getattr(value, "_value", value) for value in getter(i)]

            def change(h: float, i: int = i, p: int = place, row: list[Any] = row) -> None:
                setter(i, *row[:p], row[p] + h, *row[p + 1 :])

            slope = _slope(_changed(force, context, positions, change), 1e-3)
            change(0.0)
            gradient = parameters[f"{name}.{column}"].grad[i].item()
            assert gradient == pytest.approx(slope, rel=1e-8, abs=1e-8)


def test_gradients_of_torsion_maps() -> None:
    system = _system(cmap_torsions(np.random.default_rng(5)), True)
    force, context, positions = system.getForce(0), _context(system), _positions(6)[0]
    potential = mdgraft.graft(system)
    potential(positions, BOX).backward()
    ((name, parameter),) = potential.named_parameters()
    assert name == "CMAPTorsionForce.energy"
    slopes = []
    for m, size in enumerate(SIZES):
        values = np.array(force.getMapParameters(m)[1]._value)
        for row in np.eye(size * size):

            def change(h: float, m: int = m, v: np.ndarray = values, row: np.ndarray = row) -> None:
                force.setMapParameters(m, math.isqrt(len(v)), (v + h * row).tolist())

            slopes.append(_slope(_changed(force, context, positions, change), 0.1))
            change(0.0)
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(parameter.grad.numpy(), slopes, rtol=1e-9, atol=1e-10)


@each_force
@open_or_periodic
def test_second_derivatives(make: Callable[..., Any], periodic: bool) -> None:
    system = _system(make(np.random.default_rng(7)), periodic)
    context, potential = _context(system), mdgraft.graft(system)
    positions = _positions(8)[0]
    direction = np.random.default_rng(9).normal(size=(N, 3))
    expected = _slope(lambda h: -_forces(context, positions + h * direction), 2e-5)
    x = torch.tensor(positions, requires_grad=True)
    forces = potential.forces(x, BOX if periodic else None)
    (found,) = torch.autograd.grad(-forces, x, torch.tensor(direction))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@each_force
def test_single_precision(make: Callable[..., Any]) -> None:
    system = _system(make(np.random.default_rng(10)), True)
    context, potential = _context(system), mdgraft.graft(system, dtype=torch.float32)
    positions = _positions(11)[0]
    energy = potential(positions, BOX)
    assert energy.dtype == torch.float32
    assert energy.item() == pytest.approx(_energy(context, positions), rel=1e-4, abs=1e-4)
    expected = _forces(context, positions)
    np.testing.assert_allclose(
        potential.forces(positions, BOX).detach(),
        expected,
        rtol=1e-3,
        atol=1e-3 * abs(expected).max(),
    )


@each_force
@pytest.mark.parametrize("live", [False, True], ids=["system", "context"])
def test_changed_parameters_are_written_back(make: Callable[..., Any], live: bool) -> None:
    system = _system(make(np.random.default_rng(12)), True)
    host = _context(system) if live else system
    potential, positions = mdgraft.graft(system), _positions(13)[0]
    before = potential(positions, BOX).item()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(0.9)
    mdgraft_openmm.write_parameters(potential, host)
    after = _energy(host if live else _context(system), positions)
    assert after == pytest.approx(potential(positions, BOX).item(), rel=1e-9)
    assert after != pytest.approx(before, rel=1e-3)


def test_collinear_angles_and_torsions_have_the_energy_of_the_host() -> None:
    """Its forces are not compared: OpenMM divides by zero there."""
    # In powers of two, for the host takes the arc cosine of a rounded cosine.
    rows = [[0.0, 0, 0], [0.125, 0, 0], [0.375, 0, 0], [0.5, 0, 0]]
    rows += [[0.5, 0.1, 0], [0.6, 0.1, 0], [0.6, 0.2, 0.1], [0.7, 0.2, 0.3], [0.8, 0.1, 0.5]]
    cases: list[Any] = [openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()]
    cases += [openmm.RBTorsionForce(), openmm.CMAPTorsionForce()]
    cases[0].addAngle(0, 1, 2, 1.9, 40.0)
    cases[1].addTorsion(0, 1, 2, 3, 1, 0.4, 7.0)
    cases[2].addTorsion(0, 1, 2, 3, *(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    cases[3].addMap(5, np.random.default_rng(14).normal(size=25).tolist())
    cases[3].addTorsion(0, 0, 1, 2, 3, 4, 5, 6, 7)
    for force in cases:
        system = _system(force, False)
        energy = _energy(_context(system), np.array(rows))
        assert mdgraft.graft(system)(rows).item() == pytest.approx(energy, rel=1e-9)


@each_force
@open_or_periodic
def test_forces_without_interactions(make: Callable[..., Any], periodic: bool) -> None:
    empty = type(make(np.random.default_rng(0)))()
    system = _system(empty, periodic)
    potential = mdgraft.graft(system)
    frames = _positions(15, 2)
    assert potential(frames, BOX).tolist() == [0.0, 0.0]
    assert potential.forces(frames, BOX).abs().max() == 0.0
    mdgraft_openmm.write_parameters(potential, system)


def _illegal() -> list[tuple[Any, str]]:
    cases: list[Any] = [openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()]
    cases += [openmm.PeriodicTorsionForce(), openmm.RBTorsionForce(), openmm.CMAPTorsionForce()]
    cases[0].addBond(0, N, 0.1, 1.0)
    cases[1].addAngle(0, -1, 2, 0.1, 1.0)
    cases[2].addTorsion(0, 1, 2, N, 1, 0.1, 1.0)
    cases[3].addTorsion(0, 1, 2, N, *[0.0] * 6)
    cases[4].addMap(3, [0.0] * 9)
    cases[4].addTorsion(0, 0, 1, 2, 3, 4, 5, 6, N)
    named = [(force, f"{type(force).__name__}: entry 0 refers to") for force in cases]
    flat = openmm.PeriodicTorsionForce()
    flat.addTorsion(0, 1, 2, 3, 0, 0.1, 1.0)
    lost = openmm.CMAPTorsionForce()
    lost.addMap(3, [0.0] * 9)
    lost.addTorsion(1, *range(8))
    small = openmm.CMAPTorsionForce()
    small.addMap(1, [0.0])
    short = openmm.HarmonicBondForce()
    short.addBond(0, 1, -0.1, 1.0)
    wide = openmm.HarmonicAngleForce()
    wide.addAngle(0, 1, 2, 3.2, 1.0)
    return named + [
        (short, "HarmonicBondForce.length: entry 0 is -0.1 nm; OpenMM accepts only lengths"),
        (wide, "HarmonicAngleForce.angle: entry 0 is 3.2 radian; OpenMM accepts only angles"),
        (flat, "torsion 0 of PeriodicTorsionForce has periodicity 0, wanted at least 1"),
        (lost, "maps: indices reach from 1 to 1, there are 1 maps"),
        (small, r"sizes: got \[1\]; a periodic spline needs at least 2 points"),
    ]


@pytest.mark.parametrize(("force", "message"), _illegal())
def test_illegal_forces_are_named(force: Any, message: str) -> None:
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(_system(copy.deepcopy(force), False))


def test_angles_that_no_context_accepts_are_not_written() -> None:
    system = _system(angles(np.random.default_rng(16)), False)
    potential = mdgraft.graft(system)
    before = openmm.XmlSerializer.serialize(system)
    with torch.no_grad():
        dict(potential.named_parameters())["HarmonicAngleForce.angle"][3] = -0.2
    with pytest.raises(mdgraft.ParameterMismatchError, match=r"angle: entry 3 is -0.2 radian"):
        mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before


# Virtual sites ----------------------------------------------------------------------------------

TURN, _ = np.linalg.qr(np.random.default_rng(17).normal(size=(3, 3)))
SHIFT = Vec3(0.1, 0.2, 0.3)
SITES: dict[str, Callable[[], Any]] = {
    "two": lambda: openmm.TwoParticleAverageSite(0, 1, 0.3, 0.8),
    "three": lambda: openmm.ThreeParticleAverageSite(0, 1, 2, 0.3, 0.8, -0.2),
    "out_of_plane": lambda: openmm.OutOfPlaneSite(0, 1, 2, 0.3, 0.4, 2.0),
    "local": lambda: openmm.LocalCoordinatesSite(
        0, 1, 2, Vec3(0.3, 0.3, 0.4), Vec3(-1, 0.4, 0.6), Vec3(0.5, 0.6, -1.1), SHIFT
    ),
    "local_of_two": lambda: openmm.LocalCoordinatesSite(
        [0, 1], [0.3, 0.7], [-1, 1], [0.5, -0.5], SHIFT
    ),
    "local_of_five": lambda: openmm.LocalCoordinatesSite(
        [0, 1, 2, 3, 4],
        [0.2, 0.3, 0.1, 0.1, 0.3],
        [-1, 0.4, 0.6, 0.3, -0.3],
        [0.5, 0.6, -1.1, 0.2, -0.2],
        SHIFT,
    ),
    "symmetry": lambda: openmm.SymmetrySite(0, *(Vec3(*row) for row in TURN), SHIFT, False),
    "fractional": lambda: openmm.SymmetrySite(0, *(Vec3(*row) for row in TURN), SHIFT, True),
}
each_site = pytest.mark.parametrize("name", SITES)


def _system_with_sites(name: str) -> openmm.System:
    """Site 6 by the rule, 4 or 8 depending on it, and bonds and angles on all of them."""
    rng = np.random.default_rng(18)
    force = openmm.HarmonicAngleForce()
    for i in range(N):
        force.addAngle(i, (i + 2) % N, (i + 5) % N, rng.uniform(1, 2), rng.uniform(5, 50))
    system = _system(force, False)
    system.addForce(bonds(rng))
    chained = (4, 8) if name != "local_of_five" else (7, 8)
    for i in (6, *chained):
        system.setParticleMass(i, 0.0)
    system.setVirtualSite(6, SITES[name]())
    system.setVirtualSite(chained[0], openmm.OutOfPlaneSite(6, 8, 3, 0.3, 0.2, 0.5))
    system.setVirtualSite(8, openmm.TwoParticleAverageSite(6, 5, 0.4, 0.6))
    return system


def _massive(system: openmm.System) -> list[int]:
    return [i for i in range(N) if not system.isVirtualSite(i)]


@each_site
def test_sites_are_placed_as_by_the_host(name: str) -> None:
    system = _system_with_sites(name)
    context, potential = _context(system), mdgraft.graft(system)
    assert potential.periodic is (name == "fractional")
    frames = _positions(19, 4)
    assert potential.sites is not None
    placed = potential.sites(torch.tensor(frames), torch.tensor(BOX).expand(4, 3, 3))
    for frame, found in zip(frames, placed, strict=True):
        energy = _energy(context, frame)
        expected = context.getState(positions=True).getPositions(asNumpy=True)._value
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        assert potential(frame, BOX).item() == pytest.approx(energy, rel=1e-9)


@each_site
def test_forces_reach_the_parents(name: str) -> None:
    """OpenMM spreads forces of fractional sites rightly in rectangular boxes only."""
    system = _system_with_sites(name)
    box = np.diag(np.diag(BOX)) if name == "fractional" else BOX
    system.setDefaultPeriodicBoxVectors(*box)
    context, potential = _context(system), mdgraft.graft(system)
    frame, massive = _positions(20)[0], _massive(system)
    found, expected = potential.forces(frame, box).detach().numpy(), _forces(context, frame)
    np.testing.assert_allclose(
        found[massive], expected[massive], rtol=1e-8, atol=1e-9 * abs(expected).max()
    )
    assert not found[[i for i in range(N) if i not in massive]].any()


@each_site
def test_forces_are_the_gradient_of_the_energy_of_the_host(name: str) -> None:
    system = _system_with_sites(name)
    context, potential = _context(system), mdgraft.graft(system)
    frame, massive = _positions(21)[0], _massive(system)
    rng = np.random.default_rng(22)
    found = potential.forces(frame, BOX).detach().numpy()
    for _ in range(3):
        direction = np.zeros((N, 3))
        direction[massive] = rng.normal(size=(len(massive), 3))
        slope = _slope(lambda h, d=direction: _energy(context, frame + h * d), 1e-4)
        assert -(found * direction).sum() == pytest.approx(slope, rel=1e-7, abs=1e-6)


def test_the_box_moves_fractional_sites() -> None:
    system = _system_with_sites("fractional")
    frame = _positions(23)[0]
    expected = _box_slopes(_context(system), frame)
    assert abs(expected).max() > 1.0
    found = _box_gradient(mdgraft.graft(system), frame)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


@each_site
def test_second_derivatives_through_sites(name: str) -> None:
    system = _system_with_sites(name)
    potential, frame, massive = mdgraft.graft(system), _positions(24)[0], _massive(system)
    box = np.diag(np.diag(BOX)) if name == "fractional" else BOX
    system.setDefaultPeriodicBoxVectors(*box)
    context = _context(system)
    direction = np.zeros((N, 3))
    direction[massive] = np.random.default_rng(25).normal(size=(len(massive), 3))
    expected = _slope(lambda h: -_forces(context, frame + h * direction), 2e-5)
    x = torch.tensor(frame, requires_grad=True)
    (found,) = torch.autograd.grad(-potential.forces(x, box), x, torch.tensor(direction))
    scale = abs(expected[massive]).max()
    np.testing.assert_allclose(found[massive], expected[massive], rtol=1e-5, atol=1e-5 * scale)


def test_transforms_run_through_sites_and_terms() -> None:
    potential = mdgraft.graft(_system_with_sites("local"))
    frames = torch.tensor(_positions(26, 3))
    loop = torch.stack([potential(frame) for frame in frames])
    torch.testing.assert_close(torch.vmap(potential)(frames), loop, rtol=1e-12, atol=1e-12)
    values: dict[str, Tensor] = {n: p.detach() for n, p in potential.named_parameters()}
    per_frame = torch.vmap(
        torch.func.grad(lambda v, x: torch.func.functional_call(potential, v, (x,))), (None, 0)
    )(values, frames)
    for name, parameter in potential.named_parameters():
        together = torch.autograd.grad(potential(frames).sum(), parameter)[0]
        torch.testing.assert_close(per_frame[name].sum(dim=0), together)


def test_an_unknown_class_of_site_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version of OpenMM may bring one."""
    monkeypatch.delitem(virtual_sites._READERS, "OutOfPlaneSite")
    with pytest.raises(mdgraft.UnsupportedForceError, match="site of class OutOfPlaneSite, which"):
        mdgraft.graft(_system_with_sites("two"))
    monkeypatch.undo()
    monkeypatch.setattr(virtual_sites, "_XML_READERS", {})
    with pytest.raises(mdgraft.UnsupportedForceError, match=r"particle 6 .* SymmetrySite, which"):
        mdgraft.graft(_system_with_sites("symmetry"))


def test_circular_sites_are_named() -> None:
    system = _system(openmm.HarmonicBondForce(), False)
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 4, 0.5, 0.5))
    system.setVirtualSite(4, openmm.TwoParticleAverageSite(0, 3, 0.5, 0.5))
    with pytest.raises(mdgraft.InvalidInputError, match=r"sites \[3, 4\] are circular"):
        mdgraft.graft(system)


def test_a_parent_outside_of_the_system_is_named() -> None:
    system = _system(openmm.HarmonicBondForce(), False)
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, N, 0.5, 0.5))
    with pytest.raises(mdgraft.InvalidInputError, match=f"site 3 names particle {N}"):
        mdgraft.graft(system)


def test_positions_keep_their_digits_in_every_form() -> None:
    """Lists of Python floats too, which torch reads in single precision by default."""
    system = _system(torsions(np.random.default_rng(27)), True)
    potential, array = mdgraft.graft(system), _positions(28)[0]
    vectors = [Vec3(*row) for row in array]
    expected = potential(torch.tensor(array), torch.tensor(BOX)).item()
    forms = [array, array.tolist(), vectors, vectors * unit.nanometer, array * 10 * unit.angstrom]
    for form in forms:
        assert potential(form, BOX.tolist()).item() == pytest.approx(expected, rel=1e-12)
