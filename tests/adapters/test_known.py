"""Remarks on where OpenMM itself is not right, and the evidence for them."""

import itertools

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from mdgraft_openmm._known import remarks

TILTED = np.array([[2.4, 0, 0], [0, 2.4, 0], [1.2, 1.2, 1.7]])
CUTOFF = 0.75


def charges(n=150):
    rng = np.random.default_rng(1)
    system, force = openmm.System(), openmm.NonbondedForce()
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in TILTED))
    for charge in rng.normal(size=n):
        system.addParticle(1.0)
        force.addParticle(charge, 0.1, 0.0)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(CUTOFF)
    force.setReactionFieldDielectric(1.0)
    system.addForce(force)
    return system, rng.random((n, 3)) @ TILTED


def brute_force(system, positions):
    """k q q' (1/r - 1/r_c) over all pairs and images."""
    q = [system.getForce(0).getParticleParameters(i)[0]._value for i in range(len(positions))]
    i, j = np.triu_indices(len(positions), 1)
    delta = positions[j] - positions[i]
    delta -= np.round(delta @ np.linalg.inv(TILTED)) @ TILTED
    energy = 0.0
    for image in itertools.product((-1, 0, 1), repeat=3):
        r = np.linalg.norm(delta + np.array(image) @ TILTED, axis=1)
        near = r < CUTOFF
        pairs = np.array(q)[i[near]] * np.array(q)[j[near]]
        energy += 138.93545764438198 * (pairs * (1 / r[near] - 1 / CUTOFF)).sum()
    return energy


def test_pairs_in_a_low_tilted_box():
    system, positions = charges()
    graft = mdgraft.graft(system)(positions, TILTED).item()
    assert graft == pytest.approx(brute_force(system, positions), rel=1e-10)
    (remark,) = remarks(system, TILTED)
    assert "less than three cutoffs high" in remark
    assert remarks(system, 2 * TILTED) == []
    assert remarks(system, np.diag([2.4, 2.4, 1.7])) == []
    system.getForce(0).setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
    assert remarks(system, TILTED) == []


def test_other_forces_with_pairs_in_a_low_tilted_box():
    """The same pairs are missing where an expression has the energy."""
    system, positions = charges()
    force = openmm.CustomNonbondedForce(f"138.93545764438198*q1*q2*(1/r-1/{CUTOFF})")
    force.addPerParticleParameter("q")
    for i in range(len(positions)):
        force.addParticle([system.getForce(0).getParticleParameters(i)[0]])
    force.setNonbondedMethod(force.CutoffPeriodic)
    force.setCutoffDistance(CUTOFF)
    truth = brute_force(system, positions)
    system.removeForce(0)
    system.addForce(force)
    assert mdgraft.graft(system)(positions, TILTED).item() == pytest.approx(truth, rel=1e-10)
    (remark,) = remarks(system, TILTED)
    assert "less than three cutoffs high" in remark


def test_symmetry_sites_in_a_tilted_box():
    system = openmm.System()
    for mass in (1.0, 0.0):
        system.addParticle(mass)
    rows = [openmm.Vec3(*row) for row in np.eye(3)]
    offset = openmm.Vec3(0, 0.5, 0)
    system.setVirtualSite(1, openmm.SymmetrySite(0, *rows, offset, True))
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in TILTED))
    (remark,) = remarks(system, TILTED)
    assert "SymmetrySite" in remark
    assert mdgraft.graft(system)(torch.zeros(2, 3), TILTED).item() == 0.0
