"""Gradients of each frame's energy, and graphs that are rebuilt when needed."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from mdgraft import Frames, InvalidInputError, Potential
from mdgraft.ensembles import Ensemble, PotentialEnergy, per_frame_gradients
from mdgraft.ensembles.per_frame import (
    double_reverse_jacobian,
    forward_jacobian,
    per_frame_jacobian,
    reverse_jacobian,
)
from mdgraft.ensembles.recompute import leaves_of, recompute
from mdgraft.ensembles.selection import select_parameters
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.bonded import HarmonicBond

T = 300.0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bonded_potential(n_particles=4, dtype=torch.float64):
    """A chain of unequal bonds: two parameters of several entries each."""
    pairs = torch.tensor([[i, i + 1] for i in range(n_particles - 1)])
    length = torch.linspace(0.12, 0.2, n_particles - 1, dtype=dtype)
    k = torch.linspace(900.0, 1500.0, n_particles - 1, dtype=dtype)
    return Potential(
        {"bonds": HarmonicBond(pairs, length, k, periodic=False)}, n_particles=n_particles
    )


def chain_frames(n_frames=30, n_particles=4, seed=0):
    """Bent chains with bonds near their lengths: any frames serve exact identities."""
    steps = torch.randn(n_frames, n_particles, 3, generator=seeded(seed), dtype=torch.float64)
    steps = 0.16 * steps / steps.norm(dim=-1, keepdim=True)
    steps = steps * (1 + 0.1 * torch.randn(n_frames, n_particles, 1, generator=seeded(seed + 1)))
    return Frames(positions=steps.cumsum(dim=1), sampled="NVT")


def gyration(frames):
    centred = frames.positions - frames.positions.mean(dim=1, keepdim=True)
    return centred.square().sum(dim=-1).mean(dim=1)


def test_per_frame_routes_are_equal():
    potential, frames = bonded_potential(), chain_frames(6)

    def function(batch):
        energy = potential(batch.positions)
        return energy, torch.stack([energy**2, batch.positions[:, 0, 0]], dim=-1)

    names = ["bonds.k", "bonds.length"]
    routes = [
        route(potential, function, frames, names)
        for route in (forward_jacobian, reverse_jacobian, double_reverse_jacobian)
    ]
    for first, second in zip(routes[0], routes[1], strict=True):
        assert first.shape[0] == 6
        assert first.shape[-1] == 6
        assert torch.allclose(first, second, rtol=1e-12)
    for first, second in zip(routes[0], routes[2], strict=True):
        assert torch.allclose(first, second, rtol=1e-12)
    r = (frames.positions[:, 1:] - frames.positions[:, :-1]).norm(dim=-1)
    length = potential.values()["bonds.length"].detach()
    gradients = per_frame_gradients(potential, frames, ["bonds.k"], batch_size=4)
    assert torch.allclose(gradients, 0.5 * (r - length) ** 2, rtol=1e-12)


@pytest.mark.parametrize(("n_frames", "route"), [(200, "double_reverse"), (3, "reverse")])
def test_the_cheaper_route_is_taken(n_frames, route, monkeypatch):
    potential, frames = bonded_potential(20), chain_frames(n_frames, 20)
    exact = forward_jacobian(potential, lambda b: (potential(b.positions),), frames, ["bonds.k"])[0]
    other = {"double_reverse": "reverse", "reverse": "double_reverse"}[route]
    monkeypatch.setattr(
        f"mdgraft.ensembles.per_frame.{other}_jacobian",
        lambda *_: pytest.fail(f"{n_frames} frames should take the other route"),
    )
    gradients = per_frame_gradients(potential, frames, ["bonds.k"], batch_size=200)
    assert torch.allclose(gradients, exact, rtol=1e-12)


class _Cut(torch.autograd.Function):
    """Its backward pass gives numbers without a graph, as one written with NumPy does."""

    @staticmethod
    def forward(ctx, k, squared):
        ctx.save_for_backward(squared)
        return k * squared

    @staticmethod
    def backward(ctx, grad):
        (squared,) = ctx.saved_tensors
        return (grad.detach() * squared).sum(), None


class _OnceOnly(_Cut):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (squared,) = ctx.saved_tensors
        return (grad * squared).sum(), None


class _Opaque(AbstractTerm):
    def __init__(self, function):
        super().__init__(periodic=False)
        self.function = function
        self.add_parameter("k", torch.tensor(2.0, dtype=torch.float64), "kilojoule/mole")

    def forward(self, positions, box, values, global_values):
        return self.function.apply(values["k"], positions.square().sum(dim=(1, 2)))


@pytest.mark.parametrize("function", [_Cut, _OnceOnly])
def test_operations_without_second_derivatives_are_never_silently_zero(function):
    potential = Potential({"opaque": _Opaque(function)}, n_particles=4)
    frames = chain_frames(50)
    with pytest.raises(RuntimeError, match="differentiable"):
        double_reverse_jacobian(
            potential, lambda b: (potential(b.positions),), frames, ["opaque.k"]
        )
    gradients = per_frame_gradients(potential, frames, ["opaque.k"])
    assert torch.allclose(gradients[:, 0], frames.positions.square().sum(dim=(1, 2)))


def test_tied_values_are_parameters_of_their_own():
    potential, frames = bonded_potential(), chain_frames()
    potential.tie("stiffness", {"bonds.k": (None, [1.0, 2.0, 3.0])}, value=500.0)
    assert select_parameters(potential) == ["bonds.length", "tied.stiffness"]
    ensemble = Ensemble(potential, frames, temperature=T)
    estimate = ensemble.estimate(gyration)
    average = ensemble.average(gyration)
    (exact,) = torch.autograd.grad(average, [potential.get_parameter("tied.stiffness")])
    assert torch.allclose(estimate.gradient["tied.stiffness"], exact, rtol=1e-9)
    potential.freeze("*").unfreeze("tied.*")
    assert list(ensemble.estimate(gyration).gradient) == ["tied.stiffness"]
    frozen = ensemble.estimate(PotentialEnergy(potential), ["bonds.length"])
    assert float(frozen.gradient["bonds.length"].abs().max()) > 0
    assert not potential.get_parameter("bonds.length").requires_grad


def test_patterns_select_parameters():
    potential = bonded_potential()
    assert select_parameters(potential, ["*.k"]) == ["bonds.k"]
    assert select_parameters(potential, []) == []
    potential.freeze("bonds.k")
    assert select_parameters(potential) == ["bonds.length"]
    with pytest.raises(InvalidInputError, match="matches no parameter"):
        select_parameters(potential, ["bonds.depth"])
    with pytest.raises(InvalidInputError, match="no parameter 'depth'"):
        per_frame_jacobian(potential, lambda b: (b.positions,), chain_frames(2), ["depth"])


def test_recompute_keeps_no_graph_and_every_derivative():
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    calls = []

    def function():
        calls.append(1)
        return torch.sin(a) * a, torch.tensor(2.0)

    y, constant = recompute(function)
    assert len(leaves_of([y])) == 1
    (first,) = torch.autograd.grad(y, [a], create_graph=True)
    (second,) = torch.autograd.grad(first, [a], create_graph=True)
    (third,) = torch.autograd.grad(second, [a])
    s, c = math.sin(0.7), math.cos(0.7)
    assert first.item() == pytest.approx(0.7 * c + s)
    assert second.item() == pytest.approx(2 * c - 0.7 * s)
    assert third.item() == pytest.approx(-3 * s - 0.7 * c)
    assert constant.item() == 2.0
    assert len(calls) >= 2


class _Packed:
    def __init__(self, tensor):
        self.tensor = tensor


def test_graphs_of_all_batches_never_coexist():
    """What autograd holds on to: the peak over forward and backward is that of one batch."""
    potential, frames = bonded_potential(), chain_frames(30)
    held = weakref.WeakSet()
    peak = 0

    def pack(tensor):
        nonlocal peak
        packed = _Packed(tensor)
        held.add(packed)
        peak = max(peak, sum(p.tensor.numel() for p in held))
        return packed

    def wide(batch):
        scale = potential.values()["bonds.k"].sum() / 3600
        row = batch.positions.reshape(len(batch), -1).repeat(1, 100)
        return torch.sin(scale * row).mean(dim=1)

    def run(batch_size):
        nonlocal peak
        peak = 0
        ensemble = Ensemble(potential, frames, temperature=T, batch_size=batch_size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            ensemble.average(wide).backward()
        return peak

    whole, small = run(30), run(1)
    assert whole > 30 * 1200
    assert small < whole / 10
