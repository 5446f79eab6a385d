"""TorchForce of the openmm-torch plug-in, evaluated by OpenMM inside the graph."""

import copy
import pickle

import mdgraft
import numpy as np
import openmm
import pytest
import torch

pytestmark = pytest.mark.openmmtorch


class Springs(torch.nn.Module):
    """Springs of stiffness k to the origin, and between neighbours if there is a box."""

    def forward(self, positions: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k * positions.square()).sum() + positions.pow(4).sum()


class Box(torch.nn.Module):
    def forward(self, positions: torch.Tensor, boxvectors: torch.Tensor) -> torch.Tensor:
        fractional = positions @ torch.linalg.inv(boxvectors)
        return torch.sin(2 * torch.pi * fractional).sum()


def torch_force(module, path):
    openmmtorch = pytest.importorskip("openmmtorch")
    torch.jit.script(module).save(str(path))
    return openmmtorch.TorchForce(str(path))


def system_with(force):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([1.5, 0, 0], [0.2, 1.6, 0], [-0.3, 0.1, 1.4])
    for _ in range(4):
        system.addParticle(12.0)
    bonds = openmm.HarmonicBondForce()
    bonds.addBond(0, 1, 0.2, 400.0)
    system.addForce(bonds)
    system.addForce(force)
    system.addForce(openmm.AndersenThermostat(300.0, 1.0))
    return system, torch.tensor(np.random.default_rng(4).normal(0, 0.3, size=(4, 3)))


def test_with_a_global_parameter(tmp_path):
    force = torch_force(Springs(), tmp_path / "springs.pt")
    force.addGlobalParameter("k", 3.0)
    system, x = system_with(force)
    potential = mdgraft.graft(system)
    assert potential.routes == {"HarmonicBondForce": "native", "TorchForce": "host"}
    energy = potential.energy_by_term(x)["TorchForce"]
    torch.testing.assert_close(energy, Springs()(x, torch.tensor(3.0)), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(energy, potential.get_parameter("globals.k"))
    torch.testing.assert_close(slope, x.square().sum(), rtol=1e-5, atol=0)
    hessian = torch.func.hessian(lambda y: potential.energy_by_term(y)["TorchForce"])(x)
    truth = torch.func.hessian(lambda y: Springs()(y, torch.tensor(3.0)))(x)
    torch.testing.assert_close(hessian, truth, rtol=0, atol=1e-3 * truth.abs().max().item())
    with torch.inference_mode():
        assert torch.isfinite(potential(x))
    torch.testing.assert_close(copy.deepcopy(potential)(x), potential(x))
    with pytest.raises(TypeError, match="TorchForce: a force of a plug-in"):
        pickle.dumps(potential)
    system.removeForce(1)
    with pytest.raises(mdgraft.InvalidInputError, match="was removed from its System"):
        potential(x + 0.1)


def test_periodic(tmp_path):
    force = torch_force(Box(), tmp_path / "box.pt")
    force.setUsesPeriodicBoundaryConditions(True)
    system, x = system_with(force)
    potential = mdgraft.graft(system)
    box = torch.tensor([v._value for v in system.getDefaultPeriodicBoxVectors()]).double()
    box.requires_grad_()
    energy = potential.energy_by_term(x, box)["TorchForce"]
    (found,) = torch.autograd.grad(energy, box)
    (truth,) = torch.autograd.grad(Box()(x, box), box)
    torch.testing.assert_close(found, truth.tril(), rtol=0, atol=1e-4 * truth.abs().max().item())


# With openmm-torch 1.5, OpenMM 8.6 itself ends the process where it copies a TorchForce.
if openmm.Platform.getOpenMMVersion() < "8.6":

    @pytest.mark.parametrize("kind", ["CustomCVForce", "ATMForce"])
    def test_inside_another_force(kind, tmp_path):
        inner = torch_force(Springs(), tmp_path / "springs.pt")
        inner.addGlobalParameter("k", 3.0)
        if kind == "CustomCVForce":
            force = openmm.CustomCVForce("0.5*v^2")
            force.addCollectiveVariable("v", inner)
        else:
            force = openmm.ATMForce("u0+scale*u1")
            force.addGlobalParameter("scale", 0.5)
            force.addForce(inner)
            for _ in range(4):
                force.addParticle(openmm.Vec3(0.1, 0, 0))
        system, x = system_with(force)
        potential = mdgraft.graft(system)
        assert potential.routes[kind] == "host"

        def expected(y):
            springs = Springs()(y, torch.tensor(3.0))
            if kind == "CustomCVForce":
                return 0.5 * springs**2
            return springs + 0.5 * Springs()(y + torch.tensor([0.1, 0, 0]), torch.tensor(3.0))

        energy = potential.energy_by_term(x)[kind]
        torch.testing.assert_close(energy, expected(x), rtol=1e-6, atol=0)
        found = torch.func.grad(lambda y: potential.energy_by_term(y)[kind])(x)
        truth = torch.func.grad(expected)(x)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-5 * truth.abs().max().item())
