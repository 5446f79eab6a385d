"""The reference network: its basis, its symmetries, and its files."""

import math
import pickle

import pytest
import torch
from mdgraft import InvalidInputError, UntrustedInputError
from mdgraft.neural import MessagePassingNetwork, ModelUnits, neural_potential
from mdgraft.neural.network import radial_basis
from mdgraft.testing import check_model

NUMBERS = [8, 1, 1, 6, 1, 1, 1, 1]


def configuration(seed=0):
    """Eight atoms, no two of them too close."""
    random = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(*[torch.arange(2.0)] * 3).double()
    return 0.16 * places + 0.03 * torch.rand(8, 3, generator=random, dtype=torch.float64)


def network(**options):
    return MessagePassingNetwork([1, 6, 8], 0.3, **{"channels": 4, "radial": 4, **options})


CELLS = {
    "open": (None, (False, False, False)),
    "triclinic": ([[0.7, 0, 0], [0.2, 0.8, 0], [-0.3, 0.1, 0.75]], (True, True, True)),
    "small and left-handed": ([[0.2, 0.3, 0], [0.1, -0.4, 0.2], [-0.2, 0.15, -0.35]], (True,) * 3),
    "slab": ([[0.4, 0.1, 0], [0, 0.45, 0.1], [0.1, 0, 2.0]], (True, True, False)),
}


@pytest.mark.parametrize("cell", CELLS)
def test_symmetries(cell):
    box, pbc = CELLS[cell]
    report = check_model(network(), configuration(), box, NUMBERS, pbc=pbc)
    skipped = {check.name for check in report.checks if check.status == "skipped"}
    assert skipped == ({"lattice", "box derivative"} if box is None else {"torque"})


def test_symmetries_in_single_precision():
    model = network(dtype=torch.float32)
    report = check_model(model, configuration(), None, NUMBERS, dtype=None)
    assert report["rotation"].status == "passed"
    assert next(model.parameters()).dtype == torch.float32


def test_two_rounds_see_further_than_one():
    """The ends of a chain of four share no neighbour, but their neighbours are neighbours."""
    x = torch.tensor([[0.2 * i, 0, 0] for i in range(4)], dtype=torch.float64)
    for rounds, reaches in ((1, False), (2, True)):
        potential = neural_potential(network(rounds=rounds), [8, 6, 6, 1])
        moved = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(potential(moved), moved, create_graph=True)
        (mixed,) = torch.autograd.grad(slope[0, 0], moved)
        assert (abs(float(mixed[3, 0])) > 1e-8) == reaches


def test_basis_fades_twice_differentiably():
    x = torch.tensor([0.999999, 1.0, 1.000001], dtype=torch.float64, requires_grad=True)
    values = radial_basis(0.5 * x, 0.5, 3)
    (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    for derivative in (values.detach(), slope.detach(), curve):
        assert derivative.abs().max() < 1e-3
    # The closed form in the middle: e(1/2) sin(k pi/2)/(pi/2).
    envelope = 1 - 28 / 2**6 + 48 / 2**7 - 21 / 2**8
    expected = [envelope * math.sin(k * math.pi / 2) * 2 / math.pi for k in (1, 2, 3)]
    found = radial_basis(torch.tensor([0.25], dtype=torch.float64), 0.5, 3)[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-6])
def test_finite_where_atoms_meet(apart):
    x = configuration()
    x[1] = x[0] + apart
    potential = neural_potential(network(), NUMBERS)
    assert torch.isfinite(potential.forces(x)).all()


def test_isolated_atoms_have_the_energy_of_their_elements():
    model = network(channels=4)
    with torch.no_grad():
        model.shift.copy_(torch.tensor([1.0, 10.0, 100.0]))
    potential = neural_potential(model, [1, 6, 8, 8])
    x = torch.arange(4.0).double()[:, None].expand(4, 3)
    with torch.no_grad():
        single = [neural_potential(model, [z])(torch.zeros(1, 3)) for z in (1, 6, 8)]
    expected = single[0] + single[1] + 2 * single[2]
    torch.testing.assert_close(potential(x).detach(), expected)
    assert abs(float(single[2]) - 100.0) < 10.0


def test_seed_fixes_the_weights_and_nothing_else():
    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    first, second, third = network(seed=1), network(seed=1), network(seed=2)
    assert torch.equal(torch.rand(1), before)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), third.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 0 or name == "shift" or not torch.equal(a, c), name


def test_normalize():
    model = network()
    energies = torch.tensor([-160.0, -144.0])
    forces = torch.full((2, 8, 3), 500.0)
    model.normalize(NUMBERS, energies, forces)
    torch.testing.assert_close(model.shift.detach(), torch.full((3,), -19.0).double())
    assert model.scale.item() == pytest.approx(0.1 * 0.3 * 500.0)


@pytest.mark.parametrize("units", [ModelUnits(), ModelUnits("angstrom", "eV"), ModelUnits(0.2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files(tmp_path, units, dtype):
    model = network(units=units, dtype=dtype, rounds=3)
    model.save(tmp_path / "model.pt")
    loaded = MessagePassingNetwork.load(tmp_path / "model.pt")
    assert loaded.units == units and loaded.options == model.options
    x = configuration()
    expected = neural_potential(model, NUMBERS)(x)
    assert torch.equal(neural_potential(loaded, NUMBERS)(x), expected)
    other = MessagePassingNetwork.load(tmp_path / "model.pt", dtype=torch.float64)
    assert next(other.parameters()).dtype == torch.float64


class _Code:
    def __reduce__(self):
        return print, ("code from a file runs",)


def test_files_that_hold_code_are_refused(tmp_path, capsys):
    path = tmp_path / "model.pt"
    with open(path, "wb") as stream:
        pickle.dump(_Code(), stream, protocol=2)
    with pytest.raises((UntrustedInputError, InvalidInputError), match="path"):
        MessagePassingNetwork.load(path)
    torch.save({"format": "mdgraft.neural.MessagePassingNetwork", "options": _Code()}, path)
    with pytest.raises(UntrustedInputError, match="would run code"):
        MessagePassingNetwork.load(path)
    assert capsys.readouterr().out == ""


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(InvalidInputError, match="cannot read"):
        MessagePassingNetwork.load(path)
    path.write_text("no weights")
    with pytest.raises((InvalidInputError, UntrustedInputError), match="path"):
        MessagePassingNetwork.load(path)
    torch.save(network().state_dict(), path)
    with pytest.raises(InvalidInputError, match="load_state_dict"):
        MessagePassingNetwork.load(path)
    stored = {"format": "mdgraft.neural.MessagePassingNetwork", "version": 99}
    torch.save(stored, path)
    with pytest.raises(InvalidInputError, match="version 99"):
        MessagePassingNetwork.load(path)
    model = network()
    model.save(path)
    stored = torch.load(path, weights_only=True)
    stored["options"]["rounds"] = 3
    torch.save(stored, path)
    with pytest.raises(InvalidInputError, match="do not fit"):
        MessagePassingNetwork.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("options"),
        lambda stored: stored.pop("state"),
        lambda stored: stored.update(options=3),
        lambda stored: stored.update(state=[1]),
        lambda stored: stored["options"].pop("length"),
        lambda stored: stored["options"].pop("cutoff"),
        lambda stored: stored["options"].update(other=1),
        lambda stored: stored["options"].update(channels=10**6),
        lambda stored: stored["options"].update(channels="many"),
        lambda stored: stored["options"].update(elements=3),
        lambda stored: stored["state"].update({"embedding.weight": 1}),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "model.pt"
    network().save(path)
    stored = torch.load(path, weights_only=True)
    damage(stored)
    torch.save(stored, path)
    with pytest.raises(InvalidInputError, match=f"path: {path} has options that make no sense"):
        MessagePassingNetwork.load(path)


def test_normalize_knows_its_elements():
    model = network()
    before = model.shift.clone()
    energies, forces = torch.ones(2), torch.ones(2, 2, 3)
    with pytest.raises(InvalidInputError, match=r"got \[26\]"):
        model.normalize([1, 26], energies, forces)
    with pytest.raises(InvalidInputError, match="forces: wanted finite"):
        model.normalize([1, 1], energies, forces * torch.nan)
    assert torch.equal(model.shift, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"elements": []}, "elements"),
        ({"elements": [0]}, "elements"),
        ({"elements": [119]}, "elements"),
        ({"cutoff": 0.0}, "cutoff"),
        ({"cutoff": math.inf}, "cutoff"),
        ({"channels": 0}, "channels"),
        ({"rounds": 0}, "rounds"),
        ({"radial": -1}, "radial"),
    ],
)
def test_sizes_that_make_no_sense(options, named):
    arguments = {"elements": [1], "cutoff": 0.5, **options}
    with pytest.raises(InvalidInputError, match=named):
        MessagePassingNetwork(**arguments)


@pytest.mark.parametrize(
    ("length", "energy", "match"),
    [("foot", 1.0, "foot"), (1.0, "calorie", "calorie"), (0.0, 1.0, "0.0"), (1.0, -1.0, "-1.0")],
)
def test_units_that_make_no_sense(length, energy, match):
    with pytest.raises(InvalidInputError, match=match):
        ModelUnits(length, energy)


def test_units_by_name():
    assert ModelUnits("Angstrom", "eV").nanometers == 0.1
    assert ModelUnits("nm", "eV").kilojoules == pytest.approx(96.485332, rel=1e-7)
    assert ModelUnits("bohr", "hartree").kilojoules == pytest.approx(
        27.211386246 * ModelUnits("nm", "eV").kilojoules, rel=1e-9
    )
