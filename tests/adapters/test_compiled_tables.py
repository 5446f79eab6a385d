"""Tabulated functions in compiled loops over pairs: against OpenMM, plain torch and each other."""

import contextlib

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_kernels_agree, reference_context
from mdgraft import InvalidInputError
from mdgraft.ensembles import frame_derivatives
from mdgraft.frames import Frames
from mdgraft.kernels.fused import frame_pass
from mdgraft.potentials.custom.compiled_pairs import MOST_ENTRIES

N, KINDS = 216, 5
BOX = np.array([[2.7, 0, 0], [0.4, 2.7, 0], [-0.3, 0.5, 2.7]])
RNG = np.random.default_rng(8)
SQUARE = RNG.uniform(0.5, 1.0, (KINDS, KINDS))
CURVE = np.cumsum(RNG.normal(size=14))
SURFACE = RNG.normal(size=(9, 6))


def discrete(*shape):
    entries = np.arange(np.prod(shape)) / 7.0 + 0.3
    kind = {1: openmm.Discrete1DFunction, 2: openmm.Discrete2DFunction}
    kind |= {3: openmm.Discrete3DFunction}
    return kind[len(shape)](*(shape if len(shape) > 1 else ()), np.sin(entries))


TABLES = {
    "a": lambda: openmm.Discrete2DFunction(KINDS, KINDS, (SQUARE + SQUARE.T).ravel()),
    "b": lambda: openmm.Discrete2DFunction(KINDS, KINDS, SQUARE.ravel()),
    "few": lambda: discrete(4),
    "block": lambda: discrete(3, 4, 2),
    "curve": lambda: openmm.Continuous1DFunction(CURVE, 0.12, 0.71),
    "ring": lambda: openmm.Continuous1DFunction(np.append(CURVE, CURVE[0]), -0.3, 0.45, True),
    "short": lambda: openmm.Continuous1DFunction([0.5, 1.5], 0.3, 0.6),
    "surface": lambda: openmm.Continuous2DFunction(9, 6, SURFACE.ravel(), 0.1, 0.8, -2.0, 2.5),
}
#: The energy, and whether it is the same when particles change places for all one can see.
ENERGIES = {
    "coefficients by type": "a(type1, type2)/(r+0.2)^6 - 3*a(type2, type1)/(r+0.3)^3",
    "not symmetric": "lambda*b(type1, type2)*exp(-4*r)*q1",
    "beyond the ends": "few(type1+type2-2)*q1*q2*cos(r) + few(2*q1)*few(2*q2)",
    "three indices": "block(type1, type2, step(r-0.4))*(1+r^2)",
    "of the distance": "q1*q2*curve(r)",
    "periodic": "ring(r*lambda)*(q1+q2)",
    "two knots": "short(r)^2*q1*q2",
    "of two arguments": "surface(r, q1+q2)",
    "table in a table": "few(2+a(type1, type2))*curve(r)/few(type1+type2)",
    "twice the same": "a(type1, type2)*r + a(type1, type2)^2/(1+r)",
    "in a branch": "select(step(r-0.4), curve(r), a(type1, type2)*r)",
}
METHODS = {
    "NoCutoff": openmm.CustomNonbondedForce.NoCutoff,
    "CutoffPeriodic": openmm.CustomNonbondedForce.CutoffPeriodic,
}
each_energy = pytest.mark.parametrize("energy", ENERGIES)


def positions(seed=0):
    rng = np.random.default_rng(seed)
    lattice = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return torch.tensor((lattice / 6 + rng.normal(scale=0.02, size=(N, 3))) @ BOX)


def system_of(energy, method="CutoffPeriodic"):
    rng = np.random.default_rng(2)
    system, force = openmm.System(), openmm.CustomNonbondedForce(energy)
    system.setDefaultPeriodicBoxVectors(*BOX)
    force.addPerParticleParameter("type")
    force.addPerParticleParameter("q")
    force.addGlobalParameter("lambda", 0.8)
    for name, make in TABLES.items():
        force.addTabulatedFunction(name, make())
    force.setNonbondedMethod(METHODS[method])
    force.setCutoffDistance(0.75)
    for i in range(N):
        system.addParticle(10.0)
        force.addParticle([i % KINDS, rng.normal()])
    for i in range(0, N - 1, 5):
        force.addExclusion(i, i + 1)
    system.addForce(force)
    return system


def reference_energy(system):
    context = reference_context(system)
    context.setPositions(positions().numpy())
    return context.getState(energy=True).getPotentialEnergy()._value


def grafted(energy, method="CutoffPeriodic", **options):
    potential = mdgraft.graft(system_of(energy, method), **options)
    term = potential.term("CustomNonbondedForce")
    assert term._compiled.serve(positions()[None])
    return potential, torch.tensor(BOX) if potential.periodic else None


@each_energy
@pytest.mark.parametrize("method", METHODS)
def test_energies_are_those_of_openmm(energy, method):
    potential, box = grafted(ENERGIES[energy], method)
    system, x = system_of(ENERGIES[energy], method), positions()
    context = reference_context(system)
    context.setPositions(x.numpy())
    state = context.getState(energy=True, forces=True)
    y = x.clone().requires_grad_()
    value = potential(y, box)
    assert value.item() == pytest.approx(state.getPotentialEnergy()._value, rel=1e-9, abs=1e-9)
    (slope,) = torch.autograd.grad(value, y)
    forces = state.getForces(asNumpy=True)._value
    np.testing.assert_allclose(-slope.numpy(), forces, rtol=0, atol=1e-9 * np.abs(forces).max())


@each_energy
@pytest.mark.parametrize("method", METHODS)
def test_first_derivatives_are_those_of_plain_torch(energy, method):
    """In positions, box, particles' quantities, globals, and entries of every table."""
    potential, box = grafted(ENERGIES[energy], method)
    assert_kernels_agree(potential, positions(), box, rtol=1e-10)


def products(potential, box, order):
    """Contractions with random directions, one after the other."""
    x = positions().requires_grad_()
    inputs = [x] if box is None else [x, box.clone().requires_grad_()]
    inputs += [p for p in potential.parameters() if p.numel()]
    rng = torch.Generator().manual_seed(5)
    total = potential(*inputs[: 1 if box is None else 2])
    for k in range(order):
        slopes = torch.autograd.grad(
            total, inputs, create_graph=k < order - 1, allow_unused=True, materialize_grads=True
        )
        steps = [torch.randn(s.shape, generator=rng, dtype=s.dtype) for s in slopes]
        total = sum((s * d).sum() for s, d in zip(slopes, steps, strict=True))
    return slopes


@each_energy
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives_are_those_of_plain_torch(energy, order):
    potential, box = grafted(ENERGIES[energy])
    found = products(potential, box, order)
    with mdgraft.plain_kernels():
        expected = products(potential, box, order)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max() + 1e-9


@each_energy
def test_single_precision(energy):
    double, box = grafted(ENERGIES[energy])
    single, _ = grafted(ENERGIES[energy], dtype=torch.float32)
    x = positions().requires_grad_()
    y = x.detach().float().requires_grad_()
    slopes = []
    for potential, z, h in ((double, x, box), (single, y, box.float())):
        wanted = [z, *(p for p in potential.parameters() if p.numel())]
        slopes.append(
            torch.autograd.grad(potential(z, h), wanted, allow_unused=True, materialize_grads=True)
        )
    for a, b in zip(*slopes, strict=True):
        # An index may lie half way, where precision decides.
        assert (a - b.double()).abs().max() <= 1e-4 * a.abs().max() + 1e-6


def test_frames_have_derivatives_of_their_own():
    potential, box = grafted(ENERGIES["coefficients by type"])
    x = torch.stack([positions(seed) for seed in range(5)])
    cells = box.expand(5, 3, 3) * (1 + 0.01 * torch.arange(5))[:, None, None]
    frames = Frames(positions=x, box=cells)
    names = [f"CustomNonbondedForce.{name}" for name in ("a", "q")] + ["globals.lambda"]
    found = frame_derivatives(potential, frames, names)
    with mdgraft.plain_kernels():
        expected = frame_derivatives(potential, frames, names)
    torch.testing.assert_close(found.energies, expected.energies, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-9, atol=1e-9)


def test_threads_and_repetitions_agree(monkeypatch):
    potential, box = grafted(ENERGIES["table in a table"])
    # Few tiles, which would not be shared out otherwise.
    monkeypatch.setattr(frame_pass, "_TILES_PER_THREAD", 20)
    run, shares = frame_pass.run_chunks, []
    monkeypatch.setattr(frame_pass, "run_chunks", lambda w, n: [shares.append(n), run(w, n)])
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            x = positions().requires_grad_()
            wanted = [x, potential.get_parameter("CustomNonbondedForce.a")]
            found.append(torch.autograd.grad(potential(x, box), wanted))
    finally:
        torch.set_num_threads(before)
    assert set(shares) == {1, 2}
    for a, b in ((found[0], found[1]), (found[1], found[2])):
        for s, t in zip(a, b, strict=True):
            torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["NoCutoff", "CutoffPeriodic"])
def test_in_sums_over_neighbours(method):
    """An implicit solvent with tables of pairs, as GBn has them."""
    rng = np.random.default_rng(4)
    system, force = openmm.System(), openmm.CustomGBForce()
    system.setDefaultPeriodicBoxVectors(*BOX)
    force.addPerParticleParameter("type")
    force.addPerParticleParameter("q")
    for name in ("b", "curve"):
        force.addTabulatedFunction(name, TABLES[name]())
    pair, single = openmm.CustomGBForce.ParticlePair, openmm.CustomGBForce.SingleParticle
    force.addComputedValue("I", "b(type1, type2)*exp(-3*r)*(1+0.1*q2)", pair)
    force.addComputedValue("B", "1/(1+I)", single)
    force.addEnergyTerm("curve(r)*q1*q2*B1*B2", pair)
    force.addEnergyTerm("B*q^2", single)
    force.setNonbondedMethod(getattr(openmm.CustomGBForce, method))
    force.setCutoffDistance(0.7)
    for i in range(N):
        system.addParticle(10.0)
        force.addParticle([i % KINDS, rng.normal()])
    system.addForce(force)
    potential = mdgraft.graft(system)
    term, x = potential.term("CustomGBForce"), positions()
    assert all(c is None or c.serve(x[None]) for c in term._compiled)
    box = torch.tensor(BOX) if potential.periodic else None
    assert potential(x, box).item() == pytest.approx(reference_energy(system), rel=1e-9)
    assert_kernels_agree(potential, x, box, rtol=1e-10)


@pytest.mark.parametrize("route", [contextlib.nullcontext, mdgraft.plain_kernels])
def test_indices_are_rounded_as_by_openmm(route):
    """Half-way cases, the numbers next to them, and what lies beyond the ends."""
    half = ["0.5", "0.49999999999999994", "0.5000000000000001", "1.4999999999999998", "2.5"]
    shifts = [*half, "3.5", *(f"-{h}" for h in half), "1e9", "-1e9"]
    energy = "+".join(f"{k + 1}*few({shift}+0*type1)" for k, shift in enumerate(shifts))
    energy += "+r*few(type1-0.5)*few(type2+0.49999999999999994)"
    potential, box = grafted(energy)
    with route():
        value = potential(positions(), box).item()
    assert value == pytest.approx(reference_energy(system_of(energy)), rel=1e-12)


@pytest.mark.parametrize("route", [contextlib.nullcontext, mdgraft.plain_kernels])
@pytest.mark.parametrize(
    ("name", "shape"), [("b", (24,)), ("b", (50,)), ("b", (5, 5)), ("curve", (3,))]
)
def test_tables_of_another_size_are_refused(route, name, shape):
    potential, box = grafted("b(type1, type2)*curve(r)")
    values = {f"CustomNonbondedForce.{name}": torch.ones(shape, dtype=torch.float64)}
    with route(), pytest.raises(InvalidInputError, match=f"{name}: got values of shape"):
        torch.func.functional_call(potential, values, (positions(), box))


def test_quantities_of_another_size_are_refused():
    potential, box = grafted("few(q1)*few(q2)*r")
    values = {"CustomNonbondedForce.q": torch.ones(N - 1, dtype=torch.float64)}
    with pytest.raises(InvalidInputError, match=rf"q: got values of shape .*the {N} particles"):
        torch.func.functional_call(potential, values, (positions(), box))


def test_tables_may_be_views_of_any_kind():
    potential, box = grafted("b(type1, type2)*curve(r)")
    table = potential.get_parameter("CustomNonbondedForce.b").detach()
    expected = potential(positions(), box).item()
    views = {
        "negative": torch.complex(table, -table).conj().imag,
        "strided": torch.stack([table, table], dim=1)[:, 0],
        "single precision": table.float(),
    }
    assert views["negative"].is_neg() and not views["strided"].is_contiguous()
    for kind, view in views.items():
        values = {"CustomNonbondedForce.b": view}
        found = torch.func.functional_call(potential, values, (positions(), box)).item()
        assert found == pytest.approx(expected, rel=1e-6 if kind == "single precision" else 1e-14)


def test_frames_and_tables_may_be_mapped():
    """Tables of their own for each frame, and second derivatives in them."""
    potential, box = grafted(ENERGIES["table in a table"])
    fixed = {name: p.detach() for name, p in potential.named_parameters()}
    x = torch.stack([positions(seed) for seed in range(3)])
    name = "CustomNonbondedForce.curve"
    tables = fixed[name] + torch.randn(3, 14, generator=torch.Generator().manual_seed(2))

    def energy(y, table):
        return torch.func.functional_call(potential, {**fixed, name: table}, (y, box)) / N

    def derivatives():
        slopes = torch.func.vmap(torch.func.grad(energy, argnums=1))(x, tables)
        curvature = torch.func.hessian(lambda t: energy(x[0], t) ** 2)(tables[0])
        return slopes, curvature

    found = derivatives()
    with mdgraft.plain_kernels():
        expected = derivatives()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_tables_that_outweigh_the_pairs_are_left_to_torch():
    system, force = openmm.System(), openmm.CustomNonbondedForce("t(kind1, kind2)*exp(-r)")
    force.addPerParticleParameter("kind")
    n = int((MOST_ENTRIES * N) ** 0.5) + 1
    entries = np.random.default_rng(3).normal(size=n * n)
    force.addTabulatedFunction("t", openmm.Discrete2DFunction(n, n, entries))
    for i in range(N):
        system.addParticle(1.0)
        force.addParticle([i * (n - 1) // (N - 1)])
    system.addForce(force)
    potential = mdgraft.graft(system)
    assert not potential.term("CustomNonbondedForce")._compiled.serve(positions()[None])
    assert potential(positions()).item() == pytest.approx(reference_energy(system), rel=1e-9)


@pytest.mark.parametrize(("n", "served"), [(3, True), (30, False)])
def test_what_takes_long_to_compile_is_left_to_torch(n, served):
    energy = "+".join(f"surface({1 + k / n}*r, q1*q2)" for k in range(n))
    potential = mdgraft.graft(system_of(energy))
    assert potential.term("CustomNonbondedForce")._compiled.serve(positions()[None]) is served
    value = potential(positions(), torch.tensor(BOX)).item()
    assert value == pytest.approx(reference_energy(system_of(energy)), rel=1e-9)


def test_three_axes_of_a_spline_are_left_to_torch():
    force = openmm.CustomNonbondedForce("t(r, q1+q2, q1*q2)")
    force.addPerParticleParameter("q")
    entries = np.random.default_rng(1).normal(size=4 * 3 * 3)
    force.addTabulatedFunction(
        "t", openmm.Continuous3DFunction(4, 3, 3, entries, 0.1, 0.9, -1.0, 1.0, -1.0, 1.0)
    )
    system = openmm.System()
    for i in range(N):
        system.addParticle(1.0)
        force.addParticle([0.01 * i - 1.0])
    system.addForce(force)
    term = mdgraft.graft(system).term("CustomNonbondedForce")
    assert not term._compiled.serve(positions()[None])
