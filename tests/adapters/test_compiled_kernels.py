"""Compiled kernels in whole systems: against plain torch, alone, in threads and in batches."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_kernels_agree
from mdgraft.ensembles import frame_derivatives
from mdgraft.ensembles.per_frame import reverse_jacobian
from mdgraft.frames import Frames
from openmm import NonbondedForce


def mixture(n_side, method, *, cutoff=0.8, tilt=0.0, seed=0):
    """Charged Lennard-Jones particles of three kinds near a lattice, some of them bonded."""
    rng = np.random.default_rng(seed)
    n, length = n_side**3, 0.4 * n_side
    system, force = openmm.System(), NonbondedForce()
    system.addForce(force)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    torsions = openmm.PeriodicTorsionForce()
    for other in (bonds, angles, torsions):
        system.addForce(other)
    box = np.diag([length, length, length]) + tilt * length * np.array(
        [[0, 0, 0], [0.5, 0, 0], [-0.4, 0.45, 0]]
    )
    system.setDefaultPeriodicBoxVectors(*box)
    for i in range(n):
        system.addParticle(20.0)
        force.addParticle(0.2 * (-1) ** i, 0.30 + 0.01 * (i % 3), 0.5 + 0.2 * (i % 3))
    for i in range(0, n - 3, 4):
        bonds.addBond(i, i + 1, 0.38, 2000.0)
        angles.addAngle(i, i + 1, i + 2, 2.0, 40.0)
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 1 + i % 3, 0.4, 3.0)
        force.addException(i, i + 1, 0.0, 1.0, 0.0)
        force.addException(i, i + 3, 0.02, 0.33, 0.2)
    force.setNonbondedMethod(method)
    force.setCutoffDistance(cutoff)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.9 * cutoff)
    lattice = np.stack(np.meshgrid(*[np.arange(n_side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    x = lattice * 0.4 + rng.normal(size=(n, 3)) * 0.02
    return system, torch.tensor(x), torch.tensor(box)


METHODS = {
    name: getattr(NonbondedForce, name)
    for name in ("NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic", "PME", "LJPME")
}
each_method = pytest.mark.parametrize("method", METHODS)


def all_derivatives(potential, x, box=None):
    inputs = [x.clone().requires_grad_()]
    if potential.periodic:
        inputs.append(box.clone().requires_grad_())
    energy = potential(*inputs)
    wanted = [*inputs, *potential.parameters()]
    return energy.detach(), torch.autograd.grad(energy.sum(), wanted, allow_unused=True)


@each_method
@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_many_particles(method, tilt):
    """Lists of more than a few clusters, with several threads."""
    system, x, box = mixture(10, METHODS[method], cutoff=1.0, tilt=tilt)
    potential = mdgraft.graft(system)
    assert_kernels_agree(potential, x, box if potential.periodic else None, rtol=1e-10)


@each_method
def test_second_derivatives(method):
    system, x, box = mixture(5, METHODS[method])
    potential = mdgraft.graft(system)
    rng = torch.Generator().manual_seed(3)
    names = [name for name, p in potential.named_parameters() if p.numel()]

    def product():
        inputs = [x.clone().requires_grad_()]
        if potential.periodic:
            inputs.append(box.clone().requires_grad_())
        wanted = inputs + [potential.get_parameter(name) for name in names]
        slopes = torch.autograd.grad(potential(*inputs), wanted, create_graph=True)
        rng.manual_seed(3)
        directions = [torch.randn(s.shape, generator=rng, dtype=s.dtype) for s in slopes]
        total = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))
        return torch.autograd.grad(total, wanted, allow_unused=True)

    found = product()
    with mdgraft.plain_kernels():
        expected = product()
    for name, a, b in zip(
        ["x", "box"][: len(found) - len(names)] + names, found, expected, strict=True
    ):
        if a is None and b is None:
            continue
        assert (a - b).abs().max() <= 1e-9 * b.abs().max() + 1e-9, name


@pytest.mark.parametrize("method", ["Ewald", "PME", "LJPME"])
@pytest.mark.parametrize("alpha", [3.0, 9.0, 14.0, 30.0])
def test_splitting_parameters_of_all_sizes(method, alpha):
    """Beyond what a polynomial can stand for, and at its borders."""
    system, x, box = mixture(4, getattr(NonbondedForce, method), cutoff=0.79)
    force = system.getForce(0)
    force.setPMEParameters(alpha, 24, 24, 24)
    force.setLJPMEParameters(alpha, 24, 24, 24)
    potential = mdgraft.graft(system)
    term = potential.term("NonbondedForce")
    if method == "Ewald":
        term.settings = dataclasses.replace(term.settings, alpha=alpha)
        term._made = None
    assert term.settings.alpha == alpha
    assert_kernels_agree(potential, x, box, rtol=1e-10)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def product():
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(potential(y, box), y, create_graph=True)
        return torch.autograd.grad(slope, y, direction)[0]

    found = product()
    with mdgraft.plain_kernels():
        expected = product()
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@each_method
def test_third_derivatives(method):
    """They go through the plain form, in reverse and in forward mode."""
    system, x, box = mixture(3, METHODS[method], cutoff=0.55)
    potential = mdgraft.graft(system).requires_grad_(False)
    cell = box if potential.periodic else None
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def slope(y):
        return torch.func.jvp(lambda z: potential(z, cell), (y,), (direction,))[1]

    def curvature(y):
        return torch.func.jvp(slope, (y,), (direction,))[1]

    def repeated():
        """Derivatives along the direction by one backward pass after the other."""
        y = x.clone().requires_grad_()
        value = potential(y, cell)
        for _ in range(4):
            (slopes,) = torch.autograd.grad(value, y, create_graph=True)
            value = (slopes * direction).sum()
        return slopes

    def third():
        backward = torch.func.grad(curvature)(x)
        forward = torch.func.jvp(curvature, (x,), (direction,))[1]
        return backward, forward, repeated()

    found = third()
    with mdgraft.plain_kernels():
        expected = third()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-6)


def test_forward_derivatives_beyond_the_second_are_not_lost(monkeypatch):
    """Where torch does not say how many derivatives are taken, kernels refuse."""
    system, x, _ = mixture(2, METHODS["NoCutoff"])
    potential = mdgraft.graft(system)
    monkeypatch.setattr("mdgraft.kernels.switch._nested_derivatives", lambda: 0)

    def along(function):
        return lambda y: torch.func.jvp(function, (y,), (torch.ones_like(y),))[1]

    with pytest.raises(mdgraft.UnsupportedDerivativeError, match="plain_kernels"):
        along(along(along(lambda y: potential(y**2))))(x)


@each_method
def test_frame_by_frame(method):
    """Derivatives of every frame at once, and from one frame after the other."""
    system, x, box = mixture(4, METHODS[method], cutoff=0.75)
    potential = mdgraft.graft(system)
    potential.tie("sigma", {"NonbondedForce.sigma": [0, 3, 6]})
    potential.freeze("HarmonicBondForce.k")
    names = [
        "tied.sigma",
        "NonbondedForce.charge",
        "NonbondedForce.exception_sigma",
        "HarmonicBondForce.k",
        "PeriodicTorsionForce.phase",
    ]
    noise = 0.01 * torch.randn(
        (21, *x.shape), generator=torch.Generator().manual_seed(2), dtype=x.dtype
    )
    frames = Frames(
        positions=x + noise,
        box=box * (1 + 0.01 * torch.arange(21.0))[:, None, None] if potential.periodic else None,
    )
    assert potential.framewise
    found = frame_derivatives(potential, frames, names, batch_size=8)

    def energy(batch):
        return (potential(batch.positions, batch.box),)

    expected = reverse_jacobian(potential, energy, frames, names)[0]
    scale = expected.abs().max(dim=0).values + 1e-3
    assert ((found.gradients - expected).abs() <= 1e-10 * scale).all()
    with torch.no_grad():
        torch.testing.assert_close(found.energies, potential(frames.positions, frames.box))
        forces = potential.forces(frames.positions, frames.box)
    torch.testing.assert_close(found.forces, forces, rtol=1e-10, atol=1e-8)
    with mdgraft.plain_kernels():
        assert method == "NoCutoff" or not potential.framewise
        plain = frame_derivatives(potential, frames[:3], names)
    assert ((plain.gradients - expected[:3]).abs() <= 1e-9 * scale).all()
    assert not potential.get_parameter("HarmonicBondForce.k").requires_grad
    assert potential.get_parameter("NonbondedForce.charge").requires_grad


def test_full_hessian_of_a_small_molecule():
    system, x, _ = mixture(2, METHODS["NoCutoff"])
    potential = mdgraft.graft(system)
    hessian = torch.func.hessian(potential)(x)
    with mdgraft.plain_kernels():
        expected = torch.func.hessian(potential)(x)
    torch.testing.assert_close(hessian, expected, rtol=1e-9, atol=1e-7)


@each_method
def test_batches_of_seeds(method):
    """The batches of `torch.autograd.grad`, which are none of `torch.func`."""
    system, x, box = mixture(2, METHODS[method], cutoff=0.4)
    solvent = openmm.GBSAOBCForce()
    for i in range(8):
        solvent.addParticle(0.2 * (-1) ** i, 0.15, 0.8)
    if method == "NoCutoff":
        system.addForce(solvent)
    potential = mdgraft.graft(system)
    cell = box if potential.periodic else None
    y = x.clone().requires_grad_()
    wanted = [y, *(p for p in potential.parameters() if p.numel())]
    eye = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    (slope,) = torch.autograd.grad(potential(y, cell), y, create_graph=True)
    found = torch.autograd.grad(slope, wanted, eye, is_grads_batched=True, allow_unused=True)
    with mdgraft.plain_kernels():
        (slope,) = torch.autograd.grad(potential(y, cell), y, create_graph=True)
        expected = torch.autograd.grad(slope, wanted, eye, is_grads_batched=True, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-6)
    frames = torch.stack([x, 1.01 * x, 0.99 * x])
    energies = potential(frames, cell)
    seeds = torch.eye(3, dtype=x.dtype)
    charge = potential.get_parameter("NonbondedForce.charge")
    rows = torch.autograd.grad(energies, charge, seeds, is_grads_batched=True)[0]
    for row, frame in zip(rows, frames, strict=True):
        (single,) = torch.autograd.grad(potential(frame, cell), charge)
        torch.testing.assert_close(row, single, rtol=1e-10, atol=1e-10)


def test_exceptions_that_change():
    """Another list of exceptions of the same length, by load_state_dict."""
    systems = []
    for shift in (1, 2):
        system, x, box = mixture(4, METHODS["PME"], cutoff=0.7)
        force = system.getForce(0)
        for k in range(force.getNumExceptions()):
            i, _, *parameters = force.getExceptionParameters(k)
            force.setExceptionParameters(k, i, (i + shift + 3 * (k % 2)) % 64, *parameters)
        systems.append(system)
    first, second = (mdgraft.graft(system) for system in systems)
    expected = second(x, box).detach()
    assert abs(first(x, box).detach() - expected) > 1e-3
    first.load_state_dict(second.state_dict())
    for potential in (first, copy.deepcopy(first)):
        assert abs(potential(x, box).detach() - expected) <= 1e-12 * abs(expected)
        with mdgraft.plain_kernels():
            assert abs(potential(x, box).detach() - expected) <= 1e-9 * abs(expected)


def test_tensors_of_inference_mode():
    system, x, box = mixture(4, METHODS["PME"], cutoff=0.7)
    potential = mdgraft.graft(system)
    expected = all_derivatives(potential, x, box)
    with torch.inference_mode():
        y, cell = x.clone(), box.clone()
        assert torch.equal(potential(y, cell), expected[0])
    torch.testing.assert_close(potential.forces(y, cell), -expected[1][0])
    found = frame_derivatives(potential, Frames(positions=y[None], box=cell[None]), [])
    torch.testing.assert_close(found.forces[0], -expected[1][0])


def test_threads_of_the_caller():
    """Several threads at once, none of which changes what is trainable."""
    system, x, box = mixture(5, METHODS["PME"], cutoff=0.9)
    potential = mdgraft.graft(system)
    frames = Frames(positions=torch.stack([x, 1.001 * x]), box=torch.stack([box, box]))
    names = ["NonbondedForce.charge", "NonbondedForce.sigma", "NonbondedForce.epsilon"]
    expected = [frame_derivatives(potential, frames, [name]).gradients for name in names]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        jobs = [
            (k, pool.submit(frame_derivatives, potential, frames, [names[k]]))
            for k in (0, 1, 2) * 5
        ]
        for k, job in jobs:
            torch.testing.assert_close(job.result().gradients, expected[k], rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in potential.parameters())


@each_method
def test_threads(method, monkeypatch):
    """Whatever the number of threads, the same up to rounding; with the same number, bitwise."""
    system, x, box = mixture(16, METHODS[method], cutoff=0.9)
    potential = mdgraft.graft(system)
    before = torch.get_num_threads()
    try:
        torch.use_deterministic_algorithms(True)
        results = {}
        for n in (1, 3):
            torch.set_num_threads(n)
            results[n] = [all_derivatives(potential, x, box) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    for first, second in results.values():
        assert torch.equal(first[0], second[0])
        for a, b in zip(first[1], second[1], strict=True):
            assert a is None or torch.equal(a, b)
    for a, b in zip(results[1][0][1], results[3][0][1], strict=True):
        assert a is None or a.numel() == 0 or (a - b).abs().max() <= 1e-11 * (a.abs().max() + 1)


def test_copies_and_pickles():
    system, x, box = mixture(5, METHODS["PME"], cutoff=0.9)
    potential = mdgraft.graft(system)
    expected = all_derivatives(potential, x, box)
    for other in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        found = all_derivatives(other, x, box)
        assert torch.equal(found[0], expected[0])
        # In a transform first, where tensors do not show their numbers.
        again = pickle.loads(pickle.dumps(other))
        slope = torch.func.grad(lambda y, again=again: again(y, box))(x)
        torch.testing.assert_close(slope, expected[1][0], rtol=1e-12, atol=1e-10)


def test_a_list_is_kept_while_it_is_valid():
    """A walk in small steps and leaps, against potentials that never saw another place."""
    system, x, box = mixture(7, METHODS["PME"], cutoff=1.0)
    potential = mdgraft.graft(system)
    rng = torch.Generator().manual_seed(4)
    for step in range(12):
        size = 0.2 if step % 5 == 4 else 0.004
        x = x + size * torch.rand(x.shape, generator=rng, dtype=x.dtype) - size / 2
        if step == 8:
            box = 1.02 * box
        found, fresh = (all_derivatives(p, x, box) for p in (potential, mdgraft.graft(system)))
        assert abs(found[0] - fresh[0]) <= 1e-11 * abs(fresh[0])
        torch.testing.assert_close(found[1][0], fresh[1][0], rtol=1e-9, atol=1e-8)


def test_single_precision_keeps_sums():
    """A large system's energy is a sum of a million pairs."""
    system, x, box = mixture(20, METHODS["CutoffPeriodic"], cutoff=1.2)
    # Angles that are nearly straight are rough in single precision.
    for _ in range(3):
        system.removeForce(1)
    precise, rough = mdgraft.graft(system), mdgraft.graft(system, dtype=torch.float32)
    expected = all_derivatives(precise, x, box)
    found = all_derivatives(rough, x.float(), box.float())
    with mdgraft.plain_kernels():
        plain = all_derivatives(rough, x.float(), box.float())
    assert abs(found[0].double() - expected[0]) <= 2e-6 * abs(expected[0])
    for a, b, c in zip(found[1], expected[1], plain[1], strict=True):
        if b is not None and b.numel():
            # What positions lose by rounding alone, plain torch loses too.
            unavoidable = (c.double() - b).abs().max()
            assert (a.double() - b).abs().max() <= 1e-6 * b.abs().max() + 1.5 * unavoidable


def test_a_forked_child_computes(tmp_path):
    """Threads do not survive a fork; the child makes its own."""
    code = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import mdgraft
from test_compiled_kernels import METHODS, mixture
system, x, box = mixture(14, METHODS["PME"], cutoff=0.9)
torch.set_num_threads(2)
potential = mdgraft.graft(system).requires_grad_(False)
with torch.no_grad():
    energy = potential(x, box)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    with torch.no_grad():
        os._exit(0 if abs(potential(x, box) - energy) < 1e-8 * abs(energy) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, here], timeout=300)
    assert done.returncode == 0


@pytest.mark.parametrize("folder", ["writable", "empty", "impossible"])
def test_the_folder_for_compiled_code(folder, tmp_path):
    """Code is kept where it can be, and a broken file does no harm."""
    system, _, _ = mixture(3, METHODS["CutoffPeriodic"], cutoff=0.5)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    named = {"writable": str(tmp_path / "cache"), "empty": "", "impossible": "/dev/null/cache"}
    code = """
import sys, torch, mdgraft, openmm
system = openmm.XmlSerializer.deserialize(open(sys.argv[1]).read())
x = torch.linspace(0, 1, 27 * 3, dtype=torch.float64).reshape(27, 3)
print(float(mdgraft.graft(system).requires_grad_(False)(x, 1.2 * torch.eye(3, dtype=x.dtype))))
"""
    environment = os.environ | {"MDGRAFT_CACHE_DIR": named[folder]}

    def run():
        command = [sys.executable, "-c", code, str(tmp_path / "system.xml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    kept = list((tmp_path / "cache").glob("*.o"))
    assert bool(kept) == (folder == "writable")
    for file in kept:
        file.write_bytes(file.read_bytes()[:-7])
    assert run() == first


def test_a_process_can_do_without():
    code = """
import sys, torch, mdgraft, openmm
system, force = openmm.System(), openmm.NonbondedForce()
system.addForce(force)
for charge in (0.3, -0.3):
    system.addParticle(1.0)
    force.addParticle(charge, 0.3, 0.5)
x = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.1, 0.0]], dtype=torch.float64)
mdgraft.graft(system).requires_grad_(False)(x)
print("numba" in sys.modules, "llvmlite" in sys.modules)
"""
    for setting, expected in (("plain", "False False"), ("", "True True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"MDGRAFT_KERNELS": setting},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout.strip() == expected, done.stderr
