"""Torsion maps against SciPy's periodic splines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdgraft import InvalidInputError
from mdgraft.potentials.cmap import CMAPTorsion, spline_slopes
from scipy.interpolate import CubicSpline
from torch import Tensor

ROW = torch.arange(8)[None]


def _frame(phi: float, psi: float) -> Tensor:
    """Eight particles with two independent dihedrals."""
    rows = []
    for angle, x in ((phi, 0.0), (psi, 1.0)):
        c, s = math.cos(angle), math.sin(angle)
        rows += [[x + 0.1, 0, 0], [x, 0, 0], [x, 0, 0.1], [x + 0.1 * c, 0.1 * s, 0.1]]
    return torch.tensor([rows], dtype=torch.float64)


def _energy(term: CMAPTorsion, frames: Tensor, energy: Tensor | None = None) -> Tensor:
    values = term.parameter_values() if energy is None else {"energy": energy}
    return term(frames, None, values, {})


def _single(values: np.ndarray) -> CMAPTorsion:
    """One torsion pair on one map, ``values[i, j]`` at the i-th phi and j-th psi."""
    flat = torch.tensor(np.asarray(values).T.reshape(-1))
    return CMAPTorsion(ROW, torch.tensor([0]), [len(values)], flat, periodic=False)


def _spline(values: np.ndarray, phi: float, psi: float) -> float:
    """The tensor-product periodic cubic spline, one axis after the other."""
    grid = np.linspace(0.0, 2 * math.pi, len(values) + 1)

    def along(column: np.ndarray, at: float) -> float:
        closed = np.append(column, column[0])
        return float(CubicSpline(grid, closed, bc_type="periodic")(at % (2 * math.pi)))

    return along(np.array([along(row, psi) for row in values]), phi)


@pytest.mark.parametrize("size", [3, 4, 5, 12, 24])
def test_slopes_are_those_of_a_periodic_spline(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size)
    closed = np.append(values, values[0])
    expected = CubicSpline(np.arange(size + 1), closed, bc_type="periodic")(np.arange(size), 1)
    found = torch.tensor(spline_slopes(size)) @ torch.tensor(values)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(3, 15),
    phi=st.floats(-math.pi, math.pi),
    psi=st.floats(-math.pi, math.pi),
    seed=st.integers(0, 2**31),
)
def test_energy_is_the_bicubic_spline(size: int, phi: float, psi: float, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(size, size))
    found = _energy(_single(values), _frame(phi, psi)).item()
    assert found == pytest.approx(_spline(values, phi, psi), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_grid_points_return_their_own_values(size: int) -> None:
    values = np.random.default_rng(1).normal(size=(size, size))
    term = _single(values)
    for i in range(size):
        for j in range(size):
            frame = _frame(2 * math.pi * i / size, 2 * math.pi * j / size)
            assert _energy(term, frame).item() == pytest.approx(values[i, j], abs=1e-12)


def test_many_maps_of_different_sizes_add_up() -> None:
    rng = np.random.default_rng(2)
    grids = [rng.normal(size=(n, n)) for n in (5, 3, 8, 3)]
    maps = [2, 0, 1, 3, 1]
    flat = torch.tensor(np.concatenate([grid.T.reshape(-1) for grid in grids]))
    rows = torch.tensor(np.array([rng.permutation(8) for _ in maps]))
    term = CMAPTorsion(rows, torch.tensor(maps), [5, 3, 8, 3], flat, periodic=False)
    frames = torch.tensor(rng.normal(size=(3, 8, 3)))
    alone = torch.zeros(3, dtype=torch.float64)
    for row, m in zip(rows, maps, strict=True):
        alone = alone + _energy(_single(grids[m]), frames[:, row])
    torch.testing.assert_close(_energy(term, frames), alone, rtol=1e-13, atol=1e-13)


def test_energy_is_linear_in_the_map() -> None:
    rng = np.random.default_rng(3)
    term, frames = _single(rng.normal(size=(6, 6))), torch.tensor(rng.normal(size=(1, 8, 3)))
    energy = term.parameter_values()["energy"].detach()
    gradient = torch.func.grad(lambda e: _energy(term, frames, e).sum())(energy)
    torch.testing.assert_close((gradient * energy).sum(), _energy(term, frames).sum())
    # The weights of a spline through a constant add up to one.
    assert gradient.sum().item() == pytest.approx(1.0, abs=1e-13)
    second = torch.func.hessian(lambda e: _energy(term, frames, e).sum())(energy)
    assert second.abs().max() == 0.0


def test_derivatives_of_first_and_second_order() -> None:
    rng = np.random.default_rng(4)
    rows = torch.tensor(np.array([rng.permutation(8) for _ in range(2)]))
    energy = torch.tensor(rng.normal(size=9 + 16)).requires_grad_()
    term = CMAPTorsion(rows, torch.tensor([0, 1]), [3, 4], energy.detach(), periodic=False)
    frames = torch.tensor(rng.normal(size=(2, 8, 3))).requires_grad_()

    def function(x: Tensor, e: Tensor) -> Tensor:
        return _energy(term, x, e)

    assert torch.autograd.gradcheck(function, (frames, energy), atol=1e-6)
    assert torch.autograd.gradgradcheck(function, (frames, energy), atol=1e-5)


@pytest.mark.parametrize("phi", [0.0, 2 * math.pi / 5, math.pi])
def test_the_second_derivative_is_continuous_between_patches(phi: float) -> None:
    """At grid lines, and at pi where the dihedral itself jumps."""
    term = _single(np.random.default_rng(5).normal(size=(5, 5)))

    def hessian(at: float) -> Tensor:
        return torch.func.hessian(lambda x: _energy(term, x).sum())(_frame(at, 0.7))

    below, above = hessian(phi - 1e-9), hessian(phi + 1e-9)
    torch.testing.assert_close(below, above, rtol=1e-5, atol=1e-5 * below.abs().max().item())


def test_function_transforms_and_single_precision() -> None:
    rng = np.random.default_rng(6)
    term, frames = _single(rng.normal(size=(6, 6))), torch.tensor(rng.normal(size=(4, 8, 3)))
    exact = _energy(term, frames)
    mapped = torch.vmap(lambda x: _energy(term, x[None])[0])(frames)
    torch.testing.assert_close(mapped, exact, rtol=1e-13, atol=1e-13)
    energies = torch.tensor(rng.normal(size=(5, 36)))
    ensemble = torch.vmap(lambda e: _energy(term, frames, e))(energies)
    loop = torch.stack([_energy(term, frames, e) for e in energies])
    torch.testing.assert_close(ensemble, loop, rtol=1e-13, atol=1e-13)
    rounded = _energy(term.float(), frames.float())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)


def test_symmetries() -> None:
    rng = np.random.default_rng(7)
    term, frames = _single(rng.normal(size=(6, 6))), torch.tensor(rng.normal(size=(4, 8, 3)))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)
    moved = frames @ torch.tensor(rotation).mT + 0.7
    torch.testing.assert_close(_energy(term, moved), _energy(term, frames), rtol=1e-9, atol=1e-9)
    backwards = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
    torch.testing.assert_close(_energy(term, frames[:, backwards]), _energy(term, frames))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_collinear_particles_have_finite_derivatives(dtype: torch.dtype) -> None:
    term = _single(np.random.default_rng(8).normal(size=(4, 4))).to(dtype)
    frame = torch.outer(torch.arange(8.0), torch.tensor([0.03, -0.07, 0.11]))[None].to(dtype)
    gradient = torch.func.grad(lambda x: _energy(term, x).sum())(frame)
    hessian = torch.func.hessian(lambda x: _energy(term, x).sum())(frame)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(hessian).all()


@pytest.mark.parametrize("sizes", [[], [4]])
def test_no_torsions(sizes: list[int]) -> None:
    energy = torch.zeros(sum(n * n for n in sizes), dtype=torch.float64)
    none = torch.empty(0, dtype=torch.long)
    term = CMAPTorsion(none.reshape(0, 8), none, sizes, energy, periodic=False)
    frames = torch.zeros(2, 8, 3, dtype=torch.float64, requires_grad=True)
    assert _energy(term, frames).tolist() == [0.0, 0.0]
    assert torch.autograd.grad(_energy(term, frames).sum(), frames)[0].abs().max() == 0.0


@pytest.mark.parametrize(
    ("sizes", "n_values", "m", "message"),
    [
        ([1], 1, 0, r"sizes: got \[1\]; a periodic spline needs at least 2 points"),
        ([3], 8, 0, r"energy: got shape \(8,\), wanted \(9,\)"),
        ([3], 9, 1, r"maps: indices reach from 1 to 1, there are 1 maps"),
        ([], 0, 0, r"maps: indices reach from 0 to 0, there are 0 maps"),
    ],
)
def test_contradictions_are_named(sizes: list[int], n_values: int, m: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CMAPTorsion(ROW, torch.tensor([m]), sizes, torch.zeros(n_values), periodic=False)
