"""Ties: one value for many entries, however the potential is evaluated, replaced and copied."""

import copy
import io
import pickle

import pytest
import torch
from mdgraft.potentials import AbstractTerm, Potential
from torch.func import functional_call, grad, hessian, jvp, vmap

FACTORS = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
X = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Quartic(AbstractTerm):
    """E = sum_i (a_i x_i^2 + b_i^2 x_i^4)."""

    def __init__(self):
        super().__init__()
        for name in "ab":
            values = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
            self.add_parameter(name, values, "dimensionless")

    def forward(self, positions, box, values, global_values):
        """Energy of each frame."""
        square = (positions**2).sum(-1)
        return (values["a"] * square + values["b"] ** 2 * square**2).sum(-1)


def make():
    potential = Potential({"Q": Quartic()}, n_particles=6)
    potential.tie("s", {"Q.a": ([4, 0, 1], FACTORS), "Q.b": [2, 5]}, value=0.7)
    return potential.tie("t", {"Q.b": ([0, 1, 3], FACTORS)}, value=0.4)


def values(s, t):
    """The parameters a and b, entry by entry."""
    a, b = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).expand(2, 6)
    ours = {4: s, 0: -0.5 * s, 1: 3 * s}, {2: s, 5: s, 0: t, 1: -0.5 * t, 3: 3 * t}
    return [
        torch.stack([chosen.get(k, value[k]) for k in range(6)])
        for chosen, value in zip(ours, (a, b), strict=True)
    ]


def written_out(s, t, x=X):
    """The energy of each frame from single entries."""
    a, b = values(s, t)
    square = (x**2).sum(-1)
    return (a * square + b**2 * square**2).sum(-1)


def scalars(potential):
    return [potential.get_parameter(f"tied.{label}") for label in "st"]


def energy_of(potential):
    """As a function of the two scalars; everything else is constant."""
    fixed = {name: p.detach() for name, p in potential.named_parameters()}

    def energy(s, t):
        return functional_call(potential, {**fixed, "tied.s": s, "tied.t": t}, (X,)).sum()

    return energy


def assert_right(potential, rtol=1e-12):
    """Energies and derivatives are those of single entries."""
    own = scalars(potential)
    torch.testing.assert_close(potential(X), written_out(*own), rtol=rtol, atol=0)
    found = torch.autograd.grad(potential(X).sum(), own)
    expected = torch.autograd.grad(written_out(*own).sum(), own)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def without_gradients(energy, s, t):
    with torch.inference_mode():
        return energy(s, t)


#: What is made in a transform or a mode must not be kept.
FIRST = {
    "gradient": lambda f, s, t: grad(f, argnums=(0, 1))(s, t),
    "gradient of a gradient": lambda f, s, t: grad(lambda u: grad(f)(u, u))(s),
    "Hessian": lambda f, s, t: hessian(f, argnums=(0, 1))(s, t),
    "tangent": lambda f, s, t: jvp(f, (s, t), (t, s)),
    "batch": lambda f, s, t: vmap(f)(torch.stack([s, t]), torch.stack([t, t])),
    "batch of gradients": lambda f, s, t: vmap(grad(f), (0, None))(torch.stack([s, t]), t),
    "inference mode": without_gradients,
}


@pytest.mark.parametrize("first", FIRST)
def test_wherever_it_is_evaluated_first(first):
    """The transform is right, and so is what follows."""
    potential = make()
    s, t = (p.detach() for p in scalars(potential))
    found = FIRST[first](energy_of(potential), s, t)
    expected = FIRST[first](lambda s, t: written_out(s, t).sum(), s, t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_right(potential)


def test_entries_that_are_tied_have_no_derivative_of_their_own():
    potential = make()
    with torch.no_grad():
        potential.get_parameter("Q.a")[4] = float("nan")
    potential(X).sum().backward()
    assert potential.get_parameter("Q.a").grad[[0, 1, 4]].eq(0).all()
    assert potential.get_parameter("Q.a").grad[[2, 3, 5]].ne(0).all()
    assert_right(potential)


def test_a_parameter_of_another_size_leaves_nothing_behind():
    """Whether it is the first evaluation or a later one."""
    for potential in (make(), make()):
        longer = {"Q.b": torch.ones(9, dtype=torch.float64)}
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            functional_call(potential, longer, (X,))
        assert_right(potential)
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            functional_call(potential, longer, (X,))


def through_a_file(potential):
    file = io.BytesIO()
    torch.save(potential, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda potential: pickle.loads(pickle.dumps(potential)),
    "file": through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    """They are independent, and take nothing along that belongs to tensors of the original."""
    potential = make()
    potential(X)
    known = len(pickle.dumps(make()))
    assert abs(len(pickle.dumps(potential)) - known) < 100
    copied = COPIES[how](potential)
    with torch.no_grad():
        for k, scalar in enumerate(scalars(copied)):
            scalar.copy_(torch.tensor(0.3 + k))
    assert_right(copied)
    assert_right(potential)


def test_precision_may_change():
    potential = make()
    assert_right(potential)
    single = potential.float()
    assert single(X.float()).dtype is torch.float32
    # What was rounded stays so.
    assert_right(single.double(), rtol=1e-6)


def test_a_tie_that_is_added_later():
    potential = make()
    before = potential(X).detach()
    potential.tie("u", {"Q.a": [2, 3]}, value=1.5)
    a, _ = values(*scalars(potential))
    square = (X**2).sum(-1)
    change = ((1.5 - a[2:4]) * square[:, 2:4]).sum(-1)
    torch.testing.assert_close(potential(X), before + change)
    (slope,) = torch.autograd.grad(potential(X).sum(), potential.get_parameter("tied.u"))
    torch.testing.assert_close(slope, square[:, 2:4].sum())


def test_single_precision_is_added_up_in_double_precision():
    n = 200_000
    weights = torch.rand(n, generator=torch.Generator().manual_seed(3))

    class Sum(AbstractTerm):
        """E = sum_i a_i w_i."""

        def __init__(self):
            super().__init__()
            self.add_parameter("a", torch.ones(n), "dimensionless")

        def forward(self, positions, box, values, global_values):
            """Energy of each frame."""
            return (values["a"] * weights).sum(-1) + 0 * positions.sum((-2, -1))

    potential = Potential({"Sum": Sum()}, n_particles=1)
    potential.tie("s", {"Sum.a": None})
    (slope,) = torch.autograd.grad(potential(torch.zeros(1, 3)), potential.get_parameter("tied.s"))
    assert slope.dtype is torch.float32
    assert slope.item() == pytest.approx(weights.double().sum().item(), rel=1e-7)
