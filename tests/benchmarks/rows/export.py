"""Modules as forces: what a step costs beside the same module wrapped by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import mdgraft
import numpy as np
import openmm
import systems
import torch
from mdgraft_openmm import backends, to_force
from mdgraft_openmm.export import availability
from timing import Result, Settings, alternate, described

_STEPS = 100


class Network(torch.nn.Module):
    """As much work for each atom as a small model does."""

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, 1)
        )

    def forward(self, positions: torch.Tensor, box: torch.Tensor | None) -> torch.Tensor:
        return self.layers(positions).sum()


def export(settings: Settings) -> Iterator[Result]:
    """Steps with an exported network, and with a potential, beside forces made by hand."""
    dtype = getattr(torch, settings.dtype)
    torch.manual_seed(1)
    network = Network().to(dtype)
    for n_atoms in (10, 1000) if settings.quick else (10, 1000, 10000):
        positions = np.random.default_rng(1).normal(size=(n_atoms, 3))
        masses = [12.0] * n_atoms
        for kind in _callbacks():
            yield from _python_forces(kind, network, dtype, masses, positions, settings)
        if availability.torch_force_fault("CPU") is None:
            sides = {
                "theirs": _torch_force(network, dtype),
                "ours": to_force(network, backend=backends.TorchForce(), platform="CPU"),
            }
            yield _result("network", "TorchForce", sides, masses, positions, None, settings)
    if availability.python_force_fault() is None:
        yield _potential(settings)


def _callbacks() -> list[str]:
    """The classes that call Python and work here."""
    faults = {
        "PythonForce": availability.python_force_fault(),
        "PythonTorchForce": availability.python_torch_force_fault("CPU"),
    }
    return [kind for kind, fault in faults.items() if fault is None]


def _python_forces(
    kind: str,
    network: Network,
    dtype: torch.dtype,
    masses: list[float],
    positions: np.ndarray,
    settings: Settings,
) -> Iterator[Result]:
    """The network alone, in a box, and with a global parameter, of which by hand nobody can have
    the derivative."""

    def scaled(x: torch.Tensor, box: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
        return scale * network(x, box)

    cases: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
        "network": (network, {}),
        "periodic": (network, {"periodic": True}),
        "with p": (scaled, {"global_parameters": {"scale": 1.0}, "parameter_derivatives": False}),
        "with dE/dp": (scaled, {"global_parameters": {"scale": 1.0}}),
    }
    for what, (energy, options) in cases.items():
        parameters = options.get("global_parameters", {})
        box = 30.0 * np.eye(3) if options.get("periodic") else None
        if kind == "PythonForce":
            by_hand = openmm.PythonForce(
                _by_hand(energy, dtype, parameters, box is not None), parameters
            )
        else:
            by_hand = _tensors_by_hand(energy, dtype, parameters, box is not None)
        by_hand.setUsesPeriodicBoundaryConditions(box is not None)
        ours = to_force(energy, backend=kind, dtype=dtype, platform="CPU", **options)
        sides: dict[str, openmm.Force] = {"theirs": by_hand, "ours": ours}
        yield _result(what, kind, sides, masses, positions, box, settings)


def _potential(settings: Settings) -> Result:
    case = systems.water_3k()
    dtype = getattr(torch, settings.dtype)
    potential = mdgraft.graft(case.system, dtype=dtype).requires_grad_(False)
    box = torch.tensor(case.box, dtype=dtype)

    def energy(positions: torch.Tensor, _: Any) -> torch.Tensor:
        return potential(positions, box)

    sides = {
        "theirs": openmm.PythonForce(_by_hand(energy, dtype)),
        "ours": to_force(potential, periodic=True, backend="PythonForce"),
    }
    masses = [case.system.getParticleMass(i) for i in range(case.n_atoms)]
    return _result("potential", "PythonForce", sides, masses, case.positions, case.box, settings)


def _by_hand(
    energy: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    parameters: Collection[str] = (),
    periodic: bool = False,
) -> Callable[..., Any]:
    """What a user writes."""

    def compute(state: openmm.State) -> tuple[float, np.ndarray]:
        positions = torch.tensor(
            state.getPositions(asNumpy=True)._value, dtype=dtype, requires_grad=True
        )
        box = None
        if periodic:
            box = torch.tensor(state.getPeriodicBoxVectors(asNumpy=True)._value, dtype=dtype)
        values = state.getParameters() if parameters else {}
        scalars = {name: torch.tensor(values[name], dtype=dtype) for name in parameters}
        value = energy(positions, box, **scalars)
        (slope,) = torch.autograd.grad(value, positions)
        return value.item(), -slope.double().numpy()

    return compute


def _tensors_by_hand(
    energy: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    parameters: Collection[str],
    periodic: bool,
) -> Any:
    import openmmtorch

    def compute(state: openmm.State, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = positions.detach().to(dtype).requires_grad_()
        box = None
        if periodic:
            box = torch.tensor(state.getPeriodicBoxVectors(asNumpy=True)._value, dtype=dtype)
        values = state.getParameters() if parameters else {}
        scalars = {name: torch.tensor(values[name], dtype=dtype) for name in parameters}
        value = energy(x, box, **scalars)
        (slope,) = torch.autograd.grad(value, x)
        return value, -slope

    return openmmtorch.PythonTorchForce(compute, {name: 1.0 for name in parameters})


def _torch_force(network: Network, dtype: torch.dtype) -> Any:
    import openmmtorch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            return self.network(positions.to(self.network.layers[0].weight.dtype), None)

    return openmmtorch.TorchForce(torch.jit.script(Model()))


def _result(
    what: str,
    kind: str,
    sides: dict[str, openmm.Force],
    masses: list[Any],
    positions: np.ndarray,
    box: np.ndarray | None,
    settings: Settings,
) -> Result:
    contexts = {name: _context(force, masses, positions, box) for name, force in sides.items()}
    energies = [c.getState(energy=True).getPotentialEnergy()._value for c in contexts.values()]
    apart = abs(energies[0] - energies[1]) > 1e-5 * max(1.0, abs(energies[0]))

    def prepare(count: int) -> None:
        for context in contexts.values():
            context.setPositions(positions)

    def steps(context: openmm.Context) -> Callable[[], None]:
        return lambda: context.getIntegrator().step(_STEPS)

    found = alternate(prepare, {n: steps(c) for n, c in contexts.items()}, settings.repeats)
    return Result(
        row=f"export {what}",
        work=f"{_STEPS} steps with to_force",
        beside=f"{kind} by hand",
        atoms=len(positions),
        ours=found["ours"],
        theirs=found["theirs"],
        target=None if what == "with dE/dp" else 1.0,
        note=f"energies differ: {energies}" if apart else "",
        **described(settings),
    )


#: A Context does not keep its System alive.
_SYSTEMS: list[openmm.System] = []


def _context(
    force: openmm.Force, masses: list[Any], positions: np.ndarray, box: np.ndarray | None
) -> openmm.Context:
    system = openmm.System()
    _SYSTEMS.append(system)
    for mass in masses:
        system.addParticle(mass)
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*box)
    system.addForce(force)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(system, openmm.VerletIntegrator(1e-6), platform)
    context.setPositions(positions)
    return context
