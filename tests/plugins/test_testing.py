"""The public checks: right potentials pass, and each kind of mistake is caught."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from mdgraft import InvalidInputError, Potential
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.bonded import HarmonicBond
from mdgraft.testing import (
    HostFunctions,
    check_adapter,
    check_potential,
    compare_with_host,
    finite_difference,
)
from torch import Tensor

POSITIONS = torch.tensor(
    [[0.0, 0.1, 0.2], [0.15, 0.12, 0.2], [0.2, 0.3, 0.25], [1.9, 0.35, 0.3]], dtype=torch.float64
)
BOX = torch.tensor([[2.0, 0, 0], [0.3, 2, 0], [-0.2, 0.4, 2]], dtype=torch.float64)

FUNCTIONS: dict[str, tuple[Callable[[float], Any], Any]] = {
    "exponential": (lambda t: np.exp(3 * t), 3.0),
    "large offset": (lambda t: 1e6 + np.sin(t), 1.0),
    "steep power": (lambda t: (1 + t) ** 12, 12.0),
    "constant": (lambda t: 5.0, 0.0),
    "vector": (lambda t: np.array([t, t**2, np.cos(t + 1)]), [1, 0, -np.sin(1)]),
    "steps": (lambda t: np.floor(3e4 * t + 0.3) * 1e-3 + np.sin(t), 1.0),
    "undefined far away": (lambda t: np.log1p(t) if abs(t) < 1e-3 else np.nan, 1.0),
}


@pytest.mark.parametrize("side", [0, 1, -1])
@pytest.mark.parametrize(("function", "truth"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_finite_difference(function: Callable[[float], Any], truth: Any, side: int) -> None:
    found = finite_difference(function, side=side)
    assert np.allclose(found.value, truth, rtol=1e-6, atol=1e-7)
    # The estimate of the error is honest, and useful.
    assert (np.abs(found.value - truth) <= 3 * found.error + 1e-15).all()
    assert (found.error <= 1e-4).all()


def test_finite_difference_stops_early() -> None:
    calls = []
    finite_difference(lambda t: calls.append(t) or t**2 + t, atol=1e-6)
    assert len(calls) == 4


def test_finite_difference_of_what_is_undefined() -> None:
    found = finite_difference(lambda t: [np.nan, 2 * t])
    assert np.isinf(found.error[0])
    assert found.value[1] == pytest.approx(2.0)
    right = finite_difference(lambda t: np.sqrt(t) if t >= 0 else np.nan, side=0)
    assert np.isinf(right.error)


@pytest.mark.parametrize(
    "options", [{"step": 0.0}, {"shrink": 1.0}, {"side": 2}, {"levels": 1}, {"step": float("nan")}]
)
def test_finite_difference_refuses(options: Any) -> None:
    with pytest.raises(InvalidInputError, match="wanted step > 0"):
        finite_difference(lambda t: t, **options)


def make(term: type[HarmonicBond] = HarmonicBond, *, periodic: bool = True) -> Potential:
    particles = torch.tensor([[0, 1], [1, 2], [0, 3]])
    length = torch.tensor([0.15, 0.2, 0.1], dtype=torch.float64)
    k = torch.tensor([1000.0, 800.0, 600.0], dtype=torch.float64)
    return Potential({"bonds": term(particles, length, k, periodic=periodic)}, n_particles=4)


@pytest.mark.parametrize("periodic", [False, True])
def test_a_right_potential_passes(periodic: bool) -> None:
    check_potential(make(periodic=periodic), POSITIONS, BOX if periodic else None)
    check_potential(make(periodic=periodic), POSITIONS.numpy(), BOX.numpy(), seed=5)


class WrongForce(HarmonicBond):
    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        return super().forward(x + 0.01 * (x - x.detach()), box, values, shared)


class NoSecondOrder(HarmonicBond):
    class Cut(torch.autograd.Function):
        """Right energy and forces, without a second derivative."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.square().sum(dim=(-2, -1))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * g[..., None, None] * x.detach()

    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        centred = x - x.mean(dim=-2, keepdim=True)
        return super().forward(x, box, values, shared) + 100 * self.Cut.apply(centred)


class WrongBox(HarmonicBond):
    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        return super().forward(x, None if box is None else box.detach(), values, shared)


class Anchored(HarmonicBond):
    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        return super().forward(x, box, values, shared) + x[:, 0].square().sum(dim=-1)


class Mixed(HarmonicBond):
    """Frames see each other."""

    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        energy = super().forward(x, box, values, shared)
        return energy + 1e-6 * energy.mean()


class Rough(HarmonicBond):
    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        energy = super().forward(x, box, values, shared)
        return energy + 0.01 * (x[:, 0, 0] * 1e9).floor().remainder(7)


class Infinite(HarmonicBond):
    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        zero = (values["k"] - values["k"].detach()).abs().sqrt().sum()
        return super().forward(x, box, values, shared) + zero


class Imprecise(HarmonicBond):
    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        energy = super().forward(x, box, values, shared)
        return energy * (1.01 if x.dtype == torch.float32 else 1.0)


MISTAKES: dict[str, tuple[type[HarmonicBond], str, bool]] = {
    "forces": (WrongForce, "forces along a random direction: differs", True),
    "second derivative": (NoSecondOrder, "Hessian times a random vector: differs", False),
    "box derivative": (WrongBox, "box derivative along a random direction: differs", True),
    "translation": (Anchored, "a translation", False),
    "translation by the box": (Anchored, "a translation by box vectors", True),
    "frames": (Mixed, "a batch of three frames", True),
    "roughness": (Rough, "differs from finite differences|uncertain by", True),
    "parameter gradients": (Infinite, "the gradient of bonds.k is not finite", True),
    "float32": (Imprecise, "energy in float32", True),
}


@pytest.mark.parametrize(("term", "message", "periodic"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_caught(term: type[HarmonicBond], message: str, periodic: bool) -> None:
    with pytest.raises(AssertionError, match=message):
        check_potential(make(term, periodic=periodic), POSITIONS, BOX if periodic else None)


def test_bad_arguments() -> None:
    with pytest.raises(InvalidInputError, match="wanted torch.float64"):
        check_potential(make().float(), POSITIONS, BOX)
    with pytest.raises(InvalidInputError, match=r"wanted one frame, \(4, 3\)"):
        check_potential(make(), POSITIONS[None], BOX)


def numpy_host(factor: float = 1.0, *, slope: float = 1.0, refuse: bool = False) -> HostFunctions:
    """The same bonds in numpy, as a host that knows nothing of torch."""
    pairs = np.array([[0, 1], [1, 2], [0, 3]])
    base = {n.partition(".")[2]: p.detach().numpy() for n, p in make().named_parameters()}

    def vectors(x: np.ndarray, box: np.ndarray | None) -> np.ndarray:
        d = x[pairs[:, 1]] - x[pairs[:, 0]]
        if box is not None:
            for row in (2, 1, 0):
                d = d - np.outer(np.round(d[:, row] / box[row, row]), box[row])
        return d

    def energy(x: np.ndarray, box: np.ndarray | None, values: Mapping[str, Any]) -> float:
        r = np.linalg.norm(vectors(x, box), axis=1)
        return float(factor * (0.5 * values["k"] * (r - values["length"]) ** 2).sum())

    def energies(x: np.ndarray, box: np.ndarray | None, terms: Any) -> dict[str, float]:
        skewed = refuse and box is not None and abs(box[2, 0] + 0.2) > 1e-12
        return {"bonds": np.nan if skewed else energy(x, box, base)}

    def forces(x: np.ndarray, box: np.ndarray | None, terms: Any) -> dict[str, np.ndarray]:
        d = vectors(x, box)
        r = np.linalg.norm(d, axis=1)
        pull = (factor * base["k"] * (r - base["length"]) / r)[:, None] * d
        found = np.zeros_like(x)
        np.add.at(found, pairs[:, 0], pull)
        np.add.at(found, pairs[:, 1], -pull)
        return {"bonds": found}

    def written(potential: Potential, terms: Any) -> dict[str, float]:
        values = {
            n.partition(".")[2]: base[n.partition(".")[2]]
            + slope * (p.detach().numpy() - base[n.partition(".")[2]])
            for n, p in potential.named_parameters()
        }
        return {"bonds": energy(POSITIONS.numpy(), BOX.numpy(), values)}

    return HostFunctions(energies=energies, forces=forces, parameter_energies=written)


def test_an_adapter_that_is_right_passes() -> None:
    told = []
    rows = check_adapter(
        make(),
        POSITIONS,
        BOX,
        numpy_host(),
        gradients=True,
        progress=lambda message, done, total: told.append((done, total)),
    )
    assert {row.quantity for row in rows} == {"energy", "forces", "box", "parameter"}
    assert {row.status for row in rows} == {"agrees"}
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


ADAPTER_MISTAKES = {
    "energy": (numpy_host(1 + 1e-8), r"bonds energy.*\n.*bonds forces"),
    "parameters": (numpy_host(slope=1 + 1e-4), r"bonds parameter bonds.length"),
}


@pytest.mark.parametrize(("host", "message"), ADAPTER_MISTAKES.values(), ids=ADAPTER_MISTAKES)
def test_an_adapter_that_is_wrong_fails(host: HostFunctions, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_adapter(make(), POSITIONS, BOX, host, gradients=True)


def test_what_a_host_refuses_is_said() -> None:
    rows = compare_with_host(make(), POSITIONS.numpy(), BOX.numpy(), numpy_host(refuse=True))
    (box,) = (row for row in rows if row.quantity == "box")
    assert box.status == "agrees"
    assert box.detail == "not zx, which the host refuses"


def test_jumps_of_the_energy_are_no_slope() -> None:
    """As where many pairs cross a plain cutoff, a few for each step of the box."""
    plain = numpy_host()

    def energies(x: np.ndarray, box: np.ndarray | None, terms: Any) -> dict[str, float]:
        assert box is not None
        jumps = np.round((box - BOX.numpy()).sum() / 4e-6)
        return {"bonds": plain.energies(x, box, terms)["bonds"] + 4e-6 * 1e-2 * jumps}

    host = HostFunctions(energies=energies, forces=plain.forces)
    rows = compare_with_host(make(), POSITIONS.numpy(), BOX.numpy(), host)
    assert {row.status for row in rows} == {"agrees"}


class Singular(AbstractTerm):
    """``sqrt(epsilon)``, which has no derivative at zero."""

    def __init__(self, epsilon: list[float]) -> None:
        super().__init__()
        self.add_parameter("epsilon", torch.tensor(epsilon, dtype=torch.float64), "kilojoule/mole")

    def forward(self, x: Tensor, box: Any, values: Any, shared: Any) -> Tensor:
        safe = torch.where(values["epsilon"] > 0, values["epsilon"], 1.0)
        roots = torch.where(values["epsilon"] > 0, safe.sqrt(), 0.0)
        return roots.sum() + 0.0 * x.sum(dim=(-2, -1))


@pytest.mark.parametrize(
    ("epsilon", "status"), [([0.5, 0.0, 0.2], "agrees"), ([0.0, 0.0], "skipped")]
)
def test_entries_without_derivative_are_left_out(epsilon: list[float], status: str) -> None:
    def energies(potential: Potential) -> dict[str, float]:
        value = potential.term("roots").parameter_values()["epsilon"].detach().numpy()
        with np.errstate(invalid="ignore"):
            return {"roots": float(np.sqrt(value).sum())}

    potential = Potential({"roots": Singular(epsilon)}, n_particles=4)
    host = HostFunctions(
        energies=lambda x, box, terms: energies(potential),
        forces=lambda x, box, terms: {"roots": np.zeros((4, 3))},
        parameter_energies=lambda moved, terms: energies(moved),
    )
    rows = check_adapter(potential, POSITIONS, None, host, gradients=True)
    assert {row.status for row in rows if row.quantity == "parameter"} == {status}
