"""Bonded terms and the geometry under them: closed forms, symmetries, degenerate shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdgraft import Potential
from mdgraft.potentials import AbstractTerm, geometry
from mdgraft.potentials.bonded import HarmonicAngle, HarmonicBond, PeriodicTorsion, RBTorsion
from torch import Tensor

N = 7
TRICLINIC = torch.tensor([[1.3, 0.0, 0.0], [0.3, 1.2, 0.0], [-0.4, 0.2, 1.1]], dtype=torch.float64)


def _rows(rng: np.random.Generator, n: int, width: int) -> Tensor:
    return torch.tensor(np.array([rng.permutation(N)[:width] for _ in range(n)]))


def _numbers(rng: np.random.Generator, low: float, high: float, n: int = 5) -> Tensor:
    return torch.tensor(rng.uniform(low, high, n))


def bonds(rng: np.random.Generator, periodic: bool) -> HarmonicBond:
    return HarmonicBond(
        _rows(rng, 5, 2), _numbers(rng, 0.1, 0.3), _numbers(rng, 50, 500), periodic=periodic
    )


def angles(rng: np.random.Generator, periodic: bool) -> HarmonicAngle:
    return HarmonicAngle(
        _rows(rng, 5, 3), _numbers(rng, 0.0, math.pi), _numbers(rng, 5, 50), periodic=periodic
    )


def torsions(rng: np.random.Generator, periodic: bool) -> PeriodicTorsion:
    return PeriodicTorsion(
        _rows(rng, 5, 4),
        torch.tensor([1, 2, 3, 4, 6]),
        _numbers(rng, -4, 4),
        _numbers(rng, -9, 9),
        periodic=periodic,
    )


def rb_torsions(rng: np.random.Generator, periodic: bool) -> RBTorsion:
    coefficients = (_numbers(rng, -9, 9) for _ in range(6))
    return RBTorsion(_rows(rng, 5, 4), *coefficients, periodic=periodic)


TERMS: list[Callable[[np.random.Generator, bool], AbstractTerm]] = [
    bonds,
    angles,
    torsions,
    rb_torsions,
]
each_term = pytest.mark.parametrize("make", TERMS, ids=lambda make: make.__name__)


def _energy(term: AbstractTerm, positions: Tensor, box: Tensor | None = None) -> Tensor:
    """Energy of frames; the box reaches a periodic term only."""
    cells = None
    if term.periodic:
        assert box is not None
        cells = box.expand(len(positions), 3, 3)
    return term(positions, cells, term.parameter_values(), {})


def _frames(rng: np.random.Generator, n_frames: int = 3) -> Tensor:
    return torch.tensor(rng.uniform(-0.6, 0.6, (n_frames, N, 3)))


def _torsion_frame(phi: float) -> Tensor:
    """Four particles of dihedral phi, with unequal bonds and angles."""
    c, s = math.cos(phi), math.sin(phi)
    rows = [[0.11, 0.0, -0.03], [0.0, 0.0, 0.0], [0.0, 0.0, 0.15], [0.12 * c, 0.12 * s, 0.19]]
    return torch.tensor([rows], dtype=torch.float64)


def _bent_frame(theta: float) -> Tensor:
    rows = [[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2 * math.cos(theta), 0.2 * math.sin(theta), 0.0]]
    return torch.tensor([rows], dtype=torch.float64)


# Geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e-12, 1e-8, 1e-4, 0.5, 1.9, math.pi - 1e-4, math.pi - 1e-8])
def test_angle_is_accurate_up_to_the_ends(theta: float) -> None:
    found = geometry.angle(_bent_frame(theta), None, torch.tensor([[0, 1, 2]]))
    # Rounding of the coordinates alone is about 1e-16 of the arm.
    assert found.item() == pytest.approx(theta, rel=1e-14, abs=4e-16)


@pytest.mark.parametrize(("stretch", "expected"), [(-1.0, math.pi), (-3.7, math.pi), (2.9, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_angle_of_collinear_particles_is_exact(
    stretch: float, expected: float, dtype: torch.dtype
) -> None:
    arm = torch.tensor([0.03, -0.07, 0.11], dtype=dtype)
    frame = torch.stack([arm, torch.zeros_like(arm), stretch * arm])[None]
    found = geometry.angle(frame, None, torch.tensor([[0, 1, 2]]))
    assert found.item() == torch.tensor(expected, dtype=dtype).item()


@pytest.mark.parametrize("phi", [-3.1, -1.7, -1e-9, 0.0, 1e-9, 0.4, 2.0, 3.1, math.pi])
def test_dihedral_has_the_iupac_sign(phi: float) -> None:
    """Looking along the middle bond, clockwise turns of the far bond are positive."""
    found = geometry.dihedral(_torsion_frame(phi), None, torch.tensor([[0, 1, 2, 3]])).item()
    assert math.cos(found) == pytest.approx(math.cos(phi), abs=1e-14)
    assert math.sin(found) == pytest.approx(math.sin(phi), abs=1e-14)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_dihedral_is_the_same_backwards_and_opposite_in_a_mirror(seed: int) -> None:
    frames = _frames(np.random.default_rng(seed), 4)
    forward = geometry.dihedral(frames, None, torch.tensor([[0, 1, 2, 3]]))
    backward = geometry.dihedral(frames, None, torch.tensor([[3, 2, 1, 0]]))
    mirrored = geometry.dihedral(
        frames * torch.tensor([1.0, 1.0, -1.0]), None, torch.tensor([[0, 1, 2, 3]])
    )
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-10)
    torch.testing.assert_close(forward, -mirrored, rtol=0, atol=1e-10)


# Energies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [-2.9, -math.pi / 2, 0.0, 0.7, math.pi])
def test_torsion_energies_have_their_closed_form(phi: float) -> None:
    frame, row = _torsion_frame(phi), torch.tensor([[0, 1, 2, 3]])
    k, phase, c = 3.2, 0.6, (0.5, -1.2, 2.0, 0.3, -0.8, 1.7)
    numbers = torch.tensor([[phase], [k]], dtype=torch.float64)
    periodic = PeriodicTorsion(row, torch.tensor([3]), *numbers, periodic=False)
    rb = RBTorsion(row, *torch.tensor(c, dtype=torch.float64).unsqueeze(-1), periodic=False)
    expected = k * (1 + math.cos(3 * phi - phase))
    assert _energy(periodic, frame).item() == pytest.approx(expected, rel=1e-13)
    psi = phi - math.pi
    expected = sum(value * math.cos(psi) ** n for n, value in enumerate(c))
    assert _energy(rb, frame).item() == pytest.approx(expected, rel=1e-13)


@each_term
@pytest.mark.parametrize("periodic", [False, True])
def test_derivatives_of_first_and_second_order(
    make: Callable[[np.random.Generator, bool], AbstractTerm], periodic: bool
) -> None:
    rng = np.random.default_rng(3)
    term = make(rng, periodic)
    names = list(term.parameter_values())
    frames = _frames(rng, 2).requires_grad_()
    box = TRICLINIC.expand(2, 3, 3).clone().requires_grad_() if periodic else None
    parameters = [value.detach().clone().requires_grad_() for value in term.parameters()]

    def energy(x: Tensor, *rest: Tensor) -> Tensor:
        cells, values = (rest[0], rest[1:]) if periodic else (None, rest)
        return term(x, cells, dict(zip(names, values, strict=True)), {})

    inputs = (frames, *([box] if box is not None else []), *parameters)
    assert torch.autograd.gradcheck(energy, inputs, eps=1e-6, atol=1e-5, rtol=1e-6)
    assert torch.autograd.gradgradcheck(energy, inputs, eps=1e-6, atol=1e-3, rtol=1e-5)


@each_term
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_energy_ignores_translation_and_rotation(
    make: Callable[[np.random.Generator, bool], AbstractTerm], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    term = make(rng, False)
    frames = _frames(rng)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)  # proper
    moved = frames @ torch.tensor(rotation).mT + torch.tensor(rng.normal(size=3))
    # A dihedral loses digits near collinear triples: random ones reach sines of about 1e-3.
    torch.testing.assert_close(_energy(term, moved), _energy(term, frames), rtol=1e-9, atol=1e-9)


@each_term
def test_forces_and_torques_vanish_in_sum(
    make: Callable[[np.random.Generator, bool], AbstractTerm],
) -> None:
    rng = np.random.default_rng(8)
    term, frames = make(rng, False), _frames(rng)
    forces = -torch.func.grad(lambda x: _energy(term, x).sum())(frames)
    torch.testing.assert_close(forces.sum(dim=1), torch.zeros(3, 3).double(), rtol=0, atol=1e-9)
    torques = torch.linalg.cross(frames, forces).sum(dim=1)
    torch.testing.assert_close(torques, torch.zeros(3, 3).double(), rtol=0, atol=1e-9)
    assert forces.abs().max() > 1.0


@each_term
def test_energy_follows_a_relabelling(
    make: Callable[[np.random.Generator, bool], AbstractTerm],
) -> None:
    rng = np.random.default_rng(9)
    term, frames = make(rng, False), _frames(rng)
    before = _energy(term, frames)
    order = torch.tensor(rng.permutation(N))
    # New particle i is old particle order[i].
    term.particles = torch.argsort(order)[term.particles]
    torch.testing.assert_close(_energy(term, frames[:, order]), before, rtol=1e-13, atol=1e-13)


@each_term
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_periodic_energy_ignores_lattice_vectors(
    make: Callable[[np.random.Generator, bool], AbstractTerm], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    term, frames = make(rng, True), _frames(rng)
    shifts = torch.tensor(rng.integers(-3, 4, (3, N, 3)), dtype=torch.float64)
    shifted = frames + shifts @ TRICLINIC
    torch.testing.assert_close(
        _energy(term, shifted, TRICLINIC), _energy(term, frames, TRICLINIC), rtol=1e-9, atol=1e-9
    )


@each_term
def test_single_precision(make: Callable[[np.random.Generator, bool], AbstractTerm]) -> None:
    rng = np.random.default_rng(10)
    term, frames = make(rng, True), _frames(rng)
    exact = _energy(term, frames, TRICLINIC)
    rounded = _energy(term.float(), frames.float(), TRICLINIC.float())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)


@each_term
def test_batches_and_function_transforms_agree(
    make: Callable[[np.random.Generator, bool], AbstractTerm],
) -> None:
    rng = np.random.default_rng(11)
    potential = Potential({"Bonded": make(rng, True)}, n_particles=N)
    frames = _frames(rng, 4)
    single = torch.stack([potential(frame, TRICLINIC) for frame in frames])
    torch.testing.assert_close(potential(frames, TRICLINIC), single, rtol=1e-13, atol=1e-13)
    mapped = torch.vmap(lambda x: potential(x, TRICLINIC))(frames)
    torch.testing.assert_close(mapped, single, rtol=1e-13, atol=1e-13)

    parameters = {name: value.detach() for name, value in potential.named_parameters()}

    def energy(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(potential, values, (x, TRICLINIC))

    per_frame = torch.vmap(torch.func.grad(energy), in_dims=(None, 0))(parameters, frames)
    for name, value in potential.named_parameters():
        together = torch.autograd.grad(potential(frames, TRICLINIC).sum(), value)[0]
        torch.testing.assert_close(per_frame[name].sum(dim=0), together, rtol=1e-11, atol=1e-11)

    hessian = torch.func.hessian(lambda x: potential(x, TRICLINIC))(frames[0])
    by_rows = torch.autograd.functional.hessian(lambda x: potential(x, TRICLINIC), frames[0])
    torch.testing.assert_close(hessian, by_rows, rtol=1e-9, atol=1e-7)
    tangent = torch.tensor(rng.normal(size=(N, 3)))
    _, forward = torch.func.jvp(lambda x: potential(x, TRICLINIC), (frames[0],), (tangent,))
    reverse = -(potential.forces(frames[0], TRICLINIC) * tangent).sum()
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-10)


# Degenerate shapes ------------------------------------------------------------------------------

LINE = torch.tensor([0.03, -0.07, 0.11], dtype=torch.float64)
SHAPES = {
    "straight along an axis": torch.outer(torch.arange(4.0).double(), torch.eye(3).double()[0]),
    "straight across": torch.outer(torch.tensor([0.0, 1.0, 2.3, 3.1]).double(), LINE),
    "folded back": torch.outer(torch.tensor([0.0, 1.0, 0.0, 1.0]).double(), LINE),
    "first three straight": torch.stack([0 * LINE, LINE, 2.5 * LINE, 2.5 * LINE + 0.1]),
    "last three straight": torch.stack([0 * LINE + 0.1, LINE, 2.5 * LINE, 3.1 * LINE]),
    "nearly straight": torch.tensor(
        [[0.0, 0.0, 0.0], [0.1, 1e-9, 0.0], [0.2, 0.0, 1e-9], [0.3, 0.0, 0.0]]
    ).double(),
    "below the smallest number": torch.tensor(
        [[0.0, 0.0, 0.0], [0.1, 1e-170, 0.0], [0.2, 0.0, 1e-160], [0.3, 0.0, 0.0]]
    ).double(),
    "planar cis": _torsion_frame(0.0)[0],
    "planar trans": _torsion_frame(math.pi)[0],
    "coincident": torch.zeros(4, 3).double(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.replace(" ", "_"))
def test_degenerate_shapes_have_finite_derivatives(shape: str, dtype: torch.dtype) -> None:
    frame = SHAPES[shape].to(dtype)[None]
    one = torch.ones(1, dtype=dtype)
    row = torch.tensor([[0, 1, 2, 3]])
    terms = (
        HarmonicBond(row[:, :2], 0.1 * one, one, periodic=False),
        HarmonicAngle(row[:, :3], 1.9 * one, one, periodic=False),
        HarmonicAngle(row[:, :3], math.pi * one, one, periodic=False),
        PeriodicTorsion(row, torch.tensor([3]), 0.4 * one, one, periodic=False),
        RBTorsion(row, *(one for _ in range(6)), periodic=False),
    )
    for term in terms:
        term.to(dtype)

        def energy(x: Tensor, term: AbstractTerm = term) -> Tensor:
            return _energy(term, x).sum()

        x = frame.clone().requires_grad_()
        gradient = torch.autograd.grad(energy(x), x, create_graph=True)[0]
        assert torch.isfinite(energy(x))
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(torch.autograd.grad(gradient.sum(), x)[0]).all()
        assert torch.isfinite(torch.func.hessian(energy)(frame)).all()
        for value in torch.autograd.grad(energy(x), list(term.parameters())):
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("phi", [0.0, math.pi])
def test_planar_torsions_are_as_smooth_as_others(phi: float) -> None:
    """The branch cut of the dihedral at pi must not show."""
    row = torch.tensor([[0, 1, 2, 3]])
    k = torch.tensor([2.0]).double()
    term = PeriodicTorsion(row, torch.tensor([2]), 0.3 * k, k, periodic=False)
    x = _torsion_frame(phi).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: _energy(term, y), (x,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda y: _energy(term, y), (x,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("reference", [0.0, math.pi])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_straight_equilibrium_angle_keeps_its_bending_stiffness(
    reference: float, dtype: torch.dtype
) -> None:
    """The second derivative across the axis is k / r^2, as for any small bend."""
    r, k = 0.2, 7.0
    end = -r if reference else r
    frame = torch.tensor([[[0.1, 0, 0], [0, 0, 0], [end, 0, 0]]], dtype=dtype)
    numbers = torch.tensor([[reference], [k]], dtype=torch.float64)
    term = HarmonicAngle(torch.tensor([[0, 1, 2]]), *numbers, periodic=False).to(dtype)
    hessian = torch.func.hessian(lambda x: _energy(term, x).sum())(frame)[0, 2, :, 0, 2]
    expected = torch.diag(torch.tensor([0.0, k / r**2, k / r**2], dtype=dtype))
    torch.testing.assert_close(hessian, expected, rtol=1e-5, atol=1e-4)
    # And it is the limit of the stiffness at a small bend.
    if dtype == torch.float64:
        bent = frame + torch.tensor([[0, 0, 0], [0, 0, 0], [0, 2e-7, 1e-7]])
        near = torch.func.hessian(lambda x: _energy(term, x).sum())(bent)[0, 2, :, 0, 2]
        torch.testing.assert_close(near, expected, rtol=1e-5, atol=1e-3)


def test_an_undefined_dihedral_is_a_constant_right_angle() -> None:
    frame = SHAPES["straight across"][None].requires_grad_()
    phi = geometry.dihedral(frame, None, torch.tensor([[0, 1, 2, 3]]))
    assert phi.item() == 0.5 * math.pi
    assert torch.autograd.grad(phi.sum(), frame)[0].abs().max() == 0.0


@each_term
def test_terms_without_interactions_are_zero(
    make: Callable[[np.random.Generator, bool], AbstractTerm],
) -> None:
    term = make(np.random.default_rng(0), False)
    for name, buffer in list(term._buffers.items()):
        assert buffer is not None
        term.register_buffer(name, buffer[:0])
    values = {name: value[:0] for name, value in term.parameter_values().items()}
    frames = _frames(np.random.default_rng(1)).requires_grad_()
    energy = term(frames, None, values, {})
    assert energy.tolist() == [0.0, 0.0, 0.0]
    assert torch.autograd.grad(energy.sum(), frames)[0].abs().max() == 0.0
