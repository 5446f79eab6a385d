"""The potential: names, selection, ties, checks of its input."""

import copy
import io

import mdgraft
import numpy as np
import openmm.unit
import pytest
import torch
from mdgraft.potentials import AbstractTerm, Potential

pytestmark = pytest.mark.filterwarnings("error")


class Springs(AbstractTerm):
    """Springs to the origin with a global scale: E = scale sum_i k_i r_i^2 / 2."""

    def __init__(self, k, scale_name=None, periodic=False):
        super().__init__(periodic=periodic)
        self.scale_name = scale_name
        self.add_parameter("k", torch.as_tensor(k, dtype=torch.float64), "kilojoule/mole")

    def forward(self, positions, box, values, global_values):
        """Energy of each frame."""
        energy = 0.5 * (values["k"] * (positions**2).sum(-1)).sum(-1)
        if self.periodic:
            energy = energy + box.diagonal(dim1=-2, dim2=-1).sum(-1)
        return energy * global_values[self.scale_name] if self.scale_name else energy


def make(periodic=False, **extra):
    terms = {
        "Anchor": Springs([1.0, 2.0, 3.0], periodic=periodic),
        "Spring": Springs([1.0, 1.0, 1.0], scale_name="training"),
    }
    shared = {"training": torch.tensor(0.5, dtype=torch.float64)}
    return Potential(terms, n_particles=3, global_parameters=shared, **extra)


X = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]], dtype=torch.float64)
BOX = torch.diag(torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64))


def test_names_units_and_energy():
    potential = make()
    assert {n: tuple(p.shape) for n, p in potential.named_parameters()} == {
        "Anchor.k": (3,),
        "Spring.k": (3,),
        "globals.training": (),
    }
    assert potential.units == {
        "Anchor.k": "kilojoule/mole",
        "Spring.k": "kilojoule/mole",
        "globals.training": "dimensionless",
    }
    assert potential.routes == {"Anchor": "native", "Spring": "native"}
    by_term = potential.energy_by_term(X)
    assert {name: e.item() for name, e in by_term.items()} == {"Anchor": 6.0, "Spring": 1.5}
    assert potential(X).item() == 7.5
    expected = -(torch.tensor([1.0, 2.0, 3.0]) + 0.5)[:, None] * X
    torch.testing.assert_close(potential.forces(X), expected)


@pytest.mark.parametrize(
    "name",
    ["forces", "globals", "train", "training", "units", "term_names", "_modules", "a.b", ""],
)
def test_names_that_a_term_cannot_have(name):
    with pytest.raises(mdgraft.InvalidInputError, match="is not free as the name of a term"):
        Potential({name: Springs([1.0])}, n_particles=1)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_names_that_a_global_parameter_cannot_have(name):
    with pytest.raises(mdgraft.InvalidInputError, match=r"global_parameters: .* replace it"):
        Potential({}, n_particles=1, global_parameters={name: torch.tensor(1.0)})


def test_no_terms_at_all():
    potential = Potential({}, n_particles=3)
    x = X.clone().requires_grad_()
    energy = potential(x.expand(2, 3, 3))
    energy.sum().backward()
    assert energy.tolist() == [0.0, 0.0]
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (0,)])
def test_leading_dimensions(leading):
    potential = make(periodic=True)
    energy = potential(X.expand(*leading, 3, 3), BOX)
    assert energy.shape == leading
    assert potential.forces(X.expand(*leading, 3, 3), BOX).shape == (*leading, 3, 3)


def test_forces_keep_a_graph_only_when_asked():
    potential = make()
    assert potential.forces(X).requires_grad
    with torch.no_grad():
        forces = potential.forces(X)
    assert not forces.requires_grad
    assert forces.abs().max() > 0


def test_accepts_arrays_and_casts_to_its_own_precision():
    potential = make(periodic=True)
    assert potential(X.numpy(), BOX.numpy()).item() == potential(X.float(), BOX.float()).item()
    single = make(periodic=True).to(torch.float32)
    assert single(X, BOX).dtype == torch.float32


def test_state_dict_and_copies():
    potential = make()
    with torch.no_grad():
        potential.get_parameter("Anchor.k").mul_(3)
    fresh = make()
    fresh.load_state_dict(potential.state_dict())
    assert fresh(X).item() == potential(X).item()
    assert copy.deepcopy(potential)(X).item() == potential(X).item()
    stream = io.BytesIO()
    torch.save(potential, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False)(X).item() == potential(X).item()


def test_freeze_and_unfreeze():
    potential = make()
    assert potential.freeze("*") is potential
    assert not any(p.requires_grad for p in potential.parameters())
    potential.unfreeze("Anchor.*", "globals.*")
    trainable = [n for n, p in potential.named_parameters() if p.requires_grad]
    assert trainable == ["Anchor.k", "globals.training"]
    with pytest.raises(mdgraft.InvalidInputError, match=r"'Bond\.\*' matches no parameter"):
        potential.freeze("Bond.*")


def test_some_terms_alone():
    potential = make().tie("all", {"Anchor.k": [0], "Spring.k": ...}, value=1.5)
    potential.tie("anchor", {"Anchor.k": [1, 2]}, value=2.0)
    part = potential.only("Spr*")
    assert part.term_names == ("Spring",)
    assert {*part.units} == {"Spring.k", "globals.training", "tied.all"}
    assert {n for n, _ in part.named_parameters()} == {*part.units}
    assert part(X).item() == potential.energy_by_term(X)["Spring"].item() == 0.5 * 0.75 * 6
    # Parameters are the same objects, and the potential itself has not changed.
    with torch.no_grad():
        part.get_parameter("tied.all").fill_(3.0)
    assert potential(X).item() == part(X).item() + potential.only("Anchor")(X).item()
    assert potential.term_names == ("Anchor", "Spring")
    assert potential.only("*", "Anchor")(X).item() == potential(X).item()
    with pytest.raises(mdgraft.InvalidInputError, match="'Bond' matches no term; there are"):
        potential.only("Bond")


def test_a_parameter_of_two_terms():
    spring = Springs([1.0, 2.0, 3.0])
    potential = Potential({"A": spring, "B": spring}, n_particles=3)
    assert [name for name, _ in potential.named_parameters()] == ["A.k"]
    k = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    values = potential.values({"A.k": k})
    energy = sum(potential.energy_by_term(X, values=values).values())
    (replaced,) = torch.autograd.grad(energy, k)
    (own,) = torch.autograd.grad(potential(X), spring.get_parameter("k"))
    torch.testing.assert_close(replaced, own)
    torch.testing.assert_close(own, X.square().sum(-1))


class AnyCell(Springs):
    general_cell = True


def test_any_cell_if_all_periodic_terms_take_it():
    oblique = torch.tensor([[0, 2.0, 0], [1.0, 0, 0], [9.0, 0, -1.0]]).double()
    terms = {"A": AnyCell([1.0, 1.0, 1.0], periodic=True), "B": Springs([1.0, 1.0, 1.0])}
    potential = Potential(terms, n_particles=3)
    assert potential.general_cell
    assert potential(X, oblique).item() == 6.0 - 1.0
    with pytest.raises(mdgraft.InvalidInputError, match="spans no volume"):
        potential(X, torch.ones(3, 3))
    mixed = Potential(terms | {"C": Springs([1.0, 1.0, 1.0], periodic=True)}, n_particles=3)
    assert not mixed.general_cell
    with pytest.raises(mdgraft.InvalidInputError, match="must be positive"):
        mixed(X, oblique)


class TestTies:
    def test_one_value_for_many_terms(self):
        potential = make().tie("k", {"Anchor.k": [0], "Spring.k": ...}, value=2.0)
        assert potential.values()["Anchor.k"].tolist() == [2.0, 2.0, 3.0]
        assert potential.values()["Spring.k"].tolist() == [2.0, 2.0, 2.0]
        assert potential.units["tied.k"] == "kilojoule/mole"
        energy = potential(X)
        energy.backward()
        tied = potential.get_parameter("tied.k")
        # dE/dk = r_0^2/2 + scale sum r_i^2/2
        assert tied.grad.item() == pytest.approx(0.5 * 1 + 0.5 * 0.5 * 6)
        assert potential.get_parameter("Spring.k").grad.abs().max() == 0
        assert potential.get_parameter("Anchor.k").grad.tolist() == [0.0, 2.0, 0.5]

    def test_factors_and_mask(self):
        mask = torch.tensor([True, False, True])
        potential = make().tie("k", {"Anchor.k": (mask, [1.0, 3.0])})
        assert potential.values()["Anchor.k"].tolist() == [1.0, 2.0, 3.0]
        with torch.no_grad():
            potential.get_parameter("tied.k").fill_(10.0)
        assert potential.values()["Anchor.k"].tolist() == [10.0, 2.0, 30.0]

    def test_survives_state_dict_precision_and_transforms(self):
        potential = make().tie("k", {"Spring.k": None})
        assert potential.to(torch.float32)(X).dtype == torch.float32
        values = {n: p.detach() for n, p in potential.named_parameters()}
        gradient = torch.func.grad(
            lambda v: torch.func.functional_call(potential, v, (X.float(),))
        )(values)
        assert gradient["tied.k"].item() == pytest.approx(0.5 * 0.5 * 6)
        potential.apply(lambda module: None)

    @pytest.mark.parametrize(
        ("label", "members", "message"),
        [
            ("k", {"Bond.k": ...}, "no parameter 'Bond.k'"),
            ("k", {"Anchor.k": ...}, "the tied entries differ .from 1 to 3.; pass value="),
            ("k", {"Anchor.k": [3]}, "indices reach from 3 to 3, the parameter has 3 entries"),
            ("k", {"Anchor.k": torch.ones(2, dtype=torch.bool)}, r"the mask has shape \(2,\)"),
            ("k", {"Anchor.k": "all"}, r"members\['Anchor.k'\]: got 'all', wanted None"),
            ("k", {"Anchor.k": [0.5]}, r"got \[0.5\], wanted None, ..., a boolean mask"),
            ("k", {"Anchor.k": [1, 1]}, "an entry is selected more than once"),
            ("k", {"Anchor.k": ([0, 1], [1.0, 1.0, 1.0])}, r"\(3,\) factors for 2 entries"),
            ("k", {"Anchor.k": []}, "no entry is selected"),
            ("k", {}, "no entry is selected"),
            ("a.b", {"Spring.k": ...}, "a tie needs a new name without dots"),
        ],
    )
    def test_mistakes(self, label, members, message):
        with pytest.raises(mdgraft.InvalidInputError, match=message):
            make().tie(label, members)

    @pytest.mark.parametrize("value", [float("nan"), torch.ones(3)])
    def test_values_that_a_tie_cannot_have(self, value):
        with pytest.raises(mdgraft.InvalidInputError, match="value: .* wanted one finite number"):
            make().tie("k", {"Anchor.k": ...}, value=value)

    def test_an_entry_is_tied_once(self):
        potential = make().tie("k", {"Spring.k": [0, 1]})
        with pytest.raises(mdgraft.InvalidInputError, match="already tied as 'k'"):
            potential.tie("other", {"Spring.k": [1]})
        with pytest.raises(mdgraft.InvalidInputError, match="got 'k'; a tie needs a new name"):
            potential.tie("k", {"Spring.k": [2]})


NAN = X.clone()
NAN[1, 2] = torch.nan
TILTED = BOX.clone()
TILTED[1, 0] = 2.0
UPPER = BOX.clone()
UPPER[0, 1] = 0.5

BAD_INPUT = {
    "positions-shape": ((X[:2], BOX), r"positions: got shape \(2, 3\), wanted \(..., 3, 3\)"),
    "positions-flat": ((X.flatten(), BOX), r"positions: got shape \(9,\)"),
    "positions-nan": ((NAN, BOX), "positions: NaN or infinity at particle 1 of frame 0"),
    "positions-text": (("water", BOX), "positions: cannot be read as numbers in nm"),
    "positions-complex": ((X + 0j, BOX), "positions: got dtype torch.complex128"),
    "positions-unit": ((X.numpy() * openmm.unit.kelvin, BOX), "positions: .*unit is kelvin"),
    "box-missing": ((X,), "box: got None, but this potential is periodic"),
    "box-lengths": ((X, torch.ones(3)), r"box: got shape \(3,\).*use torch.diag"),
    "box-frames": ((X, BOX.expand(2, 3, 3)), r"box: leading shape \(2,\) does not broadcast"),
    "box-nan": ((X, BOX * torch.nan), "box: holds NaN or infinity"),
    "box-negative": ((X, -BOX), "box: diagonal .* must be positive"),
    "box-tilted": ((X, TILTED), "is not in reduced form"),
    "box-upper": ((X, UPPER), "is not in reduced form"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    arguments, message = BAD_INPUT[name]
    potential = make(periodic=True)
    for evaluate in (potential, potential.forces, potential.energy_by_term):
        with pytest.raises(mdgraft.InvalidInputError, match=message):
            evaluate(*arguments)


def test_bad_input_inside_transforms():
    potential = make(periodic=True)
    with pytest.raises(mdgraft.InvalidInputError, match="NaN or infinity at particle 1"):
        torch.vmap(lambda x: potential(x, BOX))(torch.stack([X, NAN]))
    with pytest.raises(mdgraft.InvalidInputError, match="NaN or infinity at particle 1"):
        torch.func.grad(lambda x: potential(x, BOX))(NAN)


def test_missing_box_has_its_own_type():
    with pytest.raises(mdgraft.MissingBoxError, match="getPeriodicBoxVectors"):
        make(periodic=True)(X)


def test_unknown_host():
    with pytest.raises(mdgraft.UnsupportedHostError, match=r"no adapter for builtins.dict; there"):
        mdgraft.graft({})


def test_unknown_term():
    with pytest.raises(mdgraft.InvalidInputError, match="no term 'globals'"):
        make().term("globals")


def test_positions_on_another_device_are_refused():
    with pytest.raises(mdgraft.InvalidInputError, match="is on meta, the potential on cpu"):
        make()(torch.empty(3, 3, device="meta"))


def test_numpy_scalars_do_not_leak():
    assert isinstance(make()(np.asarray(X)), torch.Tensor)


@pytest.mark.gpu
def test_on_a_gpu():
    potential = make(periodic=True).to("cuda")
    energy = potential(X.cuda(), BOX.cuda())
    assert energy.device.type == "cuda"
    assert energy.item() == pytest.approx(make(periodic=True)(X, BOX).item())


def test_ties_that_are_loaded_or_copied_reach_their_own_entries():
    """Two potentials of one structure, whose ties of one name control different entries."""

    def tied(entries):
        potential = make()
        potential.tie("both", {"Anchor.k": torch.tensor(entries)}, value=50.0)
        return potential

    first, second = tied([0, 1]), tied([1, 2])
    energies = first(X), second(X)
    assert not torch.isclose(*energies)
    copied = copy.deepcopy(first)
    assert torch.equal(copied(X), energies[0])
    for potential in (first, copied):
        potential.load_state_dict(second.state_dict())
        assert torch.equal(potential(X), energies[1])
