"""Comparing grafts with OpenMM: grafts that are right pass, grafts that are wrong do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdgraft
import mdgraft_openmm.check
import numpy as np
import openmm
import pytest
import torch
from mdgraft import BoxTooSmallError, InvalidInputError, UnsupportedForceError, UntrustedInputError
from mdgraft.potentials.bonded import HarmonicBond
from mdgraft_openmm._placement import generate_positions
from mdgraft_openmm.check import CheckReport, check

N = 8


def new_system() -> openmm.System:
    system = openmm.System()
    for _ in range(N):
        system.addParticle(12.0)
    return system


def bonds(system: openmm.System, *, name: str = "HarmonicBondForce", periodic: bool = False) -> Any:
    force = openmm.HarmonicBondForce()
    force.setName(name)
    force.setUsesPeriodicBoundaryConditions(periodic)
    for i in range(N - 1):
        force.addBond(i, i + 1, 0.15 + 0.01 * i, 1000.0 + 10 * i)
    system.addForce(force)
    return force


def nonbonded(system: openmm.System, method: int) -> openmm.NonbondedForce:
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(method)
    force.setCutoffDistance(0.9)
    for i in range(N):
        force.addParticle(0.3 * (-1) ** i if i != 2 else 0.0, 0.2 + 0.01 * i, 0.4 * (i != 5))
    for i in range(N - 1):
        force.addException(i, i + 1, 0.0, 0.3, 0.0)
    for i in range(N - 2):
        force.addException(i, i + 2, 0.05 * (i % 2), 0.25, 0.2 * (i % 3))
    system.addForce(force)
    return force


def many_forces() -> openmm.System:
    system = new_system()
    for i in range(35):
        bonds(system, name=("bond", "bond", "another")[i % 3], periodic=i % 2 == 0)
        system.getForce(i).setBondParameters(0, 0, 1, 0.1 + 0.001 * i, 500.0 + i)
    return system


def switched() -> openmm.System:
    system = new_system()
    bonds(system)
    force = nonbonded(system, openmm.NonbondedForce.CutoffPeriodic)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.7)
    force.setReciprocalSpaceForceGroup(3)
    force.addGlobalParameter("scale", 0.7)
    force.addParticleParameterOffset("scale", 3, 0.1, 0.02, 0.3)
    force.addExceptionParameterOffset("scale", 8, 0.1, 0.02, 0.3)
    system.setDefaultPeriodicBoxVectors([2.5, 0, 0], [0.3, 2.4, 0], [-0.4, 1.1, 2.6])
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    system.addForce(openmm.CMMotionRemover())
    return system


def mesh(method: int = openmm.NonbondedForce.PME) -> openmm.System:
    """PME in a box at the very limit of the reduced form, with a cutoff of half the box."""
    system = new_system()
    bonds(system, periodic=True)
    nonbonded(system, method).setReciprocalSpaceForceGroup(5)
    if method == openmm.NonbondedForce.Ewald:
        system.setDefaultPeriodicBoxVectors([1.8, 0, 0], [0, 1.9, 0], [0, 0, 2.0])
    else:
        edge = 1.8 * np.sqrt(2)
        system.setDefaultPeriodicBoxVectors(
            [edge, 0, 0], [0, edge, 0], [edge / 2, edge / 2, edge / np.sqrt(2)]
        )
    return system


def sites() -> openmm.System:
    """Three-atom molecules with two kinds of virtual site, one of them charged."""
    system = openmm.System()
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(0.8)
    for first in (0, 5):
        for mass in (16.0, 1.0, 1.0, 0.0, 0.0):
            system.addParticle(mass)
        for a, b, length in ((0, 1, 0.096), (0, 2, 0.096), (1, 2, 0.15)):
            system.addConstraint(first + a, first + b, length)
        parents = (first, first + 1, first + 2)
        system.setVirtualSite(
            first + 3, openmm.ThreeParticleAverageSite(*parents, 0.78, 0.11, 0.11)
        )
        system.setVirtualSite(first + 4, openmm.OutOfPlaneSite(*parents, 0.3, 0.3, 6.0))
        for charge, epsilon in ((0.0, 0.6), (0.5, 0.0), (0.5, 0.0), (-0.7, 0.0), (-0.3, 0.0)):
            force.addParticle(charge, 0.31, epsilon)
        for a in range(5):
            for b in range(a):
                force.addException(first + a, first + b, 0.0, 0.3, 0.0)
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors([1.8, 0, 0], [0, 1.8, 0], [0, 0, 1.8])
    return system


SYSTEMS: dict[str, Callable[[], openmm.System]] = {
    "switched, triclinic, offsets": switched,
    "PME at the limits of the box": mesh,
    "Ewald": lambda: mesh(openmm.NonbondedForce.Ewald),
    "virtual sites": sites,
}


def save(folder: Path, system: openmm.System) -> Path:
    path = folder / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(system))
    return path


def rows(report: CheckReport, quantity: str) -> dict[tuple[str, str], str]:
    found = [row for row in report.comparisons if row.quantity == quantity]
    return {(row.term, row.detail): row.status for row in found}


@pytest.mark.parametrize("build", SYSTEMS.values(), ids=SYSTEMS)
def test_good_grafts_agree(tmp_path: Path, build: Callable[[], openmm.System]) -> None:
    path = save(tmp_path, build())
    report = check(path, gradients=True)
    failing = [row for row in report.comparisons if row.status not in ("agrees", "skipped")]
    assert not failing
    assert report.agrees
    assert report.positions.startswith("generated")
    # Every family that is not empty is told about, whether compared or not.
    potential = mdgraft.graft(build())
    families = {name for name, value in potential.named_parameters() if value.numel()}
    told = {detail.partition(",")[0] for _, detail in rows(report, "parameter")}
    assert told == families
    assert "NonbondedForce" in {term for term, _ in rows(report, "box")}
    assert path.read_text() == openmm.XmlSerializer.serialize(build())


def test_more_forces_than_groups(tmp_path: Path) -> None:
    system = many_forces()
    report = check(save(tmp_path, system))
    assert report.agrees
    energies = rows(report, "energy")
    assert len(energies) == 36
    assert ("bond_5", "") in energies
    by_name = {r.term: r.host for r in report.comparisons if r.quantity == "energy"}
    assert by_name["total"] == pytest.approx(sum(e for n, e in by_name.items() if n != "total"))
    assert len(set(by_name.values())) == 36


def test_a_state_gives_positions_and_box(tmp_path: Path) -> None:
    system = switched()
    positions, box = generate_positions(system, seed=3)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPeriodicBoxVectors(*(1.1 * box))
    context.setPositions(positions)
    state = context.getState(positions=True, energy=True)
    path = tmp_path / "state.xml"
    path.write_text(openmm.XmlSerializer.serialize(state))
    report = check(save(tmp_path, system), path)
    total = next(r for r in report.comparisons if (r.term, r.quantity) == ("total", "energy"))
    assert total.host == pytest.approx(state.getPotentialEnergy()._value, rel=1e-12)
    assert report.agrees
    assert report.state == str(path)


def test_rounding_of_nothing_is_no_difference(tmp_path: Path) -> None:
    """Torsions of a planar molecule: neither energy nor forces say how large rounding is."""
    system = new_system()
    torsions = openmm.PeriodicTorsionForce()
    for i in range(N - 3):
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 1 + i % 2, np.pi * (i % 2), 40.0)
    system.addForce(torsions)
    positions = np.array([[0.12 * i, 0.05 * (i % 2), 0.0] for i in range(N)])
    context = openmm.Context(system, openmm.VerletIntegrator(0.001))
    context.setPositions(positions)
    state = tmp_path / "state.xml"
    state.write_text(openmm.XmlSerializer.serialize(context.getState(positions=True)))
    report = check(save(tmp_path, system), state, gradients=True)
    assert report.agrees, [row for row in report.comparisons if row.status == "differs"]


def test_generated_positions_follow_the_seed() -> None:
    first, box = generate_positions(switched(), seed=1)
    again, _ = generate_positions(switched(), seed=1)
    other, _ = generate_positions(switched(), seed=2)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    assert np.allclose(box[2], [-0.4, 1.1, 2.6])


def scaled(name: str, factor: float) -> Callable[..., mdgraft.Potential]:
    """Graft, and then spoil one parameter."""
    original = mdgraft.graft

    def wrong(host: Any, **options: Any) -> mdgraft.Potential:
        potential = original(host, **options)
        with torch.no_grad():
            dict(potential.named_parameters())[name].mul_(factor)
        return potential

    return wrong


@pytest.mark.parametrize(
    "name", ["HarmonicBondForce.k", "NonbondedForce.charge", "NonbondedForce.epsilon"]
)
def test_wrong_parameters_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(mdgraft_openmm.check.mdgraft, "graft", scaled(name, 1 + 1e-6))
    report = check(save(tmp_path, mesh()))
    assert not report.agrees
    spoilt = name.partition(".")[0]
    for quantity in ("energy", "forces"):
        status = rows(report, quantity)
        assert status[(spoilt, "")] == "differs"
        assert status[("total", "")] == "differs"
    sound = ({"HarmonicBondForce", "NonbondedForce"} - {spoilt}).pop()
    assert rows(report, "energy")[(sound, "")] == "agrees"


def test_missing_gradients_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = HarmonicBond.forward

    def detached(self: Any, x: Any, box: Any, values: Any, shared: Any) -> torch.Tensor:
        cut = {**values, "k": values["k"].detach()}
        return original(self, x, None if box is None else box.detach(), cut, shared)

    monkeypatch.setattr(HarmonicBond, "forward", detached)
    system = new_system()
    bonds(system, periodic=True)
    # Spread out over the box, so that some bonds cross its boundary.
    system.setDefaultPeriodicBoxVectors([0.4, 0, 0], [0, 0.4, 0], [0, 0, 0.4])
    report = check(save(tmp_path, system), gradients=True)
    assert rows(report, "energy")[("HarmonicBondForce", "")] == "agrees"
    assert rows(report, "box")[("HarmonicBondForce", "")] == "differs"
    parameters = rows(report, "parameter")
    assert parameters[("HarmonicBondForce", "HarmonicBondForce.k, random direction")] == "differs"
    length = ("HarmonicBondForce", "HarmonicBondForce.length, random direction")
    assert parameters[length] == "agrees"


def test_a_nan_never_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mdgraft_openmm.check.mdgraft, "graft", scaled("HarmonicBondForce.k", float("nan"))
    )
    system = new_system()
    bonds(system)
    report = check(save(tmp_path, system))
    assert rows(report, "energy")[("HarmonicBondForce", "")] == "differs"
    assert rows(report, "forces")[("HarmonicBondForce", "")] == "differs"
    # JSON has no NaN.
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["comparisons"][0]["graft"] is None


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="came with OpenMM 8.5")
def test_forces_without_a_native_form(tmp_path: Path) -> None:
    """OpenMM evaluates them on both sides."""
    system = new_system()
    bonds(system)
    system.addForce(openmm.PythonForce(quartic, {"k": 2.5}))
    path = save(tmp_path, system)
    with pytest.raises(UntrustedInputError, match="PythonForce"):
        check(path)
    report = check(path, trust=True, gradients=True)
    assert report.agrees
    assert report.routes == {"HarmonicBondForce": "native", "PythonForce": "host"}


def quartic(state: Any) -> Any:
    """At module level, so that it can be pickled."""
    k, x = state.getParameters()["k"], state.getPositions(asNumpy=True)._value
    return k * np.sum(x**4), -4 * k * x**3


def test_what_openmm_computes_in_single_precision(tmp_path: Path) -> None:
    """Its tails of custom forces are good to 1e-6, which is no fault of the graft."""
    system = new_system()
    system.setDefaultPeriodicBoxVectors([2, 0, 0], [0, 2, 0], [0, 0, 2])
    force = openmm.CustomNonbondedForce("e*((s/r)^12-(s/r)^6); e=sqrt(e1*e2); s=0.5*(s1+s2)")
    force.setNonbondedMethod(force.CutoffPeriodic)
    force.setCutoffDistance(0.7)
    force.setUseLongRangeCorrection(True)
    for name in ("s", "e"):
        force.addPerParticleParameter(name)
    for i in range(N):
        force.addParticle([0.2 + 0.01 * i, 0.5])
    system.addForce(force)
    report = check(save(tmp_path, system))
    assert report.agrees
    assert any("computes it to about 1e-06 only" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    ("kind", "error"), [("TorchForce", UntrustedInputError), ("PlumedForce", UnsupportedForceError)]
)
def test_forces_of_plugins_are_not_read(kind: str, error: type, tmp_path: Path) -> None:
    system = new_system()
    bonds(system)
    path = save(tmp_path, system)
    path.write_text(path.read_text().replace('"HarmonicBondForce"', f'"{kind}"'))
    with pytest.raises(error, match=kind):
        check(path)


class Confined(torch.nn.Module):
    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return (positions**2).sum()


@pytest.mark.openmmtorch
def test_a_loaded_torch_force_needs_trust(tmp_path: Path) -> None:
    openmmtorch = pytest.importorskip("openmmtorch")
    torch.jit.script(Confined()).save(str(tmp_path / "energy.pt"))
    system = new_system()
    bonds(system)
    system.addForce(openmmtorch.TorchForce(str(tmp_path / "energy.pt")))
    assert mdgraft.graft(system).routes["TorchForce"] == "host"
    with pytest.raises(UntrustedInputError, match=r"TorchForce.*TorchScript"):
        check(save(tmp_path, system))


def no_particles(system: openmm.System) -> openmm.System:
    return openmm.System()


def small_box(system: openmm.System) -> openmm.System:
    system.setDefaultPeriodicBoxVectors([1.7, 0, 0], [0, 3, 0], [0, 0, 3])
    return system


def too_few(system: openmm.System) -> openmm.System:
    system.addParticle(1.0)
    return system


BAD = {
    "no particles": (no_particles, InvalidInputError, "has no particles"),
    "small box": (small_box, BoxTooSmallError, "cutoff of 0.9 nm"),
    "particle without parameters": (too_few, InvalidInputError, "has 8 particles, the System 9"),
}


@pytest.mark.parametrize(("spoil", "error", "match"), BAD.values(), ids=BAD)
def test_bad_systems_are_refused(
    tmp_path: Path,
    spoil: Callable[[openmm.System], openmm.System],
    error: type[Exception],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        check(save(tmp_path, spoil(switched())))


def test_coincident_particles_are_refused(tmp_path: Path) -> None:
    system = switched()
    path = tmp_path / "state.xml"
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(np.zeros((N, 3)))
    path.write_text(openmm.XmlSerializer.serialize(context.getState(positions=True)))
    with pytest.raises(InvalidInputError, match="on top of each other|cannot evaluate"):
        check(save(tmp_path, system), path)


def test_pickles_need_trust(tmp_path: Path) -> None:
    path = save(tmp_path, switched())
    path.write_text(path.read_text().replace('"CMMotionRemover"', '"PythonForce"'))
    with pytest.raises(UntrustedInputError, match="--trust"):
        check(path)
