"""Any torch energy as a Force: value, forces, parameters, subsets, boxes, on every platform."""

import concurrent.futures
import copy
import gc
import importlib
import pickle
import threading
import weakref

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from exported import (
    BOX,
    CALLBACKS,
    GLOBALS,
    MODULES,
    PLATFORMS,
    POSITIONS,
    N,
    Periodic,
    Springs,
    assert_close,
    evaluate,
    expected,
    open_context,
    plain,
    tolerance,
)
from mdgraft import InvalidInputError, NonConservativeForceWarning
from mdgraft_openmm import to_force
from mdgraft_openmm.export import availability

SUBSET = [4, 1, 3]


PYTHON = CALLBACKS["PythonForce"]
pytestmark = pytest.mark.usefixtures("each_callback")


#: Every module on the fast platforms, one on each of the others.
_CASES = [(k, p) for k in MODULES for p in PLATFORMS if k == "periodic" or "OpenCL" not in p]


@pytest.mark.parametrize(("kind", "platform"), _CASES)
@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
def test_gives_what_the_module_gives(kind, platform, slopes):
    """Before and after ``setParameter``; the second evaluation is not the memory of the first."""
    make, periodic = MODULES[kind]
    module, box = make(), BOX if periodic else None
    force = to_force(
        module,
        periodic=periodic,
        global_parameters=GLOBALS,
        parameter_derivatives=slopes,
        backend=PYTHON,
    )
    context = open_context(force, box=box, platform=platform)
    rtol = tolerance(platform, module)
    for values in (GLOBALS, {"k": -1.7, "shift": 1e-3}, {"k": 4e5, "shift": 0.0}):
        for name, value in values.items():
            context.setParameter(name, value)
        for x in (POSITIONS, 1.1 * POSITIONS):
            energy, forces, derivatives = expected(module, x, box, **values)
            truth = (energy, forces, derivatives if slopes else {})
            assert_close(evaluate(context, x), truth, rtol)
            assert_close(evaluate(context, x), truth, rtol)
    assert force.getForceGroup() == 0
    assert force.usesPeriodicBoundaryConditions() == periodic


@pytest.mark.parametrize("slopes", [False, ["shift"]], ids=["", "derivatives"])
@pytest.mark.parametrize("particles", [SUBSET, np.array(SUBSET), dict.fromkeys(SUBSET)])
def test_subsets_keep_their_order(particles, slopes):
    force = to_force(
        Springs(),
        particles=particles,
        global_parameters=GLOBALS,
        parameter_derivatives=slopes,
        backend=PYTHON,
    )
    energy, chosen, derivatives = expected(Springs(), POSITIONS[SUBSET], **GLOBALS)
    forces = np.zeros((N, 3))
    forces[SUBSET] = chosen
    wanted = {name: derivatives[name] for name in slopes or []}
    assert_close(evaluate(open_context(force), POSITIONS), (energy, forces, wanted), 1e-10)


@pytest.mark.parametrize("slopes", [False, ["shift"]], ids=["", "derivatives"])
def test_particles_beyond_the_system_are_refused(slopes):
    """OpenMM would read and write beyond its memory; what is refused still belongs to Python."""
    options = {"global_parameters": GLOBALS, "parameter_derivatives": slopes, "backend": PYTHON}
    force, other = (to_force(Springs(), particles=[N, 0, 2], **options) for _ in range(2))
    name = "CustomCVForce" if slopes else PYTHON.name
    kind = getattr(openmm, name, None) or importlib.import_module("openmmtorch").PythonTorchForce
    assert type(force).__name__ == name and isinstance(force, kind)
    small, large, reversed_order = openmm.System(), openmm.System(), openmm.System()
    for _ in range(N):
        small.addParticle(1.0)
    match = "particles: the force has particle 6, but the System has 6, wanted indices from 0 to 5"
    pickled = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(force))))
    assert type(pickled).__name__ == name and isinstance(pickled, kind)
    for again in (force, force, copy.deepcopy(force), pickled):
        with pytest.raises(InvalidInputError, match=match):
            small.addForce(again)
        assert small.getNumForces() == 0 and again.thisown
    # A System that gets its particles later has none to compare with.
    reversed_order.addForce(other)
    for system in (large, reversed_order):
        for _ in range(N + 1):
            system.addParticle(1.0)
    large.addForce(force)
    assert large.getNumForces() == 1 and not force.thisown
    with pytest.raises(Exception, match="does not own"):
        large.addForce(force)


def test_one_evaluation_gives_energy_and_all_derivatives():
    calls = []

    def counted(x, box, k, shift):
        calls.append(len(x))
        return plain(x, box, k, shift)

    force = to_force(counted, global_parameters=GLOBALS, parameter_derivatives=True, check=False)
    context = open_context(force)
    for count in range(1, 4):
        evaluate(context, count * POSITIONS)
        assert len(calls) == count
    context.setParameter("k", 1.5)
    evaluate(context, 3 * POSITIONS)
    assert len(calls) == 4


def test_names_groups_and_several_at_once():
    """Two forces that share a global parameter, in groups of their own."""
    forces = [
        to_force(
            Springs(),
            global_parameters=GLOBALS,
            parameter_derivatives=False,
            name="soft",
            force_group=3,
            backend=PYTHON,
        ),
        to_force(
            plain,
            global_parameters=GLOBALS,
            parameter_derivatives=["k"],
            name="hard",
            force_group=7,
            backend=PYTHON,
        ),
    ]
    assert [f.getName() for f in forces] == ["soft", "hard"]
    context = open_context(forces)
    context.setParameter("k", 2.0)
    values = {"k": 2.0, "shift": 0.2}
    first, second = (expected(m, POSITIONS, **values) for m in (Springs(), plain))
    assert_close(evaluate(context, POSITIONS, {3}), (first[0], first[1], {}), 1e-10)
    assert_close(evaluate(context, POSITIONS, {7}), (second[0], second[1], {}), 1e-10)
    both = (first[0] + second[0], first[1] + second[1], {"k": second[2]["k"]})
    assert_close(evaluate(context, POSITIONS), both, 1e-10)


@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
@pytest.mark.parametrize("make", [Springs, Periodic], ids=["open", "periodic"])
def test_files_hold_the_module_as_it_was(make, slopes):
    """Also when the original is still there and has changed, or is gone."""
    module, box = make(), BOX if make is Periodic else None
    force = to_force(
        module,
        periodic=box is not None,
        particles=range(N),
        global_parameters=GLOBALS,
        parameter_derivatives=slopes,
        force_group=2,
        backend=PYTHON,
    )
    text = openmm.XmlSerializer.serialize(force)
    energy, forces, derivatives = expected(module, POSITIONS, box, **GLOBALS)
    truth = (energy, forces, derivatives if slopes else {})
    with torch.no_grad():
        module.weight.mul_(1.5)
    for _ in range(2):
        loaded = openmm.XmlSerializer.deserialize(text)
        assert loaded.getForceGroup() == 2
        assert_close(evaluate(open_context(loaded, box=box), POSITIONS), truth, 1e-10)
    del module, force
    gc.collect()
    loaded = openmm.XmlSerializer.deserialize(text)
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(loaded))
    assert_close(evaluate(open_context(again, box=box), POSITIONS), truth, 1e-10)


@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
def test_follows_its_module_in_memory(slopes):
    """Copies too, also those that OpenMM makes of forces inside others."""
    module = Springs()
    force = to_force(
        module, global_parameters=GLOBALS, parameter_derivatives=slopes, backend=PYTHON
    )
    context = open_context([force, copy.deepcopy(force)])
    with torch.no_grad():
        module.weight.mul_(2.0)
    energy, forces, _ = expected(module, POSITIONS, **GLOBALS)
    assert_close(evaluate(context, POSITIONS), (2 * energy, 2 * forces, {}), 1e-10)
    context.reinitialize()
    assert_close(evaluate(context, POSITIONS), (2 * energy, 2 * forces, {}), 1e-10)


def test_what_cannot_be_pickled_runs_but_is_not_written():
    force = to_force(lambda x: x.square().sum(), backend=PYTHON)
    assert evaluate(open_context(force), POSITIONS)[0] == pytest.approx((POSITIONS**2).sum())
    with pytest.raises(openmm.OpenMMException, match="could not be pickled"):
        openmm.XmlSerializer.serialize(to_force(lambda x: x.square().sum(), backend=PYTHON))


def test_what_cannot_be_pickled_has_derivatives_but_is_not_read():
    """OpenMM copies forces inside others by writing them, so that here it must be able to."""
    force = to_force(
        lambda x, k: k * x.square().sum(),
        global_parameters={"k": 2.0},
        parameter_derivatives=True,
        backend=PYTHON,
    )
    text = openmm.XmlSerializer.serialize(force)
    found = evaluate(open_context(force), POSITIONS)
    assert found[2]["k"] == pytest.approx((POSITIONS**2).sum())
    with pytest.raises(openmm.OpenMMException, match="written without its module"):
        evaluate(open_context(openmm.XmlSerializer.deserialize(text)), POSITIONS)


def test_a_module_whose_code_is_gone_says_so(monkeypatch):
    import exported

    force = to_force(Springs(), global_parameters=GLOBALS, backend=PYTHON)
    text = openmm.XmlSerializer.serialize(force)
    del force
    gc.collect()
    monkeypatch.delattr(exported, "Springs")
    loaded = openmm.XmlSerializer.deserialize(text)
    with pytest.raises(openmm.OpenMMException, match=r"cannot be loaded.*importable"):
        evaluate(open_context(loaded), POSITIONS)


def test_in_a_file_torchscript_is_torchscript():
    module = torch.jit.script(Springs())
    force = to_force(module, global_parameters=GLOBALS, backend=PYTHON)
    loaded = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(force))
    truth = expected(Springs(), POSITIONS, **GLOBALS)
    assert_close(evaluate(open_context(loaded), POSITIONS), (*truth[:2], {}), 1e-10)


# Conservation -----------------------------------------------------------------------------------


class Detached(Springs):
    """Half of its energy has no gradient."""

    def forward(self, positions, box):
        return positions.pow(4).sum() + positions.detach().square().sum()


class Predicted(Springs):
    """Forces that are not those of the energy."""

    def forward(self, positions, box):
        return positions.pow(2).sum(), -2.1 * positions


class Rounded(Springs):
    """An energy without any gradient."""

    def forward(self, positions, box):
        with torch.no_grad():
            return positions.pow(2).sum()


WRONG = {"detached": Detached, "predicted": Predicted, "without a gradient": Rounded}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("kind", WRONG)
def test_forces_that_are_no_gradient_are_told_once(kind, dtype):
    module = WRONG[kind](dtype)
    context = open_context(to_force(module, backend=PYTHON))
    with pytest.warns(NonConservativeForceWarning, match=r"not the gradient.*kJ/mol/nm") as told:
        [evaluate(context, POSITIONS) for _ in range(2)]
    assert len(told) == 1
    quiet = open_context(to_force(module, backend=PYTHON, check=False))
    evaluate(quiet, POSITIONS)


#: Energies that are right, but where a difference of energies is a hard test of it.
RIGHT = {
    "at a minimum": lambda x: x.square().sum() * 1e6,
    "flat": lambda x: 0.0 * x.sum(),
    "a large constant": lambda x: x.square().sum() + 1e6,
    "stiff": lambda x: 3e5 * ((x[1:] - x[:-1]).norm(dim=-1) - 0.15).square().sum(),
    "steep": lambda x: ((x[1:] - x[:-1]).norm(dim=-1) / 0.3).pow(-12).sum(),
    "infinite": lambda x: 1.0 / (0.0 * x.sum()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("kind", RIGHT)
def test_right_forces_cause_no_alarm(kind, dtype):
    positions = 0.0 * POSITIONS if kind == "at a minimum" else POSITIONS
    context = open_context(to_force(RIGHT[kind], dtype=dtype, backend=PYTHON))
    context.setPositions(positions)
    context.getState(energy=True)


def test_a_cutoff_without_switch_causes_no_alarm():
    """Pairs that cross it change the energy and not the forces."""
    rng = np.random.default_rng(2)
    positions = np.stack(np.meshgrid(*3 * [np.arange(6)]), axis=-1).reshape(-1, 3) * 0.35
    positions = positions + 0.03 * rng.normal(size=positions.shape)

    def lennard_jones(x):
        r2 = (x[:, None] - x[None]).square().sum(dim=-1) + 10 * torch.eye(len(x))
        s6 = (0.1156 / r2) ** 3
        return (2.0 * (s6 * s6 - s6) * (r2 < 1.0)).sum()

    context = open_context(to_force(lennard_jones, backend=PYTHON), n=len(positions))
    evaluate(context, positions)


def test_gradients_of_few_entries_count_in_full():
    picked = torch.tensor([[0, 1, 2], [3, 4, 4]])
    values = torch.tensor(POSITIONS)[picked, torch.arange(3)]

    def energy(x):
        return torch.gather(x, 0, picked, sparse_grad=True).square().sum()

    found = evaluate(open_context(to_force(energy, backend=PYTHON)), POSITIONS)
    forces = np.zeros_like(POSITIONS)
    np.add.at(forces, (picked.numpy(), np.arange(3)), -2 * values.numpy())
    assert_close(found, (float(values.square().sum()), forces, {}), 1e-12)


# What goes on around the module -------------------------------------------------------------------


def test_gradients_work_wherever_openmm_is_called():
    context = open_context(to_force(Springs(), global_parameters=GLOBALS, backend=PYTHON))
    truth = expected(Springs(), POSITIONS, **GLOBALS)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert_close(evaluate(context, POSITIONS), (*truth[:2], {}), 1e-10)
        assert_close(evaluate(context, 1.0 * POSITIONS), (*truth[:2], {}), 1e-10)


def test_the_default_device_is_not_taken():
    context = open_context(to_force(Springs(), global_parameters=GLOBALS, backend=PYTHON))
    truth = expected(Springs(), POSITIONS, **GLOBALS)
    torch.set_default_device("meta")
    try:
        found = evaluate(context, POSITIONS)
    finally:
        torch.set_default_device(None)
    assert_close(found, truth, 1e-10)


def test_another_thread_keeps_the_number_of_threads():
    seen = {}

    def watch(x):
        seen[threading.get_ident()] = torch.get_num_threads()
        return x.square().sum()

    context = open_context(to_force(watch, backend=PYTHON))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(evaluate, context, POSITIONS).result()
        evaluate(context, POSITIONS)
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 2 and set(seen.values()) == {1}


def test_nothing_is_kept():
    """Neither graphs, nor gradients of parameters, nor the module once the force is gone."""
    kept = []

    class Watched(Springs):
        def forward(self, positions, box):
            energy = (self.weight * positions).square().sum()
            kept.append(weakref.ref(energy))
            return energy

    module = Watched()
    context = open_context(to_force(module, backend=PYTHON))
    evaluate(context, POSITIONS)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    assert module.weight.grad is None
    gone = weakref.ref(module)
    del module, context
    gc.collect()
    assert gone() is None


FAULTS = {
    "raises": (lambda x: {}["bond"], "KeyError: 'bond'"),
    "several energies": (lambda x: x.sum(dim=0), r"InvalidInputError: module: .*shape \(3,\)"),
    "three things": (lambda x: (x.sum(), x, x), "module: returned 3 things for one frame"),
    "no tensor": (lambda x: 1.0, "InvalidInputError: module: returned float for one frame"),
    "forces of the wrong shape": (
        lambda x: (x.sum(), x[:2]),
        r"InvalidInputError: module: .*\(2, 3\) as forces, wanted .*\(6, 3\)",
    ),
}


@pytest.mark.parametrize(("module", "message"), FAULTS.values(), ids=FAULTS)
def test_errors_reach_the_user(module, message):
    context = open_context(to_force(module, backend=PYTHON))
    with pytest.raises(openmm.OpenMMException, match=message):
        evaluate(context, POSITIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
def test_on_a_gpu(slopes):
    """The module on the device, the Context on the CPU and on CUDA if this OpenMM has it."""
    module = Springs(torch.float32).to("cuda")
    for platform in {"Reference", "CUDA"} & set(availability.registered_platforms()):
        options = {"parameter_derivatives": slopes, "backend": PYTHON}
        force = to_force(module, global_parameters=GLOBALS, **options)
        system = openmm.System()
        for _ in range(N):
            system.addParticle(1.0)
        system.addForce(force)
        found = openmm.Platform.getPlatformByName(platform)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), found)
        energy, forces, derivatives = expected(Springs(torch.float32), POSITIONS, **GLOBALS)
        truth = (energy, forces, derivatives if slopes else {})
        assert_close(evaluate(context, POSITIONS), truth, 1e-4)


def test_compiled():
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    original = torch.compile
    torch.compile = lambda module: original(module, backend=backend)
    try:
        force = to_force(Springs(), global_parameters=GLOBALS, compile=True, backend=PYTHON)
        found = evaluate(open_context(force), POSITIONS)
    finally:
        torch.compile = original
    assert calls
    truth = expected(Springs(), POSITIONS, **GLOBALS)
    assert_close(found, (*truth[:2], {}), 1e-10)


# Arguments ----------------------------------------------------------------------------------------


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout())

    def forward(self, positions, box):
        return self.layers(positions).sum()


def _bonds():
    system = openmm.System()
    force = openmm.HarmonicBondForce()
    force.setUsesPeriodicBoundaryConditions(True)
    for _ in range(2):
        system.addParticle(1.0)
    force.addBond(0, 1, 0.1, 100.0)
    system.addForce(force)
    return mdgraft.graft(system)


BAD = {
    "no callable": (3.0, {}, "module: got float, wanted a torch.nn.Module"),
    "random": (Dropping(), {}, r"layers.1.*Dropout.*training mode.*module.eval\(\)"),
    "not callable so": (lambda a, b, c: a, {}, r"cannot be called as \(positions, box\)"),
    "a missing argument": (
        plain,
        {"global_parameters": {"k": 1.0}},
        r"cannot be called as \(positions, box, k\)",
    ),
    "no box": (lambda x: x.sum(), {"periodic": True}, "takes no box, but periodic is true"),
    "no particles": (plain, {"particles": []}, "particles: is empty"),
    "negative particles": (plain, {"particles": [-1, 2]}, "different indices from 0 on"),
    "a particle twice": (plain, {"particles": [1, 1]}, "different indices from 0 on"),
    "no indices": (plain, {"particles": [0.5]}, "particles: wanted indices"),
    "a mask": (plain, {"particles": [True, False]}, "mask of booleans .* numpy.flatnonzero"),
    "no default": (plain, {"global_parameters": ["k", "shift"]}, "'k' has no default"),
    "default no number": (plain, {"global_parameters": {"k": "a"}}, "'a', wanted a number"),
    "default not finite": (plain, {"global_parameters": {"k": np.nan}}, "wanted a finite number"),
    "an empty name": (plain, {"global_parameters": {"": 1.0}}, "wanted a mapping from names"),
    "an unknown derivative": (
        plain,
        {"global_parameters": GLOBALS, "parameter_derivatives": ["q"]},
        "'q' is none of the global parameters",
    ),
    "no identifier": (
        lambda x, **values: x.sum(),
        {"global_parameters": {"a-b": 1.0}, "parameter_derivatives": True},
        "'a-b' cannot stand in an expression",
    ),
    "a group": (lambda x: x.sum(), {"force_group": 32}, "force_group: got 32, wanted 0 to 31"),
    "no group": (lambda x: x.sum(), {"force_group": "a"}, "force_group: got 'a', wanted 0"),
    "no name": (lambda x: x.sum(), {"name": 3}, "name: got 3, wanted a string"),
    "no names": (lambda x: x.sum(), {"parameter_derivatives": None}, "wanted True, False or names"),
    "a backend": (lambda x: x.sum(), {"backend": "Torch"}, "backend: got 'Torch', wanted 'auto'"),
    "no backend": (lambda x: x.sum(), {"backend": 3}, "backend: got int, wanted 'auto'"),
    "a platform": (lambda x: x.sum(), {"platform": "Abacus"}, "platform: got 'Abacus'"),
    "a dtype": (lambda x: x.sum(), {"dtype": torch.int64}, "dtype: got torch.int64"),
    "a device": (lambda x: x.sum(), {"device": "abacus"}, "device: got 'abacus', where torch"),
    "no device": (lambda x: x.sum(), {"device": "meta"}, "device: got 'meta', where torch"),
    "an example": (lambda x: x.sum(), {"example": np.zeros(3)}, r"example: .*wanted \(n, 3\)"),
    "an example with NaN": (lambda x: x.sum(), {"example": np.full((2, 3), np.nan)}, "NaN"),
    "an example without box": (
        lambda x, box: x.sum(),
        {"example": np.zeros((2, 3)), "periodic": True},
        "example: has no box",
    ),
    "an example with a wrong box": (
        lambda x, box: x.sum(),
        {"example": (np.zeros((2, 3)), np.zeros(3)), "periodic": True},
        r"the box has shape \(3,\)",
    ),
    "an example of others": (
        lambda x: x.sum(),
        {"example": np.zeros((2, 3)), "particles": [0, 1, 2]},
        "has 2 positions, wanted those of the 3 particles",
    ),
    "a potential without box": (_bonds(), {}, "depends on the box; pass periodic=True"),
    "too many for a potential": (
        _bonds(),
        {"periodic": True, "particles": [0, 1, 2]},
        "particles: got 3, wanted 2",
    ),
    "a compiled potential": (_bonds(), {"periodic": True, "compile": True}, "leave compile out"),
    "a potential's dtype": (
        _bonds(),
        {"periodic": True, "dtype": torch.float32},
        r"use potential.to\(\)",
    ),
    "a potential's global": (
        _bonds(),
        {"periodic": True, "global_parameters": ["k"]},
        "the potential has no global parameter 'k'",
    ),
}


@pytest.mark.parametrize(("module", "options", "message"), BAD.values(), ids=BAD)
def test_arguments_that_make_no_sense(module, options, message):
    with pytest.raises(InvalidInputError, match=message):
        to_force(module, **options)


def test_defaults_come_from_where_they_are():
    def f(x, k=2.5):
        return k * x.square().sum()

    for asked in (["k"], "k", {"k": None}, {"k": 2.5}):
        context = open_context(to_force(f, global_parameters=asked, backend=PYTHON))
        assert dict(context.getParameters()) == {"k": 2.5}
        context.setPositions(POSITIONS)
        # Derivatives are there without being asked for.
        slope = context.getState(parameterDerivatives=True).getEnergyParameterDerivatives()["k"]
        assert slope == pytest.approx(float((POSITIONS**2).sum()))
    for quantity, number in (
        (1 * openmm.unit.kilojoule_per_mole, 1.0),
        (1 * openmm.unit.kilocalorie_per_mole, 4.184),
        (2 * openmm.unit.angstrom, 0.2),
        (300 * openmm.unit.kelvin, 300.0),
    ):
        options = {"global_parameters": {"k": quantity}, "parameter_derivatives": False}
        force = to_force(f, backend=PYTHON, **options)
        assert type(force).__name__ == PYTHON.name
        assert dict(force.getGlobalParameters()) == pytest.approx({"k": number})
    # Not a global parameter, and no box either.
    context = open_context(to_force(f, backend=PYTHON))
    assert evaluate(context, POSITIONS)[0] == pytest.approx(2.5 * (POSITIONS**2).sum())


def test_the_usual_backend_is_explained():
    told = mdgraft_openmm.explain_backends(Springs(), global_parameters=GLOBALS)
    assert list(told.values()).count("used") == 1
    # The first that works, in this order.
    assert list(told) == ["PythonTorchForce", "TorchForce", "PythonForce"][: len(told)]
    assert list(told.values())[-1] == "used" or told["TorchForce"] == "used"


LAYOUTS = {
    "transposed": lambda x: (-2 * x.detach().T.contiguous()).T,
    "negated": lambda x: torch._neg_view(2 * x.detach()),
    "strided": lambda x: torch.stack((-2 * x.detach(), x.detach()), dim=-1)[..., 0],
    "single precision": lambda x: (-2 * x.detach()).float(),
    "sparse": lambda x: (-2 * x.detach()).to_sparse(),
}


@pytest.mark.parametrize("particles", [None, SUBSET], ids=["", "subset"])
@pytest.mark.parametrize("forces", LAYOUTS.values(), ids=LAYOUTS)
def test_forces_may_lie_in_memory_as_they_like(forces, particles):
    force = to_force(
        lambda x: (x.square().sum(), forces(x)), particles=particles, check=False, backend=PYTHON
    )
    truth, rows = np.zeros_like(POSITIONS), slice(None) if particles is None else particles
    truth[rows] = -2 * POSITIONS[rows]
    found = evaluate(open_context(force), POSITIONS)
    np.testing.assert_allclose(found[1], truth, rtol=0, atol=1e-6)


def test_a_module_may_keep_what_it_is_given():
    """The host goes on with its own memory."""
    kept = []

    def energy(x):
        kept.append(x.detach())
        return x.square().sum()

    context = open_context(to_force(energy, backend=PYTHON, check=False))
    for scale in (1.0, 2.0):
        evaluate(context, scale * POSITIONS)
    np.testing.assert_array_equal(kept[0], POSITIONS)
