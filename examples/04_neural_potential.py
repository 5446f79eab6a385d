"""A neural potential from a force field: trained, checked, and run in OpenMM.

Run with ``python examples/04_neural_potential.py``; it takes less than a minute and writes
``neural_potential.png`` into the current folder.
"""

import matplotlib.pyplot as plt
import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import torch
from mdgraft.neural import MessagePassingNetwork, neural_potential
from mdgraft.testing import check_model
from openmm import app

TEMPERATURE = 300.0
torch.manual_seed(0)

# The teacher: a flexible water molecule with an anharmonic bond, as an OpenMM System.
topology = app.Topology()
residue = topology.addResidue("HOH", topology.addChain())
atoms = [
    topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")
]
numbers = [atom.element.atomic_number for atom in atoms]
system = openmm.System()
for atom in atoms:
    system.addParticle(atom.element.mass)
bonds = openmm.CustomBondForce("430*(1 - exp(-22*(r - 0.09572)))^2")
angle = openmm.HarmonicAngleForce()
for hydrogen in (1, 2):
    bonds.addBond(0, hydrogen)
angle.addAngle(1, 0, 2, np.radians(104.52), 380.0)
system.addForce(bonds)
system.addForce(angle)
teacher = mdgraft.graft(system)

# Its configurations, hotter than they will be needed, with energies and forces from the graft.
geometry = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]])
options = {"timestep": 0.0005, "friction": 20, "equilibration": 1.0, "positions": geometry}
hot = mdgraft_openmm.Sampler(system, temperature=1000, seed=1, interval=0.05, **options)
positions = hot.sample(600).positions
with torch.no_grad():
    energies, forces = teacher(positions), teacher.forces(positions)

# The student learns energies and forces; forces are second-order in the loss.
network = MessagePassingNetwork([1, 8], cutoff=0.4, channels=16, rounds=1, seed=0)
network.normalize(numbers, energies, forces)
student = neural_potential(network, numbers)
optimiser = torch.optim.Adam(student.parameters(), lr=1e-2)
n_steps, n_batch = 800, 32
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
scale = forces.pow(2).mean()
losses = []
for _ in range(n_steps):
    batch = torch.randint(500, (n_batch,))
    x = positions[batch].requires_grad_()
    energy = student(x)
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    loss = (slope + forces[batch]).pow(2).mean() / scale
    loss = loss + 1e-4 * (energy - energies[batch]).pow(2).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()
    losses.append(loss.item())

with torch.no_grad():
    error = (student.forces(positions[500:]) - forces[500:]).pow(2).mean().sqrt()
print(f"forces of unseen frames: {error:.2f} of {scale.sqrt():.0f} kJ/mol/nm")

# Nothing is silently wrong: symmetries, forces, smoothness at the cutoff, extensivity.
print(check_model(network, geometry, None, numbers))

# Weights go to a file that holds no code, and the network runs in OpenMM like any Force.
network.save("network.pt")
loaded = neural_potential(MessagePassingNetwork.load("network.pt"), numbers)
learned = openmm.System()
for atom in atoms:
    learned.addParticle(atom.element.mass)
learned.addForce(mdgraft_openmm.to_force(loaded))

integrator = openmm.VerletIntegrator(0.00025)
platform = openmm.Platform.getPlatformByName("Reference")
context = openmm.Context(learned, integrator, platform)
context.setPositions(geometry)
context.setVelocitiesToTemperature(TEMPERATURE, 1)
totals = []
for _ in range(200):
    integrator.step(5)
    state = context.getState(energy=True)
    totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
print(f"energy over {0.00125 * len(totals):.2f} ps: standard deviation {np.std(totals):.4f} kJ/mol")


def bond_lengths(of, n):
    """Lengths [nm] of both bonds, from Langevin dynamics."""
    run = mdgraft_openmm.Sampler(of, temperature=TEMPERATURE, seed=2, interval=0.02, **options)
    x = run.sample(n).positions
    return (x[:, 1:] - x[:, :1]).norm(dim=-1).flatten().numpy()


lengths = {"force field": bond_lengths(system, 1500), "network": bond_lengths(learned, 300)}
for name, values in lengths.items():
    # Frames are 20 fs apart, two periods of a bond, and friction is high; both bonds count.
    deviation = values.std() / np.sqrt(len(values))
    mean, spread = values.mean(), values.std()
    print(f"bond in the {name:11s} {mean:.5f} +- {deviation:.5f} nm, spread {spread:.5f}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
left.semilogy(losses)
left.set(xlabel="step", ylabel="loss", title="force matching")
with torch.no_grad():
    middle.plot(
        forces[500:].flatten(), student.forces(positions[500:]).flatten(), ".", markersize=3
    )
middle.locator_params(axis="x", nbins=5)
middle.set(xlabel="force field [kJ/mol/nm]", ylabel="network [kJ/mol/nm]", title="unseen forces")
for name, values in lengths.items():
    right.hist(values, bins=30, range=(0.085, 0.11), density=True, histtype="step", label=name)
right.set(xlabel="bond length [nm]", ylabel="density", title="dynamics in OpenMM")
right.legend()
figure.tight_layout()
figure.savefig("neural_potential.png", dpi=120)
