"""How the energy of liquid water depends on the length of its rigid bonds.

Run with ``python examples/05_rigid_water.py``; it takes less than a minute and writes a plot. Each
simulation gives the energy and its slope in the bond length; the next simulations tell whether the
slope was right.
"""

import math

import matplotlib.pyplot as plt
import mdgraft
import mdgraft_openmm
import openmm
import torch
from mdgraft.ensembles import Ensemble, length_derivative
from mdgraft.ensembles.observables import PotentialEnergy
from openmm import app, unit

field = app.ForceField("amber14/tip3p.xml")
water = app.Modeller(app.Topology(), [])
water.addSolvent(field, model="tip3p", boxSize=openmm.Vec3(1.25, 1.25, 1.25))
system = field.createSystem(
    water.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.6 * unit.nanometer
)
n_molecules = water.topology.getNumResidues()

# Bonds stretch at a fixed angle, so that H-H follows O-H.
model = mdgraft_openmm.constraints(system)
bond = 0.09572
scale = model.lengths.detach() / bond

# First, one configuration: the energy of projected coordinates as a function of the length.
potential = mdgraft.graft(system)
box = water.topology.getPeriodicBoxVectors()
length = torch.tensor(bond, dtype=torch.float64, requires_grad=True)
positions = model.project_positions(water.positions, lengths=length * scale)
potential(positions, box).backward()
print(f"{model.n_constraints} constraints; dU/d(length) of one configuration {length.grad:.1f}")

# Then averages: three lengths, each simulated by itself.
lengths, energies, slopes = [0.0942, 0.0957, 0.0972], [], []
for d in lengths:
    for k, factor in enumerate(scale.tolist()):
        i, j, _ = system.getConstraintParameters(k)
        system.setConstraintParameters(k, i, j, d * factor)
    sampler = mdgraft_openmm.Sampler(
        system,
        positions=water.positions,
        temperature=300,
        seed=1,
        equilibration=3.0,
        interval=0.1,
    )
    ensemble = Ensemble(potential, sampler.sample(160), temperature=300)
    estimate = length_derivative(
        ensemble,
        mdgraft_openmm.constraints(system),
        PotentialEnergy(potential, n_molecules),
        {"length": scale},
    )
    energies.append((float(estimate.value), float(estimate.standard_error)))
    slopes.append(
        (float(estimate.gradient["length"]), float(estimate.gradient_standard_error["length"]))
    )
    print(
        f"d = {d:.4f} nm: energy {energies[-1][0]:.2f} +- {energies[-1][1]:.2f} kJ/mol, "
        f"slope {slopes[-1][0]:.0f} +- {slopes[-1][1]:.0f} kJ/mol/nm"
    )

# The slope in the middle against the difference of the outer simulations.
width = lengths[2] - lengths[0]
difference = (energies[2][0] - energies[0][0]) / width
error = math.hypot(energies[2][1], energies[0][1]) / width
print(f"difference of two simulations: {difference:.0f} +- {error:.0f} kJ/mol/nm")
assert abs(difference - slopes[1][0]) < 4 * math.hypot(error, slopes[1][1])

figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
values, errors = zip(*energies, strict=True)
axes.errorbar(lengths, values, errors, fmt="o", capsize=3, label="simulations")
for d, value, (slope, slope_error) in zip(lengths, values, slopes, strict=True):
    ends = [d - 0.0007, d + 0.0007]
    for factor, style in ((0.0, {"lw": 2}), (1.0, {"lw": 0.7}), (-1.0, {"lw": 0.7})):
        tangent = slope + factor * slope_error
        axes.plot(ends, [value + tangent * (x - d) for x in ends], color="C1", **style)
axes.plot([], [], color="C1", label="their derivatives, with errors")
axes.set(xlabel="O-H length [nm]", ylabel="potential energy [kJ/mol per molecule]")
axes.legend()
figure.savefig("rigid_water.png", dpi=150)
