"""Compiled particle-mesh sums against the plain torch functions and their derivatives."""

import dataclasses
import math
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from mdgraft.kernels.fused import influence, mesh, threads
from mdgraft.kernels.fused.mesh import Interaction, MeshKernel

CUBIC = [[2.1, 0, 0], [0, 2.1, 0], [0, 0, 2.1]]
ORTHORHOMBIC = [[1.8, 0, 0], [0, 2.3, 0], [0, 0, 2.9]]
TRICLINIC = [[2.0, 0, 0], [0.7, 2.2, 0], [-0.6, 0.8, 2.4]]
#: Not in reduced form: all nine entries matter.
GENERAL = [[2.0, 0.1, -0.2], [0.5, 2.2, 0.3], [-0.6, 0.7, 2.4]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A system; the frames differ in size and shape."""

    box: list
    grid: tuple
    n_frames: int = 1
    n_atoms: int = 17
    #: Width of the cloud of particles, in boxes.
    extent: float = 1.0
    on_borders: bool = False
    zeros: int = 0

    def inputs(self, dtype=torch.float64):
        g = torch.Generator().manual_seed(7)
        size = (self.n_frames, self.n_atoms, 3)
        box = torch.tensor(self.box, dtype=torch.float64).expand(self.n_frames, 3, 3)
        strain = torch.rand(self.n_frames, 3, 3, generator=g, dtype=torch.float64)
        box = box @ (torch.eye(3, dtype=torch.float64) + 0.05 * strain.tril())
        fractional = self.extent * (torch.rand(size, generator=g, dtype=torch.float64) - 0.3)
        if self.on_borders:
            n = torch.tensor(self.grid)
            fractional = torch.round(fractional * n) / n
        strengths = torch.rand(self.n_atoms, generator=g, dtype=torch.float64) - 0.3
        strengths[: self.zeros] = 0
        # What the lower precision holds, so that both see the same system.
        return [t.to(dtype) for t in (fractional @ box, box, strengths)]


CASES = {
    "cubic": Case(box=CUBIC, grid=(8, 8, 8)),
    "orthorhombic": Case(box=ORTHORHOMBIC, grid=(7, 8, 10), n_frames=3),
    "triclinic even": Case(box=TRICLINIC, grid=(6, 8, 6), n_frames=3),
    "triclinic odd": Case(box=TRICLINIC, grid=(7, 9, 7)),
    "triclinic mixed": Case(box=TRICLINIC, grid=(8, 7, 9)),
    "general box": Case(box=GENERAL, grid=(6, 7, 8), n_frames=3),
    "smaller than the spline": Case(box=TRICLINIC, grid=(3, 4, 2)),
    "far outside": Case(box=TRICLINIC, grid=(8, 9, 10), extent=9.0, n_frames=3),
    "on borders": Case(box=CUBIC, grid=(8, 6, 9), extent=3.0, on_borders=True),
    "some without strength": Case(box=ORTHORHOMBIC, grid=(8, 8, 9), zeros=5),
    "none with strength": Case(box=CUBIC, grid=(6, 6, 6), zeros=17),
    "one particle": Case(box=TRICLINIC, grid=(8, 8, 8), n_atoms=1, zeros=0),
    "large": Case(box=CUBIC, grid=(20, 18, 21), n_atoms=200),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
KIND = pytest.mark.parametrize("kind", Interaction, ids=lambda kind: kind.name.lower())
PRECISION = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 3e-5)],
    ids=["double", "single"],
)
ALL = (True, True, True)


def kernel_of(kind, case):
    return MeshKernel(kind, alpha=2.7, grid=case.grid)


def by_frame(kernel, inputs):
    """The plain energy as a function of what every frame has of its own, and its arguments."""

    def energy(positions, box, strengths):
        frames = zip(positions, box, strengths, strict=True)
        return torch.cat([kernel.reference(x[None], b[None], q) for x, b, q in frames]).sum()

    positions, box, strengths = (t.double() for t in inputs)
    return energy, (positions, box, strengths.repeat(len(positions), 1))


def directions_of(inputs):
    g = torch.Generator().manual_seed(11)
    positions, box, strengths = inputs
    shapes = positions.shape, box.shape, (len(positions), *strengths.shape)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(positions.dtype) for s in shapes]


def assert_near(found, expected, tolerance):
    """Agreement relative to the largest entry."""
    assert found.shape == expected.shape
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@CASE
@KIND
@PRECISION
def test_values(kind, case, dtype, tolerance):
    kernel, inputs = kernel_of(kind, case), case.inputs(dtype)
    energies = kernel.energies(inputs)
    assert energies.dtype == dtype
    assert_near(energies, kernel.reference(*(t.double() for t in inputs)), tolerance)


@CASE
@KIND
@PRECISION
def test_gradients(kind, case, dtype, tolerance):
    kernel, inputs = kernel_of(kind, case), case.inputs(dtype)
    energies, found = kernel.gradients(inputs, ALL)
    assert torch.equal(energies, kernel.energies(inputs))
    energy, arguments = by_frame(kernel, inputs)
    expected = torch.func.grad(energy, argnums=(0, 1, 2))(*arguments)
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == dtype
        assert_near(gradient, wanted, tolerance)


@CASE
@KIND
@PRECISION
@pytest.mark.parametrize("given", ["100", "010", "001", "111"])
def test_products(kind, case, dtype, tolerance, given):
    kernel, inputs = kernel_of(kind, case), case.inputs(dtype)
    directions = directions_of(inputs)
    energy, arguments = by_frame(kernel, inputs)
    on = [flag == "1" for flag in given]
    moved = tuple(d.double() * flag for d, flag in zip(directions, on, strict=True))
    gradient = torch.func.grad(energy, argnums=(0, 1, 2))
    expected = torch.func.jvp(gradient, arguments, moved)[1]
    partial = [d if flag else None for d, flag in zip(directions, on, strict=True)]
    for product, wanted in zip(kernel.products(inputs, partial, ALL), expected, strict=True):
        assert product.dtype == dtype
        assert_near(product, wanted, tolerance)


@KIND
@pytest.mark.parametrize("wanted", ["100", "010", "001", "101", "000"])
def test_only_what_is_wanted(kind, wanted):
    case = CASES["some without strength"]
    kernel, inputs = kernel_of(kind, case), case.inputs()
    on = [flag == "1" for flag in wanted]
    for directions in (directions_of(inputs), [None, None, directions_of(inputs)[2]]):
        pairs = [
            (kernel.gradients(inputs, on)[1], kernel.gradients(inputs, ALL)[1]),
            (kernel.products(inputs, directions, on), kernel.products(inputs, directions, ALL)),
        ]
        for some, every in pairs:
            for a, b, flag in zip(some, every, on, strict=True):
                assert (a is not None) == flag
                if flag:
                    assert_near(a, b, 1e-13)


def test_no_direction_gives_zeros():
    case = CASES["triclinic even"]
    products = kernel_of(Interaction.COULOMB, case).products(case.inputs(), [None] * 3, ALL)
    assert [p.shape for p in products] == [(3, 17, 3), (3, 3, 3), (3, 17)]
    assert not any(p.any() for p in products)


def test_a_closed_form():
    """Without the self-interaction the sum of a crystal of rock salt is Madelung's."""
    # Two cells of side 2 along each axis, in units of the distance of neighbours; a real-space
    # sum that is negligible at this alpha leaves the reciprocal part.
    points = torch.cartesian_prod(*[torch.arange(4.0, dtype=torch.float64)] * 3)
    charges = 1 - 2 * (points.sum(dim=-1) % 2)
    alpha, box = 1.2, 4 * torch.eye(3, dtype=torch.float64)[None]
    kernel = MeshKernel(Interaction.COULOMB, alpha=alpha, grid=(48, 48, 48))
    energy = kernel.energies([points[None], box, charges]).item() / influence.COULOMB
    energy -= alpha / math.sqrt(math.pi) * len(points)
    cell = np.arange(-4, 8)
    others = np.stack(np.meshgrid(cell, cell, cell, indexing="ij"), axis=-1).reshape(-1, 3)
    r = np.linalg.norm(others, axis=-1)
    sign = 1 - 2 * (others.sum(axis=-1) % 2)
    near = (r > 0) & (r < 4.5)
    direct = sum(s * math.erfc(alpha * d) / d for s, d in zip(sign[near], r[near], strict=True))
    energy += 0.5 * len(points) * direct
    assert energy / (len(points) / 2) == pytest.approx(-1.747564594633182, abs=1e-6)


@pytest.mark.parametrize("n_frames", [1, 5])
def test_threads(n_frames, monkeypatch):
    case = Case(box=TRICLINIC, grid=(9, 8, 10), n_frames=n_frames, n_atoms=60)
    kernel, inputs = kernel_of(Interaction.COULOMB, case), case.inputs()
    directions = directions_of(inputs)

    def results():
        energies, gradients = kernel.gradients(inputs, ALL)
        return [energies, *gradients, *kernel.products(inputs, directions, ALL)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        monkeypatch.setattr(mesh, "_MANY", 0)
        torch.set_num_threads(3)
        together, again = results(), results()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(alone, together, again, strict=True):
        assert_near(b, a, 1e-13)
        assert torch.equal(b, c)


def test_batches_of_frames(monkeypatch):
    case = Case(box=TRICLINIC, grid=(6, 8, 7), n_frames=5)
    kernel, inputs = kernel_of(Interaction.DISPERSION, case), case.inputs()
    directions = directions_of(inputs)
    whole = kernel.gradients(inputs, ALL)[1] + kernel.products(inputs, directions, ALL)
    monkeypatch.setattr(mesh, "_POINTS", 2 * math.prod(case.grid))
    parts = kernel.gradients(inputs, ALL)[1] + kernel.products(inputs, directions, ALL)
    for a, b in zip(whole, parts, strict=True):
        assert_near(b, a, 1e-14)


def test_the_same_influence_is_not_taken_for_another_box():
    case = CASES["cubic"]
    kernel, (positions, box, strengths) = kernel_of(Interaction.COULOMB, case), case.inputs()
    for factor in (1.0, 1.1, 1.0, -1.0):
        inputs = [positions, factor * box, strengths]
        assert_near(kernel.energies(inputs), kernel.reference(*inputs), 1e-12)


@pytest.mark.parametrize(("n_frames", "n_atoms"), [(0, 4), (2, 0)])
def test_nothing_at_all(n_frames, n_atoms):
    case = Case(box=CUBIC, grid=(6, 6, 6), n_frames=n_frames, n_atoms=n_atoms)
    kernel, inputs = kernel_of(Interaction.COULOMB, case), case.inputs()
    energies, gradients = kernel.gradients(inputs, ALL)
    assert torch.equal(energies, torch.zeros(n_frames, dtype=torch.float64))
    products = kernel.products(inputs, directions_of(inputs), ALL)
    for found in (gradients, products):
        assert [t.shape for t in found] == [
            (n_frames, n_atoms, 3),
            (n_frames, 3, 3),
            (n_frames, n_atoms),
        ]
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("lost", [math.nan, math.inf, 1e300])
def test_lost_particles_give_nan(lost):
    case = CASES["cubic"]
    kernel, inputs = kernel_of(Interaction.COULOMB, case), case.inputs()
    inputs[0][0, 3, 1] = lost
    energies, gradients = kernel.gradients(inputs, ALL)
    kernel.products(inputs, directions_of(inputs), ALL)
    if not math.isfinite(lost):
        assert energies.isnan().all()
        assert all(g.isnan().any() for g in gradients)


def test_inputs_that_are_views():
    case = CASES["orthorhombic"]
    kernel, inputs = kernel_of(Interaction.COULOMB, case), case.inputs()
    expected = kernel.gradients(inputs, ALL)[1]
    views = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    for a, b in zip(kernel.gradients(views, ALL)[1], expected, strict=True):
        assert torch.equal(a, b)


def test_chunks_run_at_the_same_time_and_all_end():
    meeting, ended = threading.Barrier(2, timeout=60), []

    def chunk(k):
        if k < 2:
            meeting.wait()
        ended.append(k)
        if k == 2:
            raise ValueError("chunk 2 failed")

    with pytest.raises(ValueError, match="chunk 2 failed"):
        threads.run_chunks(chunk, 4)
    assert sorted(ended) == [0, 1, 2, 3]
    threads.run_chunks(ended.append, 0)
    threads.run_chunks(ended.append, 1)
    assert ended[4:] == [0]


def run_python(script):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_threads_after_a_fork():
    run_python("""
        import os, signal
        from mdgraft.kernels.fused.threads import run_chunks

        done = []
        run_chunks(done.append, 3)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            run_chunks(done.append, 3)
            os._exit(0 if len(done) == 6 else 1)
        assert os.waitpid(child, 0)[1] == 0
        run_chunks(done.append, 3)
        assert sorted(done) == [0, 0, 1, 1, 2, 2]
    """)


def test_the_compiler_is_imported_by_nobody_else():
    run_python("""
        import sys
        import mdgraft, mdgraft.kernels.pme, mdgraft.kernels.fused, mdgraft.kernels.fused.threads

        assert "numba" not in sys.modules
    """)
