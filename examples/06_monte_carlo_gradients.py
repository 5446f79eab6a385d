"""Four estimators of one gradient by Monte Carlo on alanine dipeptide, against the exact answer.

Only the two backbone torsions move, with the energies of OpenMM's Amber force field. Averages over
two angles can be integrated on a grid, so that every estimator can be judged: how does the mean of
cos(psi) respond to the strength of the torsion terms about psi, and to that of all charges?

Run with ``python examples/06_monte_carlo_gradients.py``; it takes less than a minute and writes
``monte_carlo_gradients.png`` into the current folder.
"""

import math
from pathlib import Path

import mdgraft
import openmm
import torch
from mdgraft.montecarlo import ChainState, Metropolis, Target, Torsion
from mdgraft.montecarlo.comparison import compare
from mdgraft.montecarlo.gradients import Coupled, Covariance, PastBaseline, Score, SquaredJump
from mdgraft.montecarlo.tuning import tune
from openmm import app

# The molecule, its energy as a differentiable potential, and two numbers to differentiate in.
pdb = app.PDBFile(str(Path(__file__).parent / "data" / "alanine_dipeptide.pdb"))
system = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
potential = mdgraft.graft(system)
named = {f"{a.residue.name}.{a.name}": a.index for a in pdb.topology.atoms()}
n, ca, c, n_next, c_before = (
    named[name] for name in ("ALA.N", "ALA.CA", "ALA.C", "NME.N", "ACE.C")
)
(torsions,) = (f for f in system.getForces() if isinstance(f, openmm.PeriodicTorsionForce))
about_psi = [
    i
    for i in range(torsions.getNumTorsions())
    if set(torsions.getTorsionParameters(i)[1:3]) == {ca, c}
]
values = {name: value.detach().clone() for name, value in potential.values().items()}
potential.freeze("*")
k, charge = values["PeriodicTorsionForce.k"], values["NonbondedForce.charge"]
potential.tie("psi_strength", {"PeriodicTorsionForce.k": (about_psi, k[about_psi])}, value=1.0)
potential.tie("charge_strength", {"NonbondedForce.charge": (None, charge)}, value=1.0)


def torsion(state, atoms):
    """A torsion angle of every chain [rad]."""
    x = state.positions[:, atoms]
    axis = x[:, 2] - x[:, 1]
    first = torch.linalg.cross(x[:, 0] - x[:, 1], axis)
    last = torch.linalg.cross(axis, x[:, 3] - x[:, 2])
    return torch.atan2(
        axis.norm(dim=1) * ((x[:, 1] - x[:, 0]) * last).sum(dim=1), -(first * last).sum(dim=1)
    )


def cos_psi(state):
    return torsion(state, [n, ca, c, n_next]).cos()


def features(state):
    angles = torch.stack([torsion(state, [c_before, n, ca, c]), torsion(state, [n, ca, c, n_next])])
    return torch.cat([angles.cos(), angles.sin()]).T


# A chain that turns about N-CA or CA-C in each step, hot enough to cross barriers often.
bonds = [(bond.atom1.index, bond.atom2.index) for bond in pdb.topology.bonds()]
turn = Torsion(0.5, bonds, rotatable=[(n, ca), (ca, c)])
target = Target(potential, temperature=500)
start = torch.tensor(pdb.positions.value_in_unit(openmm.unit.nanometer), dtype=torch.float64)

# The exact answer: every pair of angles, weighted by Boltzmann. A move can be told what to do.
points = 60
grid = torch.arange(points) * (2 * math.pi / points)
pairs = torch.cartesian_prod(grid, grid)
states = ChainState.replicate(len(pairs), positions=start)
turn_by = turn.with_scale(1.0)
for which, angle in zip((0.25, 0.75), pairs.T, strict=True):
    noise = {"which": torch.full((len(pairs),), which), "normal": angle.double()}
    states = turn_by.apply(states, noise, target).state
weights = (-target.beta * potential(states.positions)).softmax(dim=0)
mean = (weights * cos_psi(states)).sum()
trainable = {name: p for name, p in potential.named_parameters() if p.requires_grad}
exact = dict(zip(trainable, torch.autograd.grad(mean, list(trainable.values())), strict=True))
print(f"exact average of cos(psi): {mean:.5f}")

# Equilibrate 64 chains, with a step size that is tuned by gradient.
sampler = Metropolis(target, turn, ChainState.replicate(64, positions=start), seed=1)
print(tune(sampler, n_rounds=20, n_samples=20, objective=SquaredJump(features=features)))
sampler.burn_in(300, adapt=False)

# Four ways to the same gradient, each with chains of its own.
comparison = compare(
    sampler,
    cos_psi,
    {
        "covariance": Covariance(),
        "coupled branches": Coupled(warm_up=120),
        "score": Score(window=120),
        "score, past as baseline": Score(window=120, baseline=PastBaseline()),
    },
    n_samples={
        "covariance": 600,
        "coupled branches": 350,
        "score": 600,
        "score, past as baseline": 600,
    },
    reference=exact,
)
print(comparison)
print(f"largest z-score between two estimators: {comparison.largest_z():.1f}")
comparison.plot("monte_carlo_gradients.png")
