"""Calculators of packages that are installed, beside the models that are taken out of them."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import mdgraft
import mdgraft_ase
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers
from mdgraft.neural import MatGLModel, neural_potential
from mdgraft.testing import check_potential
from mdgraft_ase._units import ANGSTROM, EV

#: They warn of much that is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

SYMBOLS = ("H", "O", "Na", "Cl")


def _package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed")


def chgnet() -> Any:
    """The trained model that the package brings along."""
    dynamics = _package("chgnet.model.dynamics")
    return dynamics.CHGNetCalculator(use_device="cpu", on_isolated_atoms="ignore")


def _matgl(kind: str, **options: Any) -> Any:
    models, pes = _package("matgl.models"), _package("matgl.apps.pes")
    torch.manual_seed(0)
    model = getattr(models, kind)(element_types=SYMBOLS, is_intensive=False, **options)
    potential = pes.Potential(
        model,
        data_mean=torch.tensor(0.3),
        data_std=torch.tensor(2.0),
        element_refs=np.arange(1.0, 1.0 + len(SYMBOLS)),
    ).eval()
    calculators = _package("matgl.ext.ase")
    return calculators.PESCalculator(potential, stress_unit="eV/A3", use_voigt=True)


def m3gnet() -> Any:
    sizes = dict.fromkeys(("units", "dim_node_embedding", "dim_edge_embedding"), 8)
    return _matgl("M3GNet", use_smooth=True, nblocks=2, **sizes)


def tensornet() -> Any:
    return _matgl("TensorNet", units=8, num_rbf=8, use_warp=False)


def so3net() -> Any:
    return _matgl("SO3Net", lmax=2, nmax=3)


def sevennet() -> Any:
    """A trained model of two data sets that the package brings along."""
    _package("sevenn.calculator")
    spec = importlib.util.find_spec("sevenn")
    assert spec is not None and spec.origin is not None
    folder = pathlib.Path(spec.origin).parent / "pretrained_potentials" / "SevenNet_MF_0"
    model = folder / "checkpoint_sevennet_mf_0.pth"
    if not model.exists():
        pytest.skip("this version of sevenn brings no SevenNet-MF-0 along")
    return _package("sevenn.calculator").SevenNetCalculator(model, modal="R2SCAN", device="cpu")


CALCULATORS: list[Callable[[], Any]] = [chgnet, m3gnet, tensornet, so3net, sevennet]


def _crystal() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.rattle(0.08, seed=1)
    strain = 0.03 * np.random.default_rng(0).normal(size=(3, 3))
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def _molecule() -> Atoms:
    places = [[0, 0, 0.1], [0.9, 0.1, 0.3], [0.1, 1.2, 0], [2.3, 1.2, 0.8]]
    return Atoms("H2OCl", positions=places)


@pytest.mark.parametrize(
    ("make", "structure"),
    [(make, _crystal) for make in CALCULATORS]
    # The calculator of CHGNet takes crystals alone.
    + [(make, _molecule) for make in CALCULATORS if make is not chgnet],
)
def test_agrees_with_its_calculator(
    make: Callable[[], Any], structure: Callable[[], Atoms]
) -> None:
    atoms = structure()
    atoms.calc = make()
    # Calculators compute in single precision.
    potential = mdgraft.graft(atoms, route="native")
    assert set(potential.routes.values()) == {"native"}
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-6)
    forces = atoms.get_forces() * EV / ANGSTROM
    scale = np.abs(forces).max()
    np.testing.assert_allclose(potential.forces(x, h).detach(), forces, atol=1e-5 * scale)
    if h is not None:
        stress = mdgraft_ase.stress(potential, atoms)
        wanted = atoms.get_stress()
        np.testing.assert_allclose(stress, wanted, atol=1e-5 * np.abs(wanted).max())
    # Second derivatives, boxes, batches and transforms.
    check_potential(potential, x, h)


@pytest.mark.parametrize("make", CALCULATORS)
def test_gradients_in_parameters(make: Callable[[], Any]) -> None:
    atoms = _crystal()
    atoms.calc = make()
    potential = mdgraft.graft(atoms, route="native")
    x, h = mdgraft_ase.positions_and_box(atoms)
    parameters = {n: p for n, p in potential.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(potential(x, h), list(parameters.values()), allow_unused=True)
    known = {n: g for n, g in zip(parameters, slopes, strict=True) if g is not None and g.any()}
    assert len(known) > 5
    random = torch.Generator().manual_seed(0)
    along = {
        n: torch.randn(g.shape, generator=random, dtype=g.dtype) * parameters[n].detach().abs()
        for n, g in known.items()
    }
    predicted = sum(float((known[n] * along[n]).sum()) for n in known)

    def energy(t: float) -> float:
        with torch.no_grad():
            moved = {n: parameters[n] + t * step for n, step in along.items()}
            terms = potential.energy_by_term(x, h, values=potential.values(moved))
            return float(sum(terms.values()))

    step = 1e-4
    rough = (energy(step) - energy(-step)) / (2 * step)
    change = (4 * rough - (energy(2 * step) - energy(-2 * step)) / (4 * step)) / 3
    assert change == pytest.approx(predicted, rel=1e-5)


@pytest.mark.parametrize("make", CALCULATORS)
def test_write_back(make: Callable[[], Any]) -> None:
    """The calculator's own model gets the values of the potential, and follows them."""
    atoms = _crystal()
    atoms.calc = make()
    before = atoms.get_potential_energy()
    potential = mdgraft.graft(atoms, route="native")
    x, h = mdgraft_ase.positions_and_box(atoms)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.05)
    mdgraft_ase.write_parameters(potential, atoms)
    atoms.calc.reset()
    after = atoms.get_potential_energy()
    assert abs(after - before) > 1e-3 * abs(before)
    assert after * EV == pytest.approx(float(potential(x, h).detach()), rel=1e-5)


def test_nuclear_repulsion_of_matgl() -> None:
    """Ziegler, Biersack and Littmark's, cut off; the package's own calculator cannot have it."""
    pes, cutoffs = _package("matgl.apps.pes"), _package("matgl.utils.cutoff")
    atoms = _molecule()
    inner = tensornet().potential.model
    elements = [atomic_numbers[symbol] for symbol in SYMBOLS]
    x = atoms.positions * ANGSTROM
    energies = []
    for repulsion in (False, True):
        potential = pes.Potential(inner, calc_repuls=repulsion).eval().double()
        model = neural_potential(MatGLModel(potential, elements), atoms.numbers)
        energies.append(float(model(x).detach()))
    expected = 0.0
    for i, j in itertools.combinations(range(len(atoms)), 2):
        z1, z2 = (int(atoms.numbers[k]) for k in (i, j))
        r = float(np.linalg.norm(atoms.positions[i] - atoms.positions[j]))
        s = r * (z1**0.23 + z2**0.23) / (0.8854 * 0.5291772105638411)
        terms = [(0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162)]
        screening = sum(c * np.exp(-b * s) for c, b in terms) / sum(c for c, _ in terms)
        inside = float(
            cutoffs.polynomial_cutoff(torch.tensor(r, dtype=torch.float64), inner.cutoff)
        )
        expected += 14.399645351950548 * z1 * z2 / r * screening * inside
    assert expected > 1.0
    assert energies[1] - energies[0] == pytest.approx(expected * EV, rel=1e-5)


def test_elements_of_matgl_are_known_by_their_symbols() -> None:
    atoms = _crystal()
    atoms.calc = tensornet()
    model = mdgraft.graft(atoms, route="native").get_submodule("PESCalculator").model
    assert model.elements == tuple(atomic_numbers[symbol] for symbol in SYMBOLS)
