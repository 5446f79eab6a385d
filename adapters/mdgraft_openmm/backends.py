"""The Force classes that can run a torch module, each with its choices."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import openmm
from mdgraft import InvalidInputError, UnavailableBackendError

from mdgraft_openmm.export import availability
from mdgraft_openmm.export.callbacks import ENERGY, python_force
from mdgraft_openmm.export.derivatives import with_derivatives
from mdgraft_openmm.export.energy import EnergyFunction
from mdgraft_openmm.export.evaluator import Evaluator
from mdgraft_openmm.export.script import Frame, scripted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a force is to be made of.

    Attributes
    ----------
    function
        The energy.
    particles
        Indices of the particles that it gets; None for all.
    slopes
        Global parameters whose derivatives are wanted.
    check
        Whether energy and forces are compared.
    frames
        Positions and boxes to try things with; may be none.
    platform
        Name of the platform that will run it; None if any may.
    """

    function: EnergyFunction
    particles: tuple[int, ...] | None
    slopes: tuple[str, ...]
    check: bool
    frames: Sequence[Frame]
    platform: str | None

    @property
    def platforms(self) -> list[str]:
        """Platforms that may run the force."""
        return [self.platform] if self.platform else availability.registered_platforms()


class AbstractBackend(abc.ABC):
    """A way to run a module in OpenMM."""

    @abc.abstractmethod
    def fault(self, request: Request, *, chosen: bool) -> str | None:
        """Why it cannot be used, or should not be unless it is ``chosen``; None if it can."""

    @abc.abstractmethod
    def build(self, request: Request) -> Any:
        """Make the force."""

    @property
    def name(self) -> str:
        """The Force class."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class PythonForce(AbstractBackend):
    """``openmm.PythonForce`` (OpenMM 8.5 or newer): any module, on every platform."""

    def fault(self, request: Request, *, chosen: bool) -> str | None:
        """Only the version matters."""
        return availability.python_force_fault()

    def build(self, request: Request) -> Any:
        """A PythonForce, or a CustomCVForce around some where derivatives are wanted."""
        return _of_callbacks(request, openmm.PythonForce)


@dataclasses.dataclass(frozen=True)
class PythonTorchForce(AbstractBackend):
    """``PythonTorchForce`` of openmm-torch newer than 1.5: any module, with tensors."""

    def fault(self, request: Request, *, chosen: bool) -> str | None:
        """Try it on every platform that may run it."""
        faults = (availability.python_torch_force_fault(p) for p in request.platforms)
        return next((fault for fault in faults if fault), None)

    def build(self, request: Request) -> Any:
        """A PythonTorchForce, or a CustomCVForce around some where derivatives are wanted."""
        plugin = availability.load_openmm_torch()
        return _of_callbacks(request, plugin.PythonTorchForce)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchForce(AbstractBackend):
    """``TorchForce`` of openmm-torch 1.5: TorchScript, run without Python.

    Attributes
    ----------
    cuda_graphs
        Record the module's kernels on the CUDA platform once and replay them; only for modules
        whose work is the same in every step.
    warmup_steps
        Evaluations before recording.
    """

    cuda_graphs: bool = False
    warmup_steps: int = 10

    def fault(self, request: Request, *, chosen: bool) -> str | None:
        """Try it on every platform that may run it."""
        for platform in request.platforms:
            if fault := availability.torch_force_fault(platform):
                elsewhere = chosen and f"on the {platform} platform" in fault
                hint = "; name another platform with the argument platform" if elsewhere else ""
                return f"{fault}{hint}"
        if request.function.compiled:
            return "torch.compile does not apply to TorchScript; leave compile out"
        if chosen:
            return None
        if fault := availability.torch_force_fault(availability.COPIES):
            return fault
        if not request.frames:
            return "without a frame (the argument example) its TorchScript cannot be checked"
        return None

    def build(self, request: Request) -> Any:
        """A TorchForce of the module as it is now."""
        if self.warmup_steps < 1:
            raise InvalidInputError(f"warmup_steps: got {self.warmup_steps}, wanted at least 1")
        module, outputs_forces = scripted(
            request.function, request.particles, request.frames, request.slopes
        )
        if outputs_forces and request.slopes:
            raise UnavailableBackendError(
                "backend: a TorchForce whose module returns forces has no derivatives in global "
                "parameters; return the energy alone, use the backend PythonForce, or do without "
                "them by parameter_derivatives=False"
            )
        force = availability.load_openmm_torch().TorchForce(module)
        force.setUsesPeriodicBoundaryConditions(request.function.periodic)
        force.setOutputsForces(outputs_forces)
        for name, default in request.function.defaults.items():
            force.addGlobalParameter(name, default)
        for name in request.slopes:
            force.addEnergyParameterDerivative(name)
        if self.cuda_graphs:
            force.setProperty("useCUDAGraphs", "true")
            force.setProperty("CUDAGraphWarmupSteps", str(self.warmup_steps))
        if request.check:
            evaluator = Evaluator(request.function, slopes=request.slopes, check=False)
            for x, h in request.frames[:1]:
                evaluator.compare(x, h, request.function.defaults)
        return force


def _of_callbacks(request: Request, kind: Any) -> Any:
    evaluator = Evaluator(request.function, slopes=request.slopes, check=request.check)
    if request.slopes:
        return with_derivatives(evaluator, kind, request.particles)
    return python_force(evaluator, ENERGY, kind, request.particles)


def first_that_works(
    request: Request, asked: AbstractBackend | str
) -> tuple[Any, AbstractBackend, dict[str, str]]:
    """The force, the backend that made it, and why others were passed over.

    Raises
    ------
    InvalidInputError
        If there is no such backend.
    UnavailableBackendError
        If the one that is asked for, or every one, does not work here or for this module.
    """
    named = {backend.name: backend for backend in BACKENDS}
    if isinstance(asked, str) and asked != "auto":
        if asked not in named:
            raise InvalidInputError(
                f"backend: got {asked!r}, wanted 'auto', one of {sorted(named)}, or an object of "
                "mdgraft_openmm.backends"
            )
        asked = named[asked]
    if isinstance(asked, AbstractBackend):
        if fault := asked.fault(request, chosen=True):
            raise UnavailableBackendError(f"backend: {asked.name} cannot be used: {fault}")
        return asked.build(request), asked, {}
    if asked != "auto":
        raise InvalidInputError(
            f"backend: got {type(asked).__name__}, wanted 'auto', one of {sorted(named)}, or an "
            "object of mdgraft_openmm.backends"
        )
    passed: dict[str, str] = {}
    # What one should rather not take unasked is still better than nothing.
    for chosen in (False, True):
        for backend in BACKENDS:
            fault = backend.fault(request, chosen=chosen)
            if fault is None:
                try:
                    made = backend.build(request)
                    passed.pop(backend.name, None)
                    return made, backend, passed
                except UnavailableBackendError as error:
                    fault = str(error)
            passed[backend.name] = fault
    listed = "; ".join(f"{name}: {fault}" for name, fault in passed.items())
    raise UnavailableBackendError(f"backend: none works here: {listed}")


#: In the order in which ``backend="auto"`` tries them.
BACKENDS: tuple[AbstractBackend, ...] = (PythonTorchForce(), TorchForce(), PythonForce())
