"""Virtual sites: closed forms, derivatives, dependencies, degenerate frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdgraft import InvalidInputError, MissingBoxError
from mdgraft.constraints import (
    AbstractSite,
    AverageSite,
    LocalCoordinatesSite,
    OutOfPlaneSite,
    SymmetrySite,
    VirtualSites,
)
from torch import Tensor

N = 7
BOX = torch.tensor([[1.3, 0.0, 0.0], [0.3, 1.2, 0.0], [-0.4, 0.2, 1.1]], dtype=torch.float64)
TURN = ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))

LOCAL = LocalCoordinatesSite(
    parents=(0, 1, 2),
    origin_weights=(1.0, 0.0, 0.0),
    x_weights=(-1.0, 1.0, 0.0),
    y_weights=(-1.0, 0.0, 1.0),
    local_position=(0.1, 0.2, 0.3),
)
SITES: dict[str, AbstractSite] = {
    "two": AverageSite(parents=(0, 1), weights=(0.3, 0.9)),
    "three": AverageSite(parents=(0, 1, 2), weights=(0.3, 0.9, -0.2)),
    "out of plane": OutOfPlaneSite(parents=(0, 1, 2), weight12=0.3, weight13=0.4, weight_cross=2.0),
    "local": LOCAL,
    "local of five": LocalCoordinatesSite(
        parents=(0, 1, 2, 3, 4),
        origin_weights=(0.2, 0.3, 0.1, 0.1, 0.3),
        x_weights=(-1.0, 0.4, 0.6, 0.3, -0.3),
        y_weights=(0.5, 0.6, -1.1, 0.2, -0.2),
        local_position=(0.1, -0.2, 0.3),
    ),
    "symmetry": SymmetrySite(parents=(0,), rotation=TURN, offset=(0.1, 0.2, 0.3), fractional=False),
    "fractional": SymmetrySite(
        parents=(0,), rotation=TURN, offset=(0.1, 0.2, 0.3), fractional=True
    ),
}
each_site = pytest.mark.parametrize("name", SITES, ids=lambda name: name.replace(" ", "_"))


def _chain(site: AbstractSite) -> VirtualSites:
    """Site 5 by the rule, and site 6 that depends on it; listed against their order."""
    return VirtualSites(
        {6: AverageSite(parents=(5, 3), weights=(2.0, -1.0)), 5: site}, n_particles=N
    )


def _frames(seed: int, n_frames: int = 3) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).uniform(-0.6, 0.6, (n_frames, N, 3)))


def _place(sites: VirtualSites, frames: Tensor, box: Tensor = BOX) -> Tensor:
    cells = box.to(frames.dtype).expand(len(frames), 3, 3)
    return sites(frames, cells if sites.periodic else None)


def _expected(name: str, x: Tensor) -> Tensor:
    """Site 5 of one frame, straight from the definitions."""
    offset = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    turn = torch.tensor(TURN, dtype=torch.float64)
    if name == "two":
        return 0.3 * x[0] + 0.9 * x[1]
    if name == "three":
        return 0.3 * x[0] + 0.9 * x[1] - 0.2 * x[2]
    if name == "out of plane":
        r12, r13 = x[1] - x[0], x[2] - x[0]
        return x[0] + 0.3 * r12 + 0.4 * r13 + 2.0 * torch.linalg.cross(r12, r13)
    if name.startswith("local"):
        site = SITES[name]
        assert isinstance(site, LocalCoordinatesSite)
        parents = x[list(site.parents)]
        origin, ex, ey = (
            torch.tensor(w, dtype=torch.float64) @ parents
            for w in (site.origin_weights, site.x_weights, site.y_weights)
        )
        ez = torch.linalg.cross(ex, ey)
        ex, ez = ex / ex.norm(), ez / ez.norm()
        a, b, c = site.local_position
        return origin + a * ex + b * torch.linalg.cross(ez, ex) + c * ez
    if name == "symmetry":
        return turn @ x[0] + offset
    return (turn @ (x[0] @ torch.linalg.inv(BOX)) + offset) @ BOX


@each_site
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_places_have_their_closed_form(name: str, seed: int) -> None:
    frames = _frames(seed)
    placed = _place(_chain(SITES[name]), frames)
    site = torch.stack([_expected(name, frame) for frame in frames])
    torch.testing.assert_close(placed[:, 5], site, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(placed[:, 6], 2 * site - frames[:, 3], rtol=1e-11, atol=1e-12)
    assert torch.equal(placed[:, :5], frames[:, :5])


def test_all_classes_together() -> None:
    """Several sites of each class and different numbers of parents in one level."""
    names = list(SITES)
    rules = {5 + i: SITES[name] for i, name in enumerate(names)}
    sites = VirtualSites(rules, n_particles=5 + len(names))
    assert sites.periodic
    frame = torch.cat([_frames(1, 1)[:, :5], torch.zeros(1, len(names), 3)], dim=1)
    placed = _place(sites, frame)
    for i, name in enumerate(names):
        torch.testing.assert_close(placed[0, 5 + i], _expected(name, frame[0]))


@each_site
def test_input_rows_of_sites_do_not_matter(name: str) -> None:
    sites, frames = _chain(SITES[name]), _frames(2)
    before = frames.clone()
    placed = _place(sites, frames)
    assert torch.equal(frames, before)
    other = frames.clone()
    other[:, 5:] = 9.0
    assert torch.equal(_place(sites, other), placed)
    gradient = torch.func.grad(lambda x: _place(sites, x).square().sum())(frames)
    assert gradient[:, 5:].abs().max() == 0.0
    assert gradient[:, 0].abs().min() > 0.0


@each_site
def test_derivatives_of_first_and_second_order(name: str) -> None:
    sites = _chain(SITES[name])
    frames = _frames(3, 2).requires_grad_()
    # A box keeps its upper triangle at zero.
    lower = BOX.expand(2, 3, 3).clone().requires_grad_()

    def function(x: Tensor, h: Tensor) -> Tensor:
        return sites(x, h.tril())

    inputs = (frames, lower if sites.periodic else lower.detach())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_site
def test_function_transforms_agree(name: str) -> None:
    sites, frames = _chain(SITES[name]), _frames(4, 4)
    placed = _place(sites, frames)
    torch.testing.assert_close(torch.vmap(lambda x: _place(sites, x[None])[0])(frames), placed)

    def total(x: Tensor) -> Tensor:
        return _place(sites, x[None]).pow(3).sum()

    hessian = torch.func.hessian(total)(frames[0])
    by_rows = torch.autograd.functional.hessian(total, frames[0])
    torch.testing.assert_close(hessian, by_rows, rtol=1e-10, atol=1e-10)
    per_frame = torch.vmap(torch.func.grad(total))(frames)
    torch.testing.assert_close(per_frame[1], torch.func.grad(total)(frames[1]))


@each_site
def test_single_precision(name: str) -> None:
    sites, frames = _chain(SITES[name]), _frames(5)
    exact = _place(sites, frames)
    rounded = _place(sites.float(), frames.float())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["out of plane", "local", "local of five"])
def test_sites_move_with_their_molecule(name: str) -> None:
    rng = np.random.default_rng(6)
    sites, frames = VirtualSites({5: SITES[name]}, n_particles=N), _frames(6)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)
    turn, shift = torch.tensor(rotation), torch.tensor(rng.normal(size=3))
    moved = _place(sites, frames @ turn.mT + shift)
    torch.testing.assert_close(
        moved[:, 5], _place(sites, frames)[:, 5] @ turn.mT + shift, rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Parents on a line along x: there is no z axis and hence no y axis.
        ([[0.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0]], [0.1, 0.0, 0.0]),
        # The x axis has no direction: neither has z.
        ([[0.5, 0, 0], [0.5, 0, 0], [0.0, 1.0, 0]], [0.5, 0.0, 0.0]),
        ([[0.5, 0, 0], [0.5, 0, 0], [0.5, 0, 0]], [0.5, 0.0, 0.0]),
    ],
)
def test_local_frames_without_axes(
    rows: list[list[float]], expected: list[float], dtype: torch.dtype
) -> None:
    sites = VirtualSites({3: LOCAL}, n_particles=4).to(dtype)
    frame = torch.tensor([[*rows, [0.0, 0.0, 0.0]]], dtype=dtype)
    torch.testing.assert_close(sites(frame)[0, 3], torch.tensor(expected, dtype=dtype))
    assert torch.isfinite(torch.func.jacrev(sites)(frame)).all()
    assert torch.isfinite(torch.func.hessian(lambda x: sites(x).pow(2).sum())(frame)).all()


@pytest.mark.parametrize("bend", [1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nearly_collinear_parents_have_finite_derivatives(bend: float, dtype: torch.dtype) -> None:
    sites = VirtualSites({3: LOCAL}, n_particles=4).to(dtype)
    frame = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [0.2, bend, 0], [0, 0, 0]]], dtype=dtype)
    torch.testing.assert_close(sites(frame)[0, 3], torch.tensor([0.1, 0.2, 0.3], dtype=dtype))
    assert torch.isfinite(torch.func.hessian(lambda x: sites(x).pow(2).sum())(frame)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_parents_make_an_axis_only(dtype: torch.dtype) -> None:
    """Rounding must not invent a z axis, wherever the molecule lies."""
    site = LocalCoordinatesSite(
        parents=(0, 1),
        origin_weights=(0.3, 0.7),
        x_weights=(-0.9, 0.9),
        y_weights=(0.7, -0.7),
        local_position=(0.1, 0.2, 0.3),
    )
    sites = VirtualSites({2: site}, n_particles=3).to(dtype)
    x = torch.tensor(np.random.default_rng(9).uniform(5, 6, (20, 3, 3))).to(dtype)
    axis = (x[:, 1] - x[:, 0]) / (x[:, 1] - x[:, 0]).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(sites(x)[:, 2], 0.3 * x[:, 0] + 0.7 * x[:, 1] + 0.1 * axis)
    assert torch.func.hessian(lambda y: sites(y).sum())(x).abs().max() < 1e3


def test_weights_follow_the_module_and_are_not_trainable() -> None:
    sites = _chain(SITES["local"])
    assert list(sites.parameters()) == []
    assert {b.dtype for b in sites.float().buffers() if b.is_floating_point()} == {torch.float32}
    copy = _chain(dataclasses.replace(LOCAL, local_position=(0.0, 0.0, 0.0))).float()
    copy.load_state_dict(sites.state_dict())
    frames = _frames(7).float()
    assert torch.equal(_place(copy, frames), _place(sites, frames))


AVERAGE = AverageSite(parents=(0, 1), weights=(0.5, 0.5))
WRONG: list[tuple[dict[int, AbstractSite], str]] = [
    (
        {
            1: AverageSite(parents=(2,), weights=(1.0,)),
            2: AverageSite(parents=(1,), weights=(1.0,)),
        },
        r"virtual sites \[1, 2\] are circular",
    ),
    ({1: AVERAGE}, r"virtual sites \[1\] are circular"),
    ({7: AVERAGE}, r"virtual site 7 names particle 7, but the system has 7"),
    ({5: dataclasses.replace(AVERAGE, parents=(0, -1))}, r"names particle -1"),
    ({5: dataclasses.replace(AVERAGE, parents=(0, 1, 2))}, r"site 5 \(AverageSite\) has 3 parents"),
    ({5: AverageSite(parents=(), weights=())}, r"has 0 parents"),
    (
        {5: OutOfPlaneSite(parents=(0, 1), weight12=0.0, weight13=0.0, weight_cross=0.0)},
        r"\(OutOfPlaneSite\) has 2 parents and needs 3",
    ),
    ({5: AbstractSite(parents=(0,))}, r"no rule for AbstractSite"),
]


@pytest.mark.parametrize(("rules", "message"), WRONG)
def test_wrong_definitions_are_named(rules: dict[int, AbstractSite], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        VirtualSites(rules, n_particles=N)


def test_wrong_input_is_named() -> None:
    sites = _chain(SITES["fractional"])
    with pytest.raises(MissingBoxError, match=r"box: got None, but a virtual site is defined in"):
        sites(_frames(8), None)
    with pytest.raises(InvalidInputError, match=r"positions: got shape \(7, 3\), wanted \(frames"):
        sites(_frames(8)[0], BOX[None])
