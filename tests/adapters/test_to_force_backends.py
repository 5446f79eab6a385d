"""Which Force runs a module, and why: versions, platforms, and modules that cannot be scripted."""

import re

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from exported import (
    BOX,
    GLOBALS,
    MODULES,
    PLATFORMS,
    POSITIONS,
    N,
    Periodic,
    Springs,
    WithForces,
    assert_close,
    evaluate,
    expected,
    open_context,
    openable,
    plain,
    tolerance,
)
from mdgraft import InvalidInputError, NonConservativeForceWarning, UnavailableBackendError
from mdgraft_openmm import _trials, backends, explain_backends, to_force
from mdgraft_openmm.export import availability

SUBSET = [4, 1, 3]
USABLE = [
    name
    for name, (platform, properties) in PLATFORMS.items()
    if openable(platform, properties.get("Precision")) is None
    and availability.torch_force_fault(platform) is None
]
TORCH = backends.TorchForce()


# Versions -----------------------------------------------------------------------------------------

#: Versions of openmm-torch, torch and OpenMM; the platform; what is known.
MEASURED = [
    (("1.5", "2.9.1", "8.4.0"), "Reference", ""),
    (("1.5", "2.9.1", "8.6.1"), "CPU", ""),
    (("1.5", "2.9.1+cpu", "8.4.0"), "OpenCL", ""),
    (("1.5", "2.9.1", "8.4.0"), "CUDA", None),
    (("1.5", "2.9.1", "8.5.2"), "OpenCL", "ends the process on the OpenCL platform"),
    (("1.5", "2.9.1", "8.6.1"), "CUDA", "ends the process on the CUDA platform"),
    (("1.5", "2.9.1", "8.5.2"), availability.COPIES, ""),
    (("1.5", "2.9.1", "8.6.1"), availability.COPIES, "ends the process where a TorchForce is cop"),
    (("1.5", "2.8.0", "8.6.1"), "CPU", "ends the process; install torch 2.9.1"),
    (("1.5", "2.10.0", "8.6.1"), "CPU", "fails in every evaluation; install torch 2.9.1"),
    (("1.5", "2.13.0", "8.4.0"), "Reference", "fails in every evaluation"),
    (("1.5", "2.9.1", "8.7.0"), "CPU", None),
    (("1.5", "2.9.1", "8.3.1"), "CPU", None),
    (("1.6", "2.10.0", "8.6.1"), "CPU", None),
    (("of unknown version", "2.9.1", "8.6.1"), "CPU", None),
    (("1.5", "2.9.1", "8.4.0"), "HIP", None),
]


@pytest.mark.parametrize(("versions", "platform", "fault"), MEASURED)
def test_measured_combinations_need_no_trial(versions, platform, fault):
    found = availability._measured(*versions, platform)
    if fault:
        assert fault in found and versions[1] in found
    else:
        assert found == fault


@pytest.fixture
def trials(monkeypatch):
    """Trials that are asked for, with an answer that a test sets."""
    asked = []
    answer = {"ok": True}

    def run(code):
        asked.append(re.search(r"NAME = '(\w+)'", code)[1])
        return _trials.Trial(ok=answer["ok"], answer={}, error="the process dies (SIGSEGV)")

    monkeypatch.setattr(availability, "run_trial", run)
    monkeypatch.setattr(availability, "_versions", lambda: ("1.7", "2.13.0", openmm.__version__))
    monkeypatch.setattr(availability, "defines", lambda name: True)
    availability._tried.cache_clear()
    yield asked, answer
    availability._tried.cache_clear()


@pytest.fixture
def older_plugin(monkeypatch):
    """As where openmm-torch has no PythonTorchForce, which would come first."""
    monkeypatch.setattr(availability, "defines", lambda name: False)


def test_unknown_combinations_are_tried_once(trials):
    asked, answer = trials
    for _ in range(2):
        assert availability.torch_force_fault("CPU") is None
    assert asked == ["CPU"]
    answer["ok"] = False
    for _ in range(2):
        fault = availability.torch_force_fault("Reference")
        assert (
            fault
            == "TorchForce does not work on the Reference platform: the process dies (SIGSEGV)"
        )
    assert "where it is copied" in availability.torch_force_fault(availability.COPIES)
    assert "PythonTorchForce" in availability.python_torch_force_fault("CPU")
    assert asked == ["CPU", "Reference", "Reference", "CPU"]


def test_what_would_end_the_process_is_refused(trials):
    _, answer = trials
    answer["ok"] = False
    with pytest.raises(UnavailableBackendError, match=r"TorchForce cannot be used.*SIGSEGV.*argum"):
        to_force(Springs(), global_parameters=GLOBALS, backend=TORCH)
    if availability.python_force_fault() is None:
        told = explain_backends(Springs(), global_parameters=GLOBALS, platform="CPU")
        assert told["PythonForce"] == "used"
        assert "on the CPU platform" in told["TorchForce"]


def test_without_any_backend_everything_is_listed(monkeypatch):
    monkeypatch.setattr(availability, "_versions", lambda: "openmm-torch is not installed")
    monkeypatch.setattr(availability, "python_force_fault", lambda: "PythonForce came with 8.5")
    with pytest.raises(
        UnavailableBackendError,
        match=r"PythonTorchForce: openmm-torch is not.*TorchForce: openmm.*PythonForce: Pyth.*8\.5",
    ):
        to_force(Springs(), global_parameters=GLOBALS)
    with pytest.raises(UnavailableBackendError, match=r"PythonForce cannot be used.*8\.5"):
        to_force(Springs(), global_parameters=GLOBALS, backend="PythonForce")


def test_the_newest_plugin_gets_tensors(monkeypatch):
    """A stand-in for a class that no release has yet; OpenMM calls it with a State and a tensor."""
    if fault := availability.python_force_fault():
        pytest.skip(fault)
    made = []

    class Standin(openmm.PythonForce):
        def __init__(self, function, defaults):
            def through(state):
                x = torch.tensor(state.getPositions(asNumpy=True)._value)
                energy, forces = function(state, x)
                assert forces.dtype == x.dtype and isinstance(energy, torch.Tensor)
                # The memory is read from end to end.
                assert forces.is_contiguous() and not forces.is_neg()
                # It is the plug-in's, which goes on with it.
                x.zero_()
                return energy.item(), forces.numpy()

            made.append(function)
            super().__init__(through if len(made) == 1 else function, defaults)

    import sys
    import types

    plugin = types.ModuleType("openmmtorch")
    plugin.PythonTorchForce = Standin
    monkeypatch.setitem(sys.modules, "openmmtorch", plugin)
    monkeypatch.setattr(availability, "python_torch_force_fault", lambda platform: None)
    kept = []

    def energy_and_forces(x):
        kept.append(x.detach())
        return x.square().sum(), (-2 * x.T.contiguous()).T

    force = to_force(energy_and_forces, check=False)
    assert type(force) is Standin
    truth = (POSITIONS**2).sum(), -2 * POSITIONS, {}
    assert_close(evaluate(open_context(force), POSITIONS), truth, 1e-12)
    np.testing.assert_array_equal(kept[0], POSITIONS)


# TorchForce ---------------------------------------------------------------------------------------


class Transposed(torch.nn.Module):
    """Forces that do not lie in memory in their order."""

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return positions.square().sum(), (-2.0 * positions.detach().t().contiguous()).t()


@pytest.mark.openmmtorch
@pytest.mark.parametrize("platform", USABLE)
def test_scripted_forces_may_lie_in_memory_as_they_like(platform):
    force = to_force(Transposed(), backend=TORCH, platform=PLATFORMS[platform][0])
    truth = (POSITIONS**2).sum(), -2 * POSITIONS, {}
    found = evaluate(open_context(force, platform=platform), POSITIONS)
    assert_close(found, truth, tolerance(platform))


UNSCRIPTABLE = {
    "**values": lambda: _Any(),
    "function": lambda: plain,
    "plain numbers": lambda: Typed(),
}


class _Any(Springs):
    """TorchScript has no ``**``."""

    def forward(self, positions, box, **values):
        return super().forward(positions, box, **values)


class Typed(Springs):
    """Its parameters are no tensors, through which derivatives would pass."""

    def forward(self, positions, box: torch.Tensor | None, k: float, shift: float):
        return (k * self.weight * (positions - shift).square()).sum()


class Listed(Springs):
    """Finds its pairs by looking at the numbers."""

    def forward(self, positions, box, k, shift):
        apart = (positions[:, None] - positions).norm(dim=-1)
        first, second = (apart.detach() < 0.5).triu(1).nonzero(as_tuple=True)
        pairs = torch.tensor(list(zip(first.tolist(), second.tolist(), strict=True)))
        return k * (positions[pairs[:, 0]] - positions[pairs[:, 1]]).square().sum()


class Masked(Springs):
    """Looks at the numbers in a way of which no tracer warns."""

    def forward(self, positions, box, k, shift):
        scale = positions.detach().numpy().max()
        return k * positions.square().sum() * float(scale)


@pytest.mark.openmmtorch
@pytest.mark.parametrize("platform", USABLE)
@pytest.mark.parametrize("kind", [k for k in MODULES if k != "function"])
def test_scripted(kind, platform):
    make, periodic = MODULES[kind]
    module, box = make(), BOX if periodic else None
    slopes = kind != "with forces"
    force = to_force(
        module,
        periodic=periodic,
        global_parameters=GLOBALS,
        parameter_derivatives=slopes,
        backend=TORCH,
        platform=PLATFORMS[platform][0],
        name="scripted",
        force_group=4,
    )
    assert type(force).__name__ == "TorchForce"
    assert force.getName() == "scripted" and force.getForceGroup() == 4
    assert force.usesPeriodicBoundaryConditions() == periodic
    context = open_context(force, box=box, platform=platform)
    for values in (GLOBALS, {"k": -1.7, "shift": 1e-3}):
        for name, value in values.items():
            context.setParameter(name, value)
        energy, forces, derivatives = expected(module, POSITIONS, box, **values)
        truth = (energy, forces, derivatives if slopes else {})
        # On OpenCL openmm-torch rounds global parameters to single precision.
        rtol = max(tolerance(platform, module), 1e-6 * ("OpenCL" in platform))
        assert_close(evaluate(context, POSITIONS), truth, rtol)


@pytest.mark.openmmtorch
@pytest.mark.parametrize("kind", UNSCRIPTABLE)
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["all", "subset"])
def test_traced(kind, subset):
    module = UNSCRIPTABLE[kind]()
    chosen = POSITIONS if subset is None else POSITIONS[subset]
    force = to_force(
        module,
        particles=subset,
        global_parameters=GLOBALS,
        parameter_derivatives=["k"],
        example=chosen,
        backend=TORCH,
        platform="Reference",
    )
    energy, part, derivatives = expected(module, 1.2 * chosen, **GLOBALS)
    forces = np.zeros((N, 3))
    forces[range(N) if subset is None else subset] = part
    found = evaluate(open_context(force), 1.2 * POSITIONS)
    assert_close(found, (energy, forces, {"k": derivatives["k"]}), 1e-10)


@pytest.mark.openmmtorch
@pytest.mark.parametrize("make", [Springs, WithForces, Periodic])
def test_subset_and_example_when_scripted(make):
    box = BOX if make is Periodic else None
    example = POSITIONS[SUBSET] if box is None else (POSITIONS[SUBSET], box)
    force = to_force(
        make(),
        particles=SUBSET,
        periodic=box is not None,
        global_parameters=GLOBALS,
        parameter_derivatives=make is not WithForces,
        example=example,
        backend="TorchForce",
        platform="CPU",
    )
    energy, part, slopes = expected(make(), POSITIONS[SUBSET], box, **GLOBALS)
    forces = np.zeros((N, 3))
    forces[SUBSET] = part
    found = evaluate(open_context(force, box=box), POSITIONS)
    truth = (energy, forces, {} if make is WithForces else slopes)
    assert_close(found, truth, 1e-10)


@pytest.mark.openmmtorch
def test_a_trace_is_for_one_number_of_particles():
    """It may have unrolled a loop over the particles of the example."""

    def looped(x):
        return sum(x[i].square().sum() for i in range(x.shape[0]))

    options = {"backend": TORCH, "platform": "Reference"}
    context = open_context(to_force(looped, example=POSITIONS, **options))
    assert evaluate(context, POSITIONS)[0] == pytest.approx((POSITIONS**2).sum(), rel=1e-12)
    context = open_context(to_force(looped, example=POSITIONS[:3], **options))
    with pytest.raises(openmm.OpenMMException, match="has not the 3 particles of the example"):
        evaluate(context, POSITIONS)


@pytest.mark.openmmtorch
def test_more_derivatives_than_python_forces_have():
    """TorchForce has no limit, so that it is taken."""

    def many(x, **values):
        return sum(values.values()) * x.square().sum()

    values = {f"p{i}": 0.1 * i for i in range(40)}
    force = to_force(many, global_parameters=values, example=POSITIONS, platform="Reference")
    assert type(force).__name__ == "TorchForce"
    slopes = evaluate(open_context(force), POSITIONS)[2]
    assert slopes == pytest.approx(dict.fromkeys(values, (POSITIONS**2).sum()), rel=1e-12)


@pytest.mark.parametrize("platform", ["CPU", None])
def test_no_platform_is_blamed_for_what_is_not_installed(monkeypatch, platform):
    monkeypatch.setattr(availability, "_versions", lambda: "openmm-torch is not installed")
    with pytest.raises(UnavailableBackendError, match=r"openmm-torch is not installed$"):
        to_force(Springs(), global_parameters=GLOBALS, backend=TORCH, platform=platform)


REFUSED = {
    "a list of pairs": (Listed(), {"example": POSITIONS}, "cannot be traced.*depends on the frame"),
    "a number": (Masked(), {"example": POSITIONS}, "cannot be traced.*depends on the frame"),
    "plain numbers": (Typed(), {}, "its argument k is of type float, which has no derivative"),
    "no frame": (_Any(), {}, "tracing it needs a frame, which the argument example"),
    "forces and derivatives": (
        WithForces(),
        {"parameter_derivatives": True},
        "returns forces has no derivatives",
    ),
}


@pytest.mark.openmmtorch
@pytest.mark.parametrize(("module", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_become_torchscript(module, options, message, older_plugin):
    with pytest.raises(UnavailableBackendError, match=message):
        to_force(module, global_parameters=GLOBALS, backend=TORCH, platform="Reference", **options)
    if availability.python_force_fault() is None:
        options |= {"global_parameters": GLOBALS, "platform": "Reference"}
        assert explain_backends(module, **options)["PythonForce"] == "used"


@pytest.mark.openmmtorch
def test_a_recorded_constant_is_found_out_without_a_warning():
    """Even if the tracer is silent, other frames are not."""
    from mdgraft_openmm.export import script
    from mdgraft_openmm.export.energy import EnergyFunction

    function = EnergyFunction(
        Masked(),
        periodic=False,
        defaults=GLOBALS,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    frame = (torch.tensor(POSITIONS), None)

    class Constant(torch.nn.Module):
        def forward(self, positions, k, shift):
            return k * positions.square().sum() * float(POSITIONS.max())

    inner = torch.jit.trace(Constant(), (frame[0], *map(torch.tensor, (3.0, 0.2))))
    with pytest.raises(mdgraft.MDGraftError, match="differs from the module's on another frame"):
        script._checked(inner, function, None, [frame], by_name=False)


@pytest.mark.openmmtorch
def test_potentials_are_left_to_python(older_plugin):
    """Their pairs depend on the frame and their kernels are no torch operations."""
    system = openmm.System()
    force = openmm.NonbondedForce()
    for charge in (0.5, -0.5, 0.0):
        system.addParticle(1.0)
        force.addParticle(charge, 0.2, 0.5)
    system.addForce(force)
    potential = mdgraft.graft(system)
    options = {"example": POSITIONS[:3], "platform": "Reference"}
    with pytest.raises(UnavailableBackendError, match="cannot be scripted.*cannot be traced"):
        to_force(potential, backend=TORCH, **options)
    if availability.python_force_fault() is None:
        assert explain_backends(potential, **options)["PythonForce"] == "used"


@pytest.mark.openmmtorch
def test_auto_takes_torch_force_only_where_it_is_safe(older_plugin):
    told = explain_backends(Springs(), global_parameters=GLOBALS, platform="Reference")
    if availability.python_force_fault() is None:
        assert "cannot be checked" in told["TorchForce"] or "copied" in told["TorchForce"]
    else:
        assert told["TorchForce"] == "used"
    told = explain_backends(
        Springs(), global_parameters=GLOBALS, platform="Reference", example=POSITIONS
    )
    safe = availability.torch_force_fault(availability.COPIES) is None
    assert (told["TorchForce"] == "used") == safe


@pytest.mark.openmmtorch
def test_options_of_torch_force():
    graphs = backends.TorchForce(cuda_graphs=True, warmup_steps=3)
    force = to_force(Springs(), global_parameters=GLOBALS, backend=graphs, platform="CPU")
    properties = dict(force.getProperties())
    assert properties == {"useCUDAGraphs": "true", "CUDAGraphWarmupSteps": "3"}
    with pytest.raises(InvalidInputError, match="warmup_steps: got 0"):
        to_force(
            Springs(),
            global_parameters=GLOBALS,
            backend=backends.TorchForce(warmup_steps=0),
            platform="CPU",
        )
    with pytest.raises(UnavailableBackendError, match="leave compile out"):
        to_force(Springs(), global_parameters=GLOBALS, backend=TORCH, platform="CPU", compile=True)


@pytest.mark.openmmtorch
def test_forces_are_checked_on_the_example():
    class Wrong(torch.nn.Module):
        def forward(self, positions: torch.Tensor, box: torch.Tensor | None) -> torch.Tensor:
            return positions.pow(4).sum() + positions.detach().square().sum()

    options = {"backend": TORCH, "platform": "Reference", "example": POSITIONS}
    with pytest.warns(NonConservativeForceWarning, match="not the gradient"):
        to_force(Wrong(), **options)
    to_force(Wrong(), check=False, **options)


@pytest.mark.openmmtorch
def test_a_torch_force_keeps_the_module_as_it_was():
    module = Springs()
    options = {"global_parameters": GLOBALS, "backend": TORCH, "platform": "Reference"}
    force, other = (to_force(module, **options) for _ in range(2))
    truth = expected(module, POSITIONS, **GLOBALS)
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert_close(evaluate(open_context(force), POSITIONS), (*truth[:2], {}), 1e-10)
    system = openmm.System()
    for _ in range(N):
        system.addParticle(1.0)
    system.addForce(other)
    potential = mdgraft.graft(system)
    assert potential.routes == {"TorchForce": "host"}
    assert potential(torch.tensor(POSITIONS)).item() == pytest.approx(truth[0], rel=1e-10)


@pytest.mark.openmmtorch
def test_openmm_may_be_imported_before_torch():
    """Its plug-in then was not loaded, for want of torch's libraries."""
    code = """
import json, openmm
import torch
from mdgraft_openmm import backends, to_force
class Energy(torch.nn.Module):
    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.pow(2).sum()
system = openmm.System()
system.addParticle(1.0)
system.addForce(to_force(Energy(), backend=backends.TorchForce(), platform="Reference"))
platform = openmm.Platform.getPlatformByName("Reference")
context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
context.setPositions([[2.0, 0.0, 0.0]])
print(json.dumps({"energy": context.getState(energy=True).getPotentialEnergy()._value}))
"""
    trial = _trials.run_trial(code)
    assert trial.answer == {"energy": 4.0}, trial.error
