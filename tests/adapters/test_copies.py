"""Settings that OpenMM's serialisation forgets, in copies and on the host's route."""

import copy
import pickle

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from mdgraft_openmm._copies import faithful_copy

BOX = np.diag([0.8, 0.9, 1.0])


def drude():
    """Two oscillators whose screened interaction crosses the boundary."""
    force = openmm.DrudeForce()
    for i in (0, 2):
        force.addParticle(i + 1, i, -1, -1, -1, -1.5, 1e-3, 1.0, 1.0)
    force.addScreenedPair(0, 1, 2.6)
    force.setUsesPeriodicBoundaryConditions(True)
    return force


def vdw():
    """Four particles with a cutoff, without a dispersion correction."""
    force = openmm.AmoebaVdwForce()
    for i in range(4):
        force.addParticle(i, 0.15, 0.5, 0.0)
    for i in range(4):
        force.setParticleExclusions(i, [i ^ 1])
    force.setNonbondedMethod(openmm.AmoebaVdwForce.CutoffPeriodic)
    force.setCutoffDistance(0.4)
    force.setUseDispersionCorrection(False)
    return force


POSITIONS = [[0.02, 0.1, 0.1], [0.03, 0.1, 0.1], [0.77, 0.2, 0.3], [0.78, 0.22, 0.3]]


def system_of(force):
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors(*BOX)
    system.addForce(force)
    return system


def energy(system):
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(POSITIONS)
    return context.getState(energy=True).getPotentialEnergy()._value


@pytest.mark.parametrize("make", [drude, vdw])
def test_faithful_copies(make):
    """Systems and forces keep what a deep copy loses."""
    system = system_of(make())
    expected = energy(system)
    assert energy(copy.deepcopy(system)) != pytest.approx(expected, rel=1e-6)
    assert energy(faithful_copy(system)) == expected
    assert energy(system_of(faithful_copy(system.getForce(0)))) == expected


@pytest.mark.parametrize("make", [drude, vdw])
def test_host_route(make):
    """OpenMM evaluates the force as it is, also after pickling."""
    system = system_of(make())
    x, box = torch.tensor(POSITIONS, dtype=torch.float64), torch.tensor(BOX)
    hosted = mdgraft.graft(system, route="host")
    for potential in (hosted, pickle.loads(pickle.dumps(hosted)), copy.deepcopy(hosted)):
        assert potential(x, box).item() == pytest.approx(energy(system), rel=1e-12)
