"""Every gradient of a box of water, from one energy to an average with error bars.

Run with ``python examples/02_gradients_of_water.py``; it takes less than a minute.
"""

import mdgraft
import mdgraft_openmm
import openmm
import torch
from mdgraft.ensembles import Ensemble
from mdgraft.ensembles.observables import PotentialEnergy
from openmm import app

# A System as users have it: four-site water with PME, rigid, 129 molecules or so.
field = app.ForceField("amber14/tip4pew.xml")
water = app.Modeller(app.Topology(), [])
water.addSolvent(field, model="tip4pew", boxSize=openmm.Vec3(1.6, 1.6, 1.6))
system = field.createSystem(
    water.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.75, rigidWater=True
)

# One energy and all its first derivatives.
potential = mdgraft.graft(system)
positions = torch.tensor(water.positions.value_in_unit(openmm.unit.nanometer), requires_grad=True)
box = water.topology.getPeriodicBoxVectors()
energy = potential(positions, box)
energy.backward()
print(f"energy {energy.item():.3f} kJ/mol in {len(potential.term_names)} terms")
for name, parameter in potential.named_parameters():
    size = parameter.grad.abs().max().item() if parameter.numel() else 0.0
    print(f"  dU/d {name:42s} largest {size:12.4g}  [kJ/mol / {potential.units[name]}]")

# A Hessian-vector product: how forces change along a direction.
direction = torch.randn_like(positions)
(change,) = torch.autograd.grad((potential.forces(positions, box) * direction).sum(), positions)
print(f"forces change by up to {change.abs().max():.4g} kJ/mol/nm per nm along a direction")

# One charge for all hydrogens, minus twice that for the extra site, as the model means it.
kinds = ["O", "H", "H", "M"] * (system.getNumParticles() // 4)
hydrogen = torch.tensor([kind == "H" for kind in kinds])
site = torch.tensor([kind == "M" for kind in kinds])
factors = torch.where(hydrogen, 1.0, -2.0)[hydrogen | site]
potential.freeze("*")
potential.tie("charge", {"NonbondedForce.charge": (hydrogen | site, factors)})

# The derivative of an average: how the energy of the liquid responds to the charge.
sampler = mdgraft_openmm.Sampler(
    system, positions=water.positions, temperature=300, seed=1, equilibration=2.0, interval=0.1
)
frames = sampler.sample(40)
ensemble = Ensemble(potential, frames, temperature=300)
n_molecules = len(kinds) // 4
estimate = ensemble.estimate(PotentialEnergy(potential, n_molecules))
print("potential energy of a molecule [kJ/mol], and its derivative by the charge [kJ/mol/e]:")
print(estimate)

# And back into the System, one per cent more polar.
with torch.no_grad():
    potential.get_parameter("tied.charge").mul_(1.01)
mdgraft_openmm.write_parameters(potential, system)
(force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
print("charge of hydrogen written back:", force.getParticleParameters(1)[0])
