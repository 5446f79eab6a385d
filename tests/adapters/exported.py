"""Modules to export, and what OpenMM makes of the force."""

import functools

import numpy as np
import openmm
import pytest
import torch
from mdgraft_openmm import backends
from mdgraft_openmm._openmm_torch import defines
from mdgraft_openmm.export import availability

N = 6
BOX = np.array([[1.5, 0, 0], [0.2, 1.6, 0], [-0.3, 0.1, 1.4]])
POSITIONS = np.random.default_rng(4).normal(0, 0.3, size=(N, 3))
GLOBALS = {"k": 3.0, "shift": 0.2}


class Springs(torch.nn.Module):
    """Stiff in a trainable way; typed, so that TorchScript takes it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=dtype))

    def forward(
        self,
        positions: torch.Tensor,
        box: torch.Tensor | None,
        k: torch.Tensor,
        shift: torch.Tensor,
    ) -> torch.Tensor:
        apart = positions[1:] - positions[:-1]
        return (k * self.weight * apart.square()).sum() + (positions - shift).pow(4).sum()


class Periodic(Springs):
    """Depends on the box too."""

    def forward(
        self,
        positions: torch.Tensor,
        box: torch.Tensor | None,
        k: torch.Tensor,
        shift: torch.Tensor,
    ) -> torch.Tensor:
        if box is None:
            return positions.sum()
        fractional = positions @ torch.linalg.inv(box)
        waves = torch.sin(2 * torch.pi * (fractional - shift)) * self.weight
        return k * waves.sum() + box.diagonal().prod()


class WithForces(Springs):
    """Returns forces as well, as some models do."""

    def forward(
        self,
        positions: torch.Tensor,
        box: torch.Tensor | None,
        k: torch.Tensor,
        shift: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = positions - shift
        return k * y.pow(4).sum() * self.weight[1], -4 * k * y.pow(3) * self.weight[1]


def plain(positions, box, k, shift):
    """No module at all."""
    return k * (positions[1:] - positions[:-1]).square().sum() + (positions - shift).pow(4).sum()


#: What is exported and whether it is periodic.
MODULES = {
    "module": (Springs, False),
    "periodic": (Periodic, True),
    "with forces": (WithForces, False),
    "function": (lambda: plain, False),
    "single precision": (functools.partial(Springs, torch.float32), False),
}


def expected(module, positions, box=None, **values):
    """Energy, forces and derivatives in the global parameters, without OpenMM."""
    own = [p.dtype for p in module.parameters()] if isinstance(module, torch.nn.Module) else []
    like = {"dtype": own[0] if own else torch.float64}
    x = torch.tensor(positions, **like, requires_grad=True)
    h = None if box is None else torch.tensor(box, **like)
    scalars = {k: torch.tensor(v, **like, requires_grad=True) for k, v in values.items()}
    result = module(x, h, **scalars)
    energy = result[0] if isinstance(result, tuple) else result
    slopes = torch.autograd.grad(energy, [x, *scalars.values()], allow_unused=True)
    numbers = [0.0 if s is None else s.item() for s in slopes[1:]]
    return energy.item(), -slopes[0].double().numpy(), dict(zip(scalars, numbers, strict=True))


PLATFORMS = {
    "Reference": ("Reference", {}),
    "CPU": ("CPU", {}),
    "OpenCL single": ("OpenCL", {"Precision": "single"}),
    "OpenCL mixed": ("OpenCL", {"Precision": "mixed"}),
    "OpenCL double": ("OpenCL", {"Precision": "double"}),
}


@functools.cache
def openable(name, precision):
    """Why a Context cannot be opened, or None."""
    if name not in availability.registered_platforms():
        return f"this OpenMM has no {name} platform"
    try:
        system = openmm.System()
        system.addParticle(1.0)
        platform = openmm.Platform.getPlatformByName(name)
        properties = {"Precision": precision} if precision else {}
        openmm.Context(system, openmm.VerletIntegrator(0.001), platform, properties)
    except openmm.OpenMMException as error:
        return f"no Context opens on {name} ({error})"
    return None


def open_context(force, *, n=N, box=None, platform="Reference", integrator=None):
    """A Context of n particles with the force, after a skip where the platform does not work."""
    name, properties = PLATFORMS[platform]
    if missing := openable(name, properties.get("Precision")):
        pytest.skip(missing)
    system = openmm.System()
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*box)
    for _ in range(n):
        system.addParticle(12.0)
    for each in force if isinstance(force, list) else [force]:
        system.addForce(each)
    found = openmm.Platform.getPlatformByName(name)
    integrator = integrator or openmm.VerletIntegrator(0.001)
    return openmm.Context(system, integrator, found, properties)


def evaluate(context, positions, groups=-1):
    """Energy, forces and derivatives in global parameters, by OpenMM."""
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True, parameterDerivatives=True, groups=groups)
    forces = state.getForces(asNumpy=True)._value
    return state.getPotentialEnergy()._value, forces, dict(state.getEnergyParameterDerivatives())


def assert_close(found, truth, rtol):
    """Compare energy, forces, and those derivatives that were asked for."""
    energy, forces, slopes = truth
    assert abs(found[0] - energy) <= rtol * max(1.0, abs(energy))
    assert np.abs(found[1] - forces).max() <= rtol * max(1.0, np.abs(forces).max())
    for name, slope in slopes.items():
        assert abs(found[2][name] - slope) <= rtol * max(1.0, abs(slope)), name


def tolerance(platform, module=None):
    """Relative precision of a platform, or of a module if that is worse."""
    own = [p.dtype for p in module.parameters()] if isinstance(module, torch.nn.Module) else []
    if torch.float32 in own or platform in ("OpenCL single", "OpenCL mixed"):
        return 2e-5
    if platform == "OpenCL double":
        # Forces are added up as multiples of 2^-32.
        return 1e-8
    # OpenMM's CPU platform passes on what PythonForces return, but stores positions in single.
    return 2e-5 if platform == "CPU" else 1e-10


#: What runs a module by a callback; openmm-torch has a class for that only in builds from source.
CALLBACKS = {"PythonForce": backends.PythonForce()}
if defines("PythonTorchForce"):
    CALLBACKS["PythonTorchForce"] = backends.PythonTorchForce()


def needs_callbacks(backend):
    """Skip where it does not work."""
    if isinstance(backend, backends.PythonForce):
        fault = availability.python_force_fault()
    else:
        faults = map(availability.python_torch_force_fault, availability.registered_platforms())
        fault = next(filter(None, faults), None)
    if fault:
        pytest.skip(fault)


class Predicting(Springs):
    """Energy and forces that no graph connects."""

    def forward(self, positions, box, k, shift):
        y = positions.detach() - shift
        return k * y.pow(4).sum(), -4 * k * y.pow(3)
