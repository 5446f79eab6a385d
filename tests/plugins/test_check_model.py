"""Each flaw of a model is found by the check that is meant for it."""

import mdgraft
import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.neural import AtomicModel, neural_potential
from mdgraft.testing import CHECKS, ModelReport, check_model
from torch import nn

NUMBERS = [8, 1, 1, 6, 1]
CELL = [[0.42, 0.1, 0], [0.1, 0.45, 0], [-0.1, 0.1, 0.43]]


class Pairs(AtomicModel):
    """Smooth pair energies with a three-body part; everything a model should be."""

    def __init__(self, **flaws):
        super().__init__(cutoff=0.4)
        self.flaws = flaws
        self.k = nn.Parameter(torch.tensor(30.0, dtype=torch.float64))

    def envelope(self, r):
        return torch.where(r < self.cutoff, (1 - (r / self.cutoff) ** 2).clamp(min=0) ** 3, 0.0)

    def forward(self, inputs):
        vectors, flaws = inputs.displacements, self.flaws
        r = vectors.norm(dim=-1)
        z = inputs.atomic_numbers.to(r.dtype)
        weights = (z[inputs.first] + z[inputs.second]) * self.envelope(r)
        if "jump" in flaws:
            # As large as the truncation of a Lennard-Jones potential.
            weights = weights + 1e-4
        if "kink" in flaws:
            weights = weights + 1e-2 * (self.cutoff - r)
        if "labels" in flaws:
            weights = weights * (1 + 0.01 * inputs.first)
        if "axis" in flaws:
            weights = weights * (1 + 0.01 * vectors[:, 0] ** 2)
        if "hand" in flaws:
            # Odd under inversion, even under rotations: a triple product of neighbour sums.
            sums = [
                self.sum(inputs, vectors * (r**k * self.envelope(r))[:, None]) for k in (0, 1, 2)
            ]
            triple = (sums[0] * torch.linalg.cross(sums[1], sums[2])).sum(-1)
        atoms = self.k * self.sum(inputs, 0.5 * weights[:, None]).squeeze(-1)
        density = self.sum(inputs, self.envelope(r)[:, None]).squeeze(-1)
        atoms = atoms + 0.3 * density**2
        if "hand" in flaws:
            atoms = atoms + 1e6 * triple
        if "place" in flaws:
            atoms = atoms + 0.01 * inputs.positions[:, 1] ** 2
        if "turn" in flaws:
            # No net force, but a torque: depends on directions relative to the axes.
            atoms = atoms + 0.1 * self.sum(
                inputs, (vectors[:, :1] * self.envelope(r)[:, None]) ** 2
            ).squeeze(-1)
        if "stiff box" in flaws and inputs.cells is not None:
            fixed = vectors - inputs.offsets + inputs.offsets.detach()
            r = fixed.norm(dim=-1)
            weights = (z[inputs.first] + z[inputs.second]) * self.envelope(r)
            return self.k * self.sum(inputs, 0.5 * weights[:, None]).squeeze(-1)
        if "half a graph" in flaws:
            # The value is right, the derivative is not.
            atoms = atoms + 0.1 * (density.detach() ** 2 - 0.5 * density**2)
        if "first order" in flaws:
            atoms = atoms + _FirstOrder.apply(r.square()).sum() * 0.1 / len(atoms)
        energies = inputs.per_frame(atoms)
        if "average" in flaws:
            energies = energies / (inputs.n_atoms / inputs.n_frames)
        if "batch" in flaws:
            energies = energies + 0.01 * energies.mean() * (inputs.n_frames - 1)
        return energies

    def sum(self, inputs, values):
        total = values.new_zeros(inputs.n_atoms, values.shape[1])
        return total.index_add(0, inputs.first, values)


class _FirstOrder(torch.autograd.Function):
    """A square root of a sum of squares whose gradient is taken for a constant."""

    @staticmethod
    def forward(ctx, values):
        total = (values**2).sum()
        ctx.save_for_backward(values, total)
        return total

    @staticmethod
    def backward(ctx, slope):
        values, _ = ctx.saved_tensors
        return slope * 2 * values.detach()


def atoms():
    random = torch.Generator().manual_seed(3)
    places = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double()[:5]
    return 0.17 * places + 0.04 * torch.rand(5, 3, generator=random, dtype=torch.float64)


def failing(model, box=None, **options):
    """Names of the checks that a model fails."""
    with pytest.raises(AssertionError, match="the model fails") as caught:
        check_model(model, atoms(), box, NUMBERS, **options)
    return {name for name in CHECKS for line in str(caught.value).split("\n") if _is(line, name)}


def _is(line, name):
    return line.startswith(name) and " failed " in line


@pytest.mark.parametrize("box", [None, CELL])
def test_a_sound_model_passes(box):
    report = check_model(Pairs(), atoms(), box, NUMBERS)
    assert isinstance(report, ModelReport)
    assert all(check.status != "failed" for check in report.checks)
    assert {check.name for check in report.checks} == set(CHECKS)
    names = {"lattice", "box derivative"} if box is None else {"torque"}
    assert {check.name for check in report.checks if check.status == "skipped"} == names
    assert report["forces"].error <= report["forces"].allowed
    assert "rotation" in str(report)


#: The flaw, in a periodic system or not, the checks that must find it, and others that may.
FLAWS = {
    "place": (
        None,
        {"translation", "net force"},
        {"rotation", "torque", "inversion", "extensivity"},
    ),
    "axis": (None, {"rotation", "torque"}, set()),
    "turn": (None, {"rotation", "torque"}, set()),
    "hand": (None, {"inversion"}, set()),
    "labels": (None, {"permutation"}, {"batch", "extensivity"}),
    "half a graph": (None, {"forces"}, {"hessian", "net force"}),
    "first order": (None, {"hessian"}, {"batch", "extensivity", "smoothness"}),
    "batch": (None, {"batch"}, set()),
    "average": (None, {"extensivity"}, set()),
    "jump": (None, {"smoothness"}, set()),
    "kink": (None, {"smoothness"}, set()),
    "stiff box": (CELL, {"box derivative"}, set()),
    "place in a cell": (
        CELL,
        {"translation", "lattice", "net force"},
        {"rotation", "inversion", "extensivity", "smoothness"},
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_found(flaw):
    box, wanted, possible = FLAWS[flaw]
    model = Pairs(**{flaw.removesuffix(" in a cell"): True})
    found = failing(model, box)
    assert wanted <= found <= wanted | possible


def lennard_jones(x, h=None, *, shift=True):
    """Two-body energies of five like atoms with a plain cutoff at 0.35 nm."""
    i, j = torch.triu_indices(5, 5, 1)
    r = (x[j] - x[i]).norm(dim=-1)
    u = (0.2 / r) ** 12 - (0.2 / r) ** 6
    edge = (0.2 / 0.35) ** 12 - (0.2 / 0.35) ** 6
    return torch.where(r < 0.35, u - edge if shift else u, 0.0).sum()


def test_functions():
    like = [6] * 5
    report = check_model(lennard_jones, atoms(), None, like)
    assert report["smoothness"].status == report["batch"].status == "skipped"
    with pytest.raises(AssertionError, match="jump of forces"):
        check_model(lennard_jones, atoms(), None, like, cutoff=0.35)
    with pytest.raises(AssertionError, match="jump of the energy"):
        check_model(lambda x, h: lennard_jones(x, shift=False), atoms(), None, like, cutoff=0.35)
    check_model(lennard_jones, atoms(), None, like, cutoff=0.35, skip=["smoothness"])


def test_forces_that_a_model_returns_are_checked():
    def honest(x, h):
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            energy = lennard_jones(x)
            return energy, -torch.autograd.grad(energy, x)[0]

    def dishonest(x, h):
        energy, forces = honest(x, h)
        return energy, 1.001 * forces

    assert check_model(honest, atoms())["hessian"].status == "skipped"
    with pytest.raises(AssertionError, match="forces"):
        check_model(dishonest, atoms())


def test_potentials_that_know_reduced_cells_alone():
    class Reduced(Pairs):
        general_cell = False

    reduced = [[0.7, 0, 0], [0.2, 0.75, 0], [-0.3, 0.1, 0.8]]
    potential = neural_potential(Reduced(), NUMBERS, pbc=True)
    report = check_model(potential, atoms(), reduced, NUMBERS)
    assert report["rotation"].status == "skipped"
    assert report["box derivative"].status == "passed"


def test_the_model_is_left_as_it_was():
    model = Pairs().float()
    check_model(model, atoms(), None, NUMBERS)
    assert model.k.dtype == torch.float32 and model.k.grad is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": 3}, "model: got int"),
        ({"atomic_numbers": None}, "atomic_numbers: got None"),
        ({"atomic_numbers": [1, 2]}, "atomic_numbers"),
        ({"positions": torch.zeros(2, 5, 3)}, "positions"),
        ({"box": torch.zeros(3)}, "box"),
        ({"skip": ["colour"]}, "colour"),
        ({"model": lambda x, h: x}, "energy of shape"),
    ],
)
def test_arguments_that_make_no_sense(arguments, match):
    given = {"model": Pairs(), "positions": atoms(), "atomic_numbers": NUMBERS, **arguments}
    with pytest.raises(InvalidInputError, match=match):
        check_model(**given)


def test_names_of_checks():
    report = check_model(Pairs(), atoms(), None, NUMBERS, skip=["hessian"])
    assert report["hessian"].status == "skipped"
    with pytest.raises(mdgraft.InvalidInputError, match="no check 'colour'"):
        report["colour"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("box", [None, [[0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9]]])
@pytest.mark.parametrize("n", [1, 2])
def test_energies_without_forces_raise_no_alarm(n, box, dtype):
    """One atom, and two that do not see each other, have forces of zero to rounding."""
    x = torch.tensor([[0.1, 0.2, 0.0], [0.55, 0.2, 0.0]])[:n]
    model = Pairs()
    report = check_model(_Offset(model), x, box, [8, 1][:n], dtype=dtype)
    assert report["forces"].status == "passed"


class _Offset(AtomicModel):
    """A model with a large constant energy, as those that were fitted to total energies."""

    def __init__(self, model, offset=-30.0):
        super().__init__(cutoff=model.cutoff)
        self.model, self.offset = model, offset

    def forward(self, inputs):
        return self.model(inputs) + self.offset * inputs.n_atoms / inputs.n_frames


def test_differences_that_precision_cannot_show_are_skipped():
    model = _Offset(Pairs(), -1e6)
    report = check_model(model, atoms(), None, NUMBERS, dtype=torch.float32)
    assert report["forces"].status == "skipped"
    assert "lost in torch.float32" in report["forces"].detail
    assert check_model(model, atoms(), None, NUMBERS)["forces"].status == "passed"
    assert "forces" in failing(_Offset(Pairs(**{"half a graph": True}), -1e6))


def test_a_name_gives_the_check_that_is_nearest_to_failing():
    report = check_model(Pairs(), atoms(), None, NUMBERS)
    of_name = [check for check in report.checks if check.name == "smoothness"]
    assert len(of_name) > 2
    worst = max(check.error / check.allowed for check in of_name)
    assert report["smoothness"].error / report["smoothness"].allowed == worst


class _Spring(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(300.0, dtype=dtype))

    def forward(self, x):
        return self.k * (x[0] - x[1]).square().sum()


@pytest.mark.parametrize("own", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, None])
def test_modules_of_positions_alone(own, dtype):
    model = _Spring(own)
    report = check_model(model, atoms(), dtype=dtype, skip="torque")
    assert report["torque"].detail == "as asked for"
    assert model.k.dtype == own


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (None, "returned NoneType"),
        ([1.0, 2.0], r"an energy of shape \(2,\)"),
        ((torch.zeros(()), torch.zeros(3)), r"forces of shape \(3,\)"),
        ((1.0, 2.0, 3.0), "returned tuple"),
    ],
)
def test_results_that_make_no_sense(result, match):
    with pytest.raises(InvalidInputError, match=match):
        check_model(lambda x, box: result, atoms())
