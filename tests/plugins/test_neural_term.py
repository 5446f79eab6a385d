"""Models of atoms as terms of a potential, against sums that are written out."""

import copy
import math
import pickle

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft import Frames, InvalidInputError, Potential, UnsupportedDerivativeError
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.ensembles.per_frame import per_frame_gradients
from mdgraft.neural import (
    AtomicModel,
    MessagePassingNetwork,
    ModelUnits,
    NeuralTerm,
    neural_potential,
)
from mdgraft.testing import check_potential
from torch import nn

EV = 96.48533212331


class Springs(AtomicModel):
    """Pairs closer than the cutoff: ``k z_i z_j (1 - r/c)^4``; sums by atoms or by frames.

    Written as models of others often are: in place, and with forces of its own in mind.
    """

    def __init__(self, *, per_atom=True, through="displacements", **options):
        super().__init__(**{"cutoff": 4.0, "units": ModelUnits("angstrom", "eV"), **options})
        self.k = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
        self.register_buffer("bias", torch.tensor(0.25, dtype=torch.float64))
        self.per_atom = per_atom
        self.through = through

    def forward(self, inputs):
        inputs.positions.requires_grad_(True)
        if self.through == "displacements":
            vectors = inputs.displacements
        else:
            x = inputs.positions
            vectors = x[inputs.second] - x[inputs.first] + inputs.offsets
        r = vectors.norm(dim=-1)
        z = inputs.atomic_numbers.to(r.dtype)
        energies = (self.k.sum() * z[inputs.first] * z[inputs.second]) * (1 - r / self.cutoff) ** 4
        atoms = torch.full_like(z, 0.0)
        atoms.index_add_(0, inputs.first, 0.5 * energies)
        atoms += self.bias
        return atoms if self.per_atom else inputs.per_frame(atoms)


class MappedSprings(Springs):
    """The same without operations in place, for transforms to go through."""

    mappable = True

    def forward(self, inputs):
        r = inputs.displacements.norm(dim=-1)
        z = inputs.atomic_numbers.to(r.dtype)
        energies = self.k.sum() * z[inputs.first] * z[inputs.second] * (1 - r / self.cutoff) ** 4
        return inputs.per_frame(torch.zeros_like(z).index_add(0, inputs.first, 0.5 * energies))


def by_hand(x, numbers, box=None, pbc=(False,) * 3, k=1.0, cutoff=0.4):
    """The energy of `Springs` [kJ/mol] by a sum over all pairs and images."""
    shifts = [
        np.array(s) for s in np.ndindex(7, 7, 7) if all(s[d] == 3 or pbc[d] for d in range(3))
    ]
    total = 0.25 * len(numbers)
    for i, zi in enumerate(numbers):
        for j, zj in enumerate(numbers):
            for s in shifts:
                moved = x[j] + (0.0 if box is None else (s - 3) @ np.asarray(box))
                r = np.linalg.norm(moved - x[i])
                if r < cutoff and (i != j or (s != 3).any()):
                    total += 0.5 * k * zi * zj * (1 - r / cutoff) ** 4
    return EV * total


NUMBERS = [8, 1, 1, 6, 1]
CELLS = {
    "open": (None, (False, False, False)),
    "triclinic": ([[0.9, 0, 0], [0.2, 0.85, 0], [-0.3, 0.1, 0.95]], (True, True, True)),
    "small": ([[0.35, 0, 0], [0.1, 0.4, 0], [0.0, 0.1, 0.38]], (True, True, True)),
    "left-handed": ([[0.3, 0.3, 0], [0.1, -0.4, 0.2], [-0.2, 0.15, -0.35]], (True, True, True)),
    "chain": ([[0.3, 0.1, 0], [0, 0.5, 0.1], [0.1, 0, 0.9]], (True, False, False)),
}


def atoms(seed=0, n=5):
    random = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double()[:n]
    return 0.15 * places + 0.05 * torch.rand(n, 3, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("model", ["atoms", "frames", "positions", "mapped"])
def test_energy_and_every_derivative(cell, model):
    box, pbc = CELLS[cell]
    kinds = {
        "atoms": Springs(),
        "frames": Springs(per_atom=False),
        "positions": Springs(through="positions"),
        "mapped": MappedSprings(),
    }
    potential = neural_potential(kinds[model], NUMBERS, pbc=pbc)
    x = atoms()
    h = None if box is None else torch.tensor(box, dtype=torch.float64)
    expected = by_hand(x.numpy(), NUMBERS, box, pbc)
    if model == "mapped":
        expected -= EV * 0.25 * len(NUMBERS)
    assert float(potential(x, h).detach()) == pytest.approx(expected, rel=1e-12)
    # Differences of the box step along reduced forms alone.
    if cell in ("open", "triclinic", "small"):
        check_potential(potential, x, h)
    moved = x + torch.tensor([3.0, -2.0, 5.0])
    torch.testing.assert_close(potential(moved, h), potential(x, h))


def test_the_kind_of_box_derivative():
    """Through displacements and through positions and cells it is the same."""
    box = torch.tensor(CELLS["left-handed"][0], dtype=torch.float64, requires_grad=True)
    slopes = []
    for through in ("displacements", "positions"):
        potential = neural_potential(Springs(through=through), NUMBERS, pbc=True)
        slopes.append(torch.autograd.grad(potential(atoms(), box), box)[0])
    torch.testing.assert_close(*slopes)


def test_particles_of_a_larger_system():
    picked = [4, 0, 2, 5, 3]
    potential = neural_potential(Springs(), NUMBERS, particles=picked, n_particles=8)
    x = atoms(n=8)
    alone = neural_potential(Springs(), NUMBERS)
    torch.testing.assert_close(potential(x), alone(x[picked]))
    forces = potential.forces(x)
    torch.testing.assert_close(forces[picked], alone.forces(x[picked]))
    assert forces[[1, 6, 7]].abs().max() == 0
    check_potential(potential, x)


def test_frames_of_a_batch_do_not_meet():
    potential = neural_potential(Springs(), NUMBERS, pbc=True)
    frames = torch.stack([atoms(seed) for seed in range(4)])
    boxes = torch.stack([(0.6 + 0.1 * i) * torch.eye(3, dtype=torch.float64) for i in range(4)])
    single = torch.stack([potential(f, b) for f, b in zip(frames, boxes, strict=True)])
    torch.testing.assert_close(potential(frames, boxes), single)
    forces = torch.stack([potential.forces(f, b) for f, b in zip(frames, boxes, strict=True)])
    torch.testing.assert_close(potential.forces(frames, boxes), forces)


def test_energies_of_particles():
    potential = neural_potential(Springs(), NUMBERS, particles=[1, 2, 3, 4, 6], n_particles=7)
    term = potential.term("neural")
    x = atoms(n=7)[None]
    values = term.parameter_values()
    shared = term.particle_energies(x, None, values, {})
    assert shared.shape == (1, 7) and shared[0, [0, 5]].abs().max() == 0
    torch.testing.assert_close(shared.sum(dim=1), potential(x))
    whole = NeuralTerm(Springs(per_atom=False), NUMBERS)
    with pytest.raises(InvalidInputError, match="not of atoms"):
        whole.particle_energies(atoms()[None], None, whole.parameter_values(), {})


# Transforms of torch.func ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Springs, MappedSprings])
@pytest.mark.parametrize("cell", ["open", "small"])
def test_transforms_agree_with_autograd(kind, cell):
    box, pbc = CELLS[cell]
    potential = neural_potential(kind(), NUMBERS, pbc=pbc)
    h = None if box is None else torch.tensor(box, dtype=torch.float64)
    frames = torch.stack([atoms(seed) for seed in range(3)])

    def energy(x):
        return potential(x, h)

    expected = torch.stack([energy(x) for x in frames])
    torch.testing.assert_close(torch.func.vmap(energy)(frames), expected)
    slopes = torch.func.vmap(torch.func.grad(energy))(frames)
    torch.testing.assert_close(slopes, -potential.forces(frames, h))
    x = frames[0]
    hessian = torch.autograd.functional.hessian(energy, x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(energy))(x), hessian)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.grad(energy))(x), hessian)
    torch.testing.assert_close(torch.func.hessian(energy)(x), hessian)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    value, change = torch.func.jvp(energy, (x,), (direction,))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(change, -(potential.forces(x, h) * direction).sum())
    # The third derivative along a direction, three times over.
    third = torch.autograd.functional.jvp(
        lambda y: torch.autograd.functional.hessian(energy, y, create_graph=True), x, direction
    )[1]
    found = torch.func.jvp(torch.func.hessian(energy), (x,), (direction,))[1]
    torch.testing.assert_close(found, third)


@pytest.mark.parametrize("kind", [Springs, MappedSprings])
def test_ensembles_of_weights(kind):
    """Many sets of parameters at once, as committees of models are evaluated."""
    potential = neural_potential(kind(), NUMBERS)
    x = atoms()
    many = {"neural.model.k": torch.tensor([[1.0, 0.0], [2.0, 0.5], [0.1, 0.1]]).double()}

    def energy(values):
        return torch.func.functional_call(potential, values, (x,))

    found = torch.func.vmap(energy)(many)
    offset = 0.0 if kind is MappedSprings else EV * 0.25 * len(NUMBERS)
    unit = (potential(x).detach() - offset) / 1.0
    expected = offset + unit * torch.tensor([1.0, 2.5, 0.2], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    slopes = torch.func.vmap(torch.func.grad(energy))(many)["neural.model.k"]
    torch.testing.assert_close(slopes, unit.expand(3, 2))


@pytest.mark.parametrize("kind", [Springs, MappedSprings])
def test_derivatives_of_every_frame(kind):
    potential = neural_potential(kind(), NUMBERS, pbc=True)
    frames = Frames(
        positions=torch.stack([atoms(seed) for seed in range(3)]),
        box=0.7 * torch.eye(3, dtype=torch.float64).expand(3, 3, 3),
    )
    names = ["neural.model.k"]
    found = frame_derivatives(potential, frames, names)
    torch.testing.assert_close(found.energies, potential(frames.positions, frames.box))
    torch.testing.assert_close(found.forces, potential.forces(frames.positions, frames.box))
    other = per_frame_gradients(potential, frames, names)
    torch.testing.assert_close(found.gradients, other)
    for i in range(3):
        energy = potential(frames.positions[i], frames.box[i])
        (slope,) = torch.autograd.grad(energy, potential.get_parameter(names[0]))
        torch.testing.assert_close(found.gradients[i], slope)


# Parameters -----------------------------------------------------------------------------------


def test_parameters_are_those_of_the_model():
    model = MessagePassingNetwork([1, 6, 8], 0.4, channels=4)
    potential = neural_potential(model, NUMBERS, name="peptide")
    names = {f"peptide.model.{name}" for name, _ in model.named_parameters()}
    assert {name for name, _ in potential.named_parameters()} == names == set(potential.units)
    x = atoms()
    before = potential(x).detach()
    state = potential.state_dict()
    with torch.no_grad():
        model.scale.mul_(3.0)
    assert not torch.allclose(potential(x), before)
    potential.load_state_dict(state)
    with torch.no_grad():
        model.scale.div_(1.0)
    potential.freeze("peptide.model.rounds.*")
    trainable = {name for name, p in potential.named_parameters() if p.requires_grad}
    assert trainable == {name for name in names if ".rounds." not in name}


def test_tied_weights():
    model = Springs()
    potential = neural_potential(model, NUMBERS)
    potential.tie("k", {"neural.model.k": (None, torch.tensor([1.0, 3.0]))}, value=0.2)
    x = atoms()
    expected = by_hand(x.numpy(), NUMBERS, k=0.8)
    assert potential(x).item() == pytest.approx(expected, rel=1e-12)
    potential(x).backward()
    slope = potential.get_parameter("tied.k").grad
    rest = expected - EV * 0.25 * len(NUMBERS)
    assert slope.item() == pytest.approx(rest / 0.2, rel=1e-10)
    assert model.k.grad is None or model.k.grad.abs().max() == 0


def test_buffers_move_and_count():
    model = Springs()
    potential = neural_potential(model, NUMBERS, dtype=torch.float32)
    assert potential(atoms()).dtype == torch.float32
    potential.to(torch.float64)
    before = potential(atoms()).item()
    model.bias.add_(1.0)
    assert potential(atoms()).item() == pytest.approx(before + EV * len(NUMBERS), rel=1e-12)
    assert "neural.model.bias" in potential.state_dict()
    assert not any("atomic_numbers" in key for key in potential.state_dict())


def test_copies_and_pickles():
    potential = neural_potential(MessagePassingNetwork([1, 6, 8], 0.4), NUMBERS)
    x = atoms()
    copies = [copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))]
    with torch.no_grad():
        before = potential(x)
        potential.get_parameter("neural.model.scale").mul_(2.0)
    for other in copies:
        torch.testing.assert_close(other(x).detach(), before)


def test_beside_other_terms():
    first, second = NeuralTerm(Springs(), NUMBERS), NeuralTerm(MappedSprings(), NUMBERS)
    potential = Potential({"one": first, "two": second}, n_particles=5)
    parts = potential.energy_by_term(atoms())
    torch.testing.assert_close(parts["one"] - parts["two"], parts["one"].new_tensor(EV * 1.25))
    torch.testing.assert_close(potential.only("two")(atoms()), parts["two"])


# What is refused ------------------------------------------------------------------------------


class Answers(AtomicModel):
    """Returns whatever it is told to."""

    def __init__(self, answer):
        super().__init__(cutoff=0.4)
        self.answer = answer

    def forward(self, inputs):
        return self.answer(inputs)


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda i: i.positions.sum(), InvalidInputError, "Tensor"),
        (lambda i: (i.positions.sum(-1), None), InvalidInputError, "tuple"),
        (lambda i: {"energy": 1.0}, InvalidInputError, "dict"),
        (lambda i: i.positions, InvalidInputError, r"\(5, 3\)"),
        (lambda i: i.positions.sum(-1)[:2], InvalidInputError, r"\(2,\)"),
        (lambda i: i.atomic_numbers, InvalidInputError, "Tensor"),
        (lambda i: i.positions.detach().sum(-1), UnsupportedDerivativeError, "detach"),
    ],
)
def test_answers_that_make_no_sense(answer, error, match):
    potential = neural_potential(Answers(answer), NUMBERS)
    with pytest.raises(error, match=match):
        potential(atoms().requires_grad_())


def test_a_cut_graph_is_found_under_transforms_too():
    potential = neural_potential(Answers(lambda i: i.positions.detach().sum(-1)), NUMBERS)
    with pytest.raises(UnsupportedDerivativeError, match="detach"):
        potential.forces(atoms())
    with torch.no_grad():
        assert math.isfinite(potential(atoms()).item())


@pytest.mark.parametrize("mappable", [False, True])
def test_weights_do_not_hide_a_cut_graph(mappable):
    """The energy has a graph of its weights, and forces would be zero without a word."""

    class Cut(Answers):
        def __init__(self, cut):
            super().__init__(lambda i: self.k * self.see(i.positions).sum(-1))
            self.k = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.see = torch.Tensor.detach if cut else torch.Tensor.sin
            self.open = mappable

        @property
        def mappable(self):
            return self.open

    cut = neural_potential(Cut(True), NUMBERS)
    with pytest.raises(UnsupportedDerivativeError, match="does not depend on positions"):
        cut.forces(atoms())
    with pytest.raises(UnsupportedDerivativeError, match="does not depend on positions"):
        cut(atoms().requires_grad_())
    cut(atoms()).backward()
    assert cut.get_parameter("neural.model.k").grad is not None
    whole = neural_potential(Cut(False), NUMBERS)
    torch.testing.assert_close(
        whole.forces(atoms()), -2 * atoms().cos().expand(5, 3), check_dtype=False
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": nn.Linear(1, 1)}, "cutoff = None"),
        ({"model": lambda inputs: 0.0}, "torch.nn.Module"),
        ({"model": Springs(cutoff=-1.0)}, "cutoff of -1.0"),
        ({"model": Springs(cutoff=math.inf)}, "cutoff of inf"),
        ({"model": Springs(elements=[1, 6])}, r"not \[8\]"),
        ({"atomic_numbers": []}, "atomic_numbers"),
        ({"atomic_numbers": [0, 1]}, "positive"),
        ({"atomic_numbers": [1.0, 2.0]}, "integers"),
        ({"atomic_numbers": [[1, 2]]}, "integers"),
        ({"atomic_numbers": ["O"]}, "whole numbers"),
        ({"particles": [0, 1]}, "particles"),
        ({"particles": [0, 1, 2, 3, 3]}, "different"),
        ({"particles": [0, 1, 2, 3, -1]}, "different"),
        ({"particles": [0, 1, 2, 3, 9], "n_particles": 9}, "n_particles: got 9"),
        ({"n_particles": 7}, "n_particles: got 7"),
        ({"pbc": (True, False)}, "pbc"),
    ],
)
def test_arguments_that_make_no_sense(arguments, match):
    with pytest.raises(InvalidInputError, match=match):
        neural_potential(**{"model": Springs(), "atomic_numbers": NUMBERS, **arguments})


def test_periodic_models_want_a_box():
    potential = neural_potential(Springs(), NUMBERS, pbc=(False, True, False))
    with pytest.raises(mdgraft.MissingBoxError):
        potential(atoms())


def test_models_that_want_reduced_cells():
    class Reduced(Springs):
        general_cell = False

    potential = neural_potential(Reduced(), NUMBERS, pbc=True)
    with pytest.raises(InvalidInputError, match="diagonal"):
        potential(atoms(), torch.tensor(CELLS["left-handed"][0], dtype=torch.float64))
