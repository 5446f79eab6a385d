"""Users name parameters of expressions as they like, also after what terms keep for themselves."""

import copy

import mdgraft
import mdgraft_openmm
import openmm
import pytest
import torch

N = 5
#: Names of attributes and buffers of terms, of torch modules, and of Python.
NAMES = ["cutoff", "energy", "method", "where", "kind", "excluded", "particles", "labels", "units"]
NAMES += [
    "forward_weights",
    "group_first",
    "donors",
    "members",
    "masses",
    "every",
    "rules",
    "group",
]
NAMES += ["forward", "training", "type", "periodic", "item_keys", "switched", "points", "lambda"]
NAMES += ["group", "coordinate", "n_particles", "global_names", "_renamed", "self"]


def pairs(name):
    force = openmm.CustomNonbondedForce(f"{name}1*{name}2*r")
    force.addPerParticleParameter(name)
    for i in range(N):
        force.addParticle([1.0 + i])
    force.addInteractionGroup(range(2), range(1, N))
    return force, lambda: force.setParticleParameters(0, [7.0])


def implicit(name):
    force = openmm.CustomGBForce()
    force.addPerParticleParameter(name)
    force.addComputedValue("sum", f"{name}2*exp(-r)", force.ParticlePair)
    force.addEnergyTerm(f"{name}1*{name}2*r*sum1*sum2", force.ParticlePair)
    for i in range(N):
        force.addParticle([1.0 + i])
    return force, lambda: force.setParticleParameters(0, [7.0])


def hydrogen_bonds(name):
    force = openmm.CustomHbondForce(f"{name}*distance(a1,d1)")
    force.addPerDonorParameter(name)
    force.addDonor(0, 1, -1, [1.5])
    force.addAcceptor(3, -1, -1, [])
    return force, lambda: force.setDonorParameters(0, 0, 1, -1, [7.0])


def external(name):
    force = openmm.CustomExternalForce(f"{name}*x^2")
    force.addPerParticleParameter(name)
    force.addParticle(0, [1.5])
    return force, lambda: force.setParticleParameters(0, 0, [7.0])


def bonds(name):
    force = openmm.CustomBondForce(f"{name}*r^2")
    force.addPerBondParameter(name)
    force.addBond(0, 1, [1.5])
    return force, lambda: force.setBondParameters(0, 0, 1, [7.0])


def compounds(name):
    force = openmm.CustomCompoundBondForce(2, f"{name}*distance(p1,p2)")
    force.addPerBondParameter(name)
    force.addBond([0, 1], [1.5])
    return force, lambda: force.setBondParameters(0, [0, 1], [7.0])


def centroids(name):
    force = openmm.CustomCentroidBondForce(2, f"{name}*distance(g1,g2)")
    force.addPerBondParameter(name)
    force.addGroup([0, 3])
    force.addGroup([1])
    force.addBond([0, 1], [1.5])
    return force, lambda: force.setBondParameters(0, [0, 1], [7.0])


def triples(name):
    force = openmm.CustomManyParticleForce(3, f"{name}1*distance(p1,p2)")
    force.addPerParticleParameter(name)
    for i in range(N):
        force.addParticle([1.0 + i], 0)
    return force, lambda: force.setParticleParameters(0, [7.0], 0)


MAKERS = [pairs, implicit, hydrogen_bonds, external, bonds, compounds, centroids, triples]


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(name, make):
    system = openmm.System()
    for _ in range(N):
        system.addParticle(1.0)
    force, change = make(name)
    system.addForce(force)
    x = torch.rand(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    potential = mdgraft.graft(system)
    full = f"{force.getName()}.{name}"
    assert full in dict(potential.named_parameters())
    parameter = potential.get_parameter(full)
    assert isinstance(parameter, torch.nn.Parameter)

    def host():
        context = openmm.Context(
            system, openmm.VerletIntegrator(1), openmm.Platform.getPlatformByName("Reference")
        )
        context.setPositions(x.numpy())
        return context.getState(energy=True).getPotentialEnergy()._value

    assert potential(x).item() == pytest.approx(host(), rel=1e-12)
    (slope,) = torch.autograd.grad(potential(x), parameter)
    assert slope.any()
    again = copy.deepcopy(potential)
    with torch.no_grad():
        parameter.mul_(2.0)
    again.load_state_dict(potential.state_dict())
    assert again(x).item() == potential(x).item() != pytest.approx(host())
    assert again.float()(x.float()).item() == pytest.approx(potential(x).item(), rel=1e-5)
    mdgraft_openmm.write_parameters(potential, system)
    assert potential(x).item() == pytest.approx(host(), rel=1e-12)
    change()
    assert mdgraft.graft(system)(x).item() == pytest.approx(host(), rel=1e-12)
