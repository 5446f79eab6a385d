"""A crystal from OpenMM in ASE: relaxation, phonons, and what the lattice constant depends on.

Run with ``python examples/03_argon_crystal_in_ase.py``; it takes a few seconds and writes
``argon_phonons.png``.
"""

import mdgraft
import mdgraft_ase
import numpy as np
import openmm
import torch
from ase import units
from ase.build import bulk
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.phonons import Phonons
from matplotlib import pyplot as plt

# An OpenMM System: Lennard-Jones argon, with a switching function and a dispersion correction.
n, cutoff = 6, 0.85
system, force = openmm.System(), openmm.NonbondedForce()
force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
force.setCutoffDistance(cutoff)
force.setUseSwitchingFunction(True)
force.setSwitchingDistance(0.75)
for _ in range(n**3):
    system.addParticle(39.948)
    force.addParticle(0.0, 0.34, 0.996)  # e, nm, kJ/mol
system.addForce(force)

# In ASE: a skewed supercell of the primitive cell, as phonons want it. ASE's optimisers move
# positions and cell; every step is one pass through the differentiable potential.
potential = mdgraft.graft(system)
calculator = mdgraft_ase.MDGraftCalculator(potential)
primitive = bulk("Ar", "fcc", a=5.35)
atoms = primitive * (n, n, n)
atoms.calc = calculator
BFGS(FrechetCellFilter(atoms, exp_cell_factor=10.0), logfile=None).run(fmax=1e-3, steps=100)
a = (4 * atoms.get_volume() / len(atoms)) ** (1 / 3)
print(f"lattice constant {a:.4f} A, energy {1000 * atoms.get_potential_energy() / n**3:.3f} meV")
print(f"largest stress left {np.abs(atoms.get_stress()).max() / units.GPa:.2g} GPa")

volumes, energies = [], []
for scale in np.linspace(0.985, 1.015, 7):
    strained = atoms.copy()
    strained.calc = calculator
    strained.set_cell(scale * atoms.cell, scale_atoms=True)
    volumes.append(strained.get_volume())
    energies.append(strained.get_potential_energy())
modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()[2]
print(f"bulk modulus {modulus / units.GPa:.3f} GPa")

# Phonons by ASE's finite displacements.
primitive.set_cell(atoms.cell / n, scale_atoms=True)
phonons = Phonons(primitive, calculator, supercell=(n, n, n), delta=0.01, name="argon_phonons")
phonons.clean()
phonons.run()
phonons.read(acoustic=True, method="standard")
phonons.clean()
path = bulk("Ar", "fcc", a=a).cell.bandpath("GXWKGL", npoints=120)
frequencies = phonons.band_structure(path.kpts, verbose=False) * units._e / units._hplanck / 1e12
x, ticks, labels = path.get_linear_kpoint_axis()

# What no host gives: the lattice constant's derivatives. Where dU/da = 0, da/dp = -U_ap / U_aa.
positions, box = calculator.inputs(atoms)
scale = torch.ones((), dtype=torch.float64, requires_grad=True)
energy = potential(scale * positions, scale * box)
(slope,) = torch.autograd.grad(energy, scale, create_graph=True)
sigma, epsilon = (potential.get_parameter(f"NonbondedForce.{k}") for k in ("sigma", "epsilon"))
curvature, by_sigma, by_epsilon = torch.autograd.grad(slope, (scale, sigma, epsilon))
print(f"d ln a / d ln sigma   {-(by_sigma.sum() / curvature).item() * 0.34:.4f}")
print(f"d ln a / d ln epsilon {-(by_epsilon.sum() / curvature).item() * 0.996:.4f}")

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.plot(x, frequencies, color="teal")
axes.set_xticks(ticks, [label.replace("G", "$\\Gamma$") for label in labels])
axes.set(ylabel="frequency [THz]", xlim=(0, x[-1]), ylim=(0, None))
axes.set_title(f"Phonons of Lennard-Jones argon, a = {a:.3f} Å")
axes.grid(axis="x")
figure.savefig("argon_phonons.png", dpi=150)
print(f"highest frequency {frequencies.max():.3f} THz; see argon_phonons.png")
