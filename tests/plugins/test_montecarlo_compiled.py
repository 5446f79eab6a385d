"""Moves in compiled loops are those of plain operations, and derivatives do without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mdgraft.kernels.fused.chains import turn_about_bonds, turn_about_centres
from mdgraft.kernels.switch import plain_kernels
from mdgraft.montecarlo import AbstractMove, ChainState, Rotation, Target, Torsion
from mdgraft.montecarlo.moves._rotations import compiled_rotations
from mdgraft.montecarlo.moves.base import Noise
from montecarlo_laws import F64, generator

N = 9
TREE = [(0, 1), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (2, 7)]
MOLECULES = [[3], [8, 0], [1, 2, 7, 4]]
FLAT = Target(lambda s: s.positions.new_zeros(s.n_chains), temperature=300.0)

MOVES: dict[str, Callable[[], AbstractMove]] = {
    "torsion": lambda: Torsion(1.3, TREE),
    "rotation": lambda: Rotation(1.3, MOLECULES),
}


def start(dtype: torch.dtype, present: bool = False) -> ChainState:
    x = torch.randn(50, N, 3, generator=generator(1), dtype=F64).to(dtype)
    there = torch.rand(50, len(MOLECULES), generator=generator(2)) < 0.4
    return ChainState(positions=x, present=there if present else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_compiled_rotations_are_the_plain_ones(
    name: str, present: bool, dtype: torch.dtype
) -> None:
    move, state = MOVES[name](), start(dtype, present and name == "rotation")
    before = state.positions.clone()
    noise = move.draw(state, generator(3))
    assert compiled_rotations(state.positions, noise["which"]) is not None
    compiled = move.apply(state, noise, FLAT)
    with plain_kernels():
        assert compiled_rotations(state.positions, noise["which"]) is None
        plain = move.apply(state, noise, FLAT)
    tolerance = 1e-13 if dtype == F64 else 2e-6
    torch.testing.assert_close(
        compiled.state.positions, plain.state.positions, rtol=tolerance, atol=tolerance
    )
    assert compiled.state.positions.dtype == dtype
    assert torch.equal(compiled.log_ratio, plain.log_ratio)
    assert torch.equal(state.positions, before)
    moved = (compiled.state.positions != before).any(dim=-1).any(dim=-1)
    assert bool(moved.any())
    if present and name == "rotation":
        assert state.present is not None and not bool(state.present.any(dim=1).all())
        assert not bool(moved[~state.present.any(dim=1)].any())


def test_small_angles_keep_their_digits() -> None:
    # The change of positions to first order in the angle, where 1 - cos would be all rounding.
    state = start(F64)
    angle = 1e-9
    move = Torsion(angle, TREE, rotatable=[(1, 2)])
    noise = move.draw(state, generator(3)) | {"normal": torch.ones(50, dtype=F64)}
    x = state.positions
    proposed = move.apply(state, noise, FLAT).state.positions
    turned = (proposed != x).any(dim=-1).any(dim=0)
    axis = x[:, move.axes[0, 1]] - x[:, move.axes[0, 0]]
    axis = axis / axis.norm(dim=-1, keepdim=True)
    arms = x - x[:, move.axes[0, :1]]
    first_order = angle * torch.linalg.cross(axis[:, None].expand_as(arms), arms)
    torch.testing.assert_close(
        (proposed - x)[:, turned], first_order[:, turned], rtol=0, atol=2e-15
    )


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("mode", ["reverse", "forward", "function transform"])
def test_derivatives_go_through_plain_operations(name: str, mode: str) -> None:
    move, state = MOVES[name](), start(F64)
    noise = move.draw(state, generator(3))
    direction = torch.randn(50, N, 3, generator=generator(4), dtype=F64)

    def proposed(x: torch.Tensor) -> torch.Tensor:
        return move.apply(ChainState(positions=x), noise, FLAT).state.positions

    x = state.positions
    if mode == "reverse":
        weight = torch.randn(50, N, 3, generator=generator(5), dtype=F64)
        leaf = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad((proposed(leaf) * weight).sum(), leaf)
        found = (gradient * direction).sum()
    elif mode == "forward":
        with torch.autograd.forward_ad.dual_level():
            dual = proposed(torch.autograd.forward_ad.make_dual(x, direction))
            found = torch.autograd.forward_ad.unpack_dual(dual).tangent
        weight = torch.ones_like(x)
    else:
        _, found = torch.func.jvp(proposed, (x,), (direction,))
        weight = torch.ones_like(x)
    step = 1e-6
    wanted = (proposed(x + step * direction) - proposed(x - step * direction)) / (2 * step)
    if mode == "reverse":
        wanted = (wanted * weight).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_derivatives_by_the_scale() -> None:
    weight = torch.randn(50, N, 3, generator=generator(5), dtype=F64)
    for make in MOVES.values():
        state, move = start(F64), make()
        noise = move.draw(state, generator(3))

        def total(
            scale: float | torch.Tensor,
            move: AbstractMove = move,
            state: ChainState = state,
            noise: Noise = noise,
        ) -> torch.Tensor:
            proposal = move.with_scale(scale).apply(state, noise, FLAT)
            return (weight * proposal.state.positions).sum()

        scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
        (found,) = torch.autograd.grad(total(scale), scale)
        wanted = (total(0.7 + 1e-5) - total(0.7 - 1e-5)) / 2e-5
        assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_loops_by_hand() -> None:
    # A right angle about z, for a bond along z and for a group about its centre.
    x = torch.tensor([[[0.0, 0, 0], [0, 0, 1], [1, 0, 1], [3, 1, 0], [5, 1, 0]]], dtype=F64)
    which, angle = torch.tensor([0]), torch.tensor([torch.pi / 2], dtype=F64)
    bonded, free = x.clone().numpy(), x.clone().numpy()
    rows, sizes = torch.tensor([[2]]).numpy(), torch.tensor([1]).numpy()
    bonds = torch.tensor([[0, 1]]).numpy()
    turn_about_bonds(bonded, which.numpy(), rows, sizes, bonds, angle.numpy())
    assert bonded[0, 2].tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-15)
    rows, sizes = torch.tensor([[3, 4, 0]]).numpy(), torch.tensor([2]).numpy()
    axis = torch.tensor([[0.0, 0, 2.0]], dtype=F64).numpy()
    turn_about_centres(free, which.numpy(), rows, sizes, axis, angle.numpy())
    assert free[0, 3].tolist() == pytest.approx([4.0, 0.0, 0.0], abs=1e-15)
    assert free[0, 4].tolist() == pytest.approx([4.0, 2.0, 0.0], abs=1e-15)
    assert free[0, 0].tolist() == [0.0, 0.0, 0.0]
