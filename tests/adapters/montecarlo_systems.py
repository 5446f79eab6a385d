"""Small OpenMM systems for tests of Monte Carlo, and comparisons of averages over chains."""

from __future__ import annotations

import math

import numpy as np
import openmm
import torch
from mdgraft.ensembles import standard_error
from mdgraft.montecarlo import Samples
from montecarlo_laws import F64
from openmm import app, unit

K = 400.0


def wells(n: int = 4) -> openmm.System:
    """Harmonic wells of particles of different masses."""
    system = openmm.System()
    force = openmm.CustomExternalForce(f"0.5*{K}*(x^2+2*y^2+3*z^2)")
    for i in range(n):
        system.addParticle(5.0 + 10.0 * i)
        force.addParticle(i, [])
    system.addForce(force)
    return system


def chain(constrained: bool = False) -> tuple[openmm.System, torch.Tensor]:
    """Five beads with bonds, angles, torsions and a repulsion between the ends."""
    system = openmm.System()
    for mass in (15.0, 14.0, 14.0, 14.0, 15.0):
        system.addParticle(mass)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    torsions = openmm.PeriodicTorsionForce()
    for i in range(4):
        if constrained:
            system.addConstraint(i, i + 1, 0.15)
        else:
            bonds.addBond(i, i + 1, 0.15, 3e4)
    for i in range(3):
        angles.addAngle(i, i + 1, i + 2, 1.95, 120.0)
    for i in range(2):
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 3, 0.0, 4.0)
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 1, 0.3, 3.0)
    ends = openmm.CustomBondForce("2*(0.3/r)^6")
    ends.addBond(0, 4, [])
    for force in (bonds, angles, torsions, ends):
        system.addForce(force)
    x = torch.zeros(5, 3, dtype=F64)
    step = 0.15 * torch.tensor([math.sin(0.975), math.cos(0.975), 0.0], dtype=F64)
    for i in range(1, 5):
        x[i] = x[i - 1] + step * torch.tensor([1.0, (-1.0) ** i, 0.0], dtype=F64)
    return system, x


def diatomics(n: int = 16, length: float = 2.2) -> tuple[openmm.System, torch.Tensor, torch.Tensor]:
    """Flexible Lennard-Jones diatomics in a periodic box."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([length, 0, 0], [0, length, 0], [0, 0, length])
    bonds, lj = openmm.HarmonicBondForce(), openmm.NonbondedForce()
    lj.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    lj.setCutoffDistance(0.45)
    lj.setUseSwitchingFunction(True)
    lj.setSwitchingDistance(0.36)
    lj.setUseDispersionCorrection(False)
    for i in range(n):
        for _ in range(2):
            system.addParticle(16.0)
            lj.addParticle(0.0, 0.3, 2.0)
        bonds.addBond(2 * i, 2 * i + 1, 0.12, 5e4)
        lj.addException(2 * i, 2 * i + 1, 0.0, 0.3, 0.0)
    system.addForce(bonds)
    system.addForce(lj)
    side = math.ceil(n ** (1 / 3))
    grid = torch.cartesian_prod(*[torch.arange(side, dtype=F64)] * 3)[:n] * (length / side) + 0.1
    x = torch.stack((grid, grid + torch.tensor([0.12, 0.0, 0.0])), dim=1).reshape(-1, 3)
    return system, x, length * torch.eye(3, dtype=F64)


def by_chain(samples: Samples, values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error of ``(T, C)`` values."""
    series = values.T.reshape(-1)
    return float(series.mean()), float(standard_error(series))


def agree(*results: tuple[float, float], z: float = 4.0) -> None:
    (first, error), *others = results
    for value, other in others:
        assert abs(value - first) < z * math.hypot(error, other), results


def velocity_verlet() -> openmm.CustomIntegrator:
    integrator = openmm.CustomIntegrator(0.001)
    integrator.addPerDofVariable("x1", 0)
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    integrator.addComputePerDof("x", "x+dt*v")
    integrator.addComputePerDof("x1", "x")
    integrator.addConstrainPositions()
    integrator.addComputePerDof("v", "v+0.5*dt*f/m+(x-x1)/dt")
    integrator.addConstrainVelocities()
    return integrator


def site_water() -> tuple[openmm.System, torch.Tensor, torch.Tensor]:
    """Rigid waters of four sites in a small periodic box."""
    field = app.ForceField("amber14/tip4pew.xml")
    water = app.Modeller(app.Topology(), [])
    water.addSolvent(field, model="tip4pew", boxSize=openmm.Vec3(1.4, 1.4, 1.4))
    system = field.createSystem(
        water.topology, nonbondedMethod=app.CutoffPeriodic, nonbondedCutoff=0.5 * unit.nanometer
    )
    x = torch.tensor(np.array(water.positions.value_in_unit(unit.nanometer)))
    return system, x, 1.4 * torch.eye(3, dtype=F64)
