"""Grafts of ASE's force fields: tables, bond orders, rigid molecules, lists."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import mdgraft
import mdgraft_ase
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.eam import EAM
from ase.calculators.fd import calculate_numerical_forces
from ase.calculators.ff import ForceField
from ase.calculators.tersoff import Tersoff
from ase.utils.ff import Angle
from ase_graft_force_fields import CASES
from mdgraft.kernels.external import FOUR_POINTS
from mdgraft.testing import check_potential, finite_difference
from mdgraft_ase._units import ANGSTROM, EV
from mdgraft_ase.forms.table import FORMS

# With analytic stress of ASE's own.
STRESS = [name for name in CASES if name.startswith(("eam", "nickel", "silicon"))]
# Constants of ASE's modules, which no calculator has its own of.
CONSTANTS = {"charge", "sigma", "epsilon", "offset"}


@pytest.mark.parametrize("name", CASES)
def test_energy_and_forces_are_those_of_ase(name: str) -> None:
    atoms = CASES[name]()
    potential = mdgraft.graft(atoms, route="native")
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert abs(energy) > 0.1
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-10)
    wanted = atoms.get_forces() * EV / ANGSTROM
    found = potential.forces(x, h).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10 * max(1.0, abs(wanted).max()))
    numerical = calculate_numerical_forces(atoms, eps=1e-4) * EV / ANGSTROM
    np.testing.assert_allclose(found, numerical, rtol=0, atol=1e-4 * max(1.0, abs(wanted).max()))


@pytest.mark.parametrize("name", [n for n in STRESS if n != "silicon_dimer"])
def test_stress_is_that_of_ase(name: str) -> None:
    atoms = CASES[name]()
    potential = mdgraft.graft(atoms)
    np.testing.assert_allclose(
        mdgraft_ase.stress(potential, atoms), atoms.get_stress(), rtol=1e-9, atol=1e-12
    )
    assert mdgraft_ase.stress(potential, atoms, voigt=False).shape == (3, 3)


@pytest.mark.parametrize("direction", [0, 1, 2])
@pytest.mark.parametrize(
    ("cos", "a0"), [(False, 0.0), (False, np.pi), (True, 0.0), (True, np.pi), (True, 1.9)]
)
def test_straight_angles_have_a_stiffness(cos: bool, a0: float, direction: int) -> None:
    arms = np.roll([[0.0, 0.0, 0.0], [1.16, 0.0, 0.0], [-1.3, 0.0, 0.0]], direction, axis=1)
    atoms = Atoms("CO2", positions=arms, cell=[9.0] * 3)
    atoms.calc = ForceField(angles=[Angle(1, 0, 2, k=3.0, a0=a0, cos=cos)])
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    hessian = torch.func.hessian(lambda moved: potential(moved, h))(x)
    step = 1e-5
    for k in range(3):
        moved = torch.zeros_like(x)
        moved[0, k] = step
        ahead, behind = potential.forces(x + moved, h), potential.forces(x - moved, h)
        torch.testing.assert_close(
            hessian[0, k], -(ahead - behind) / (2 * step), rtol=1e-5, atol=0.05
        )
    # Only (cos a - cos pi)**2 is of the fourth order.
    assert bool((hessian[0].abs() > 1e3).any()) == (not cos or a0 != np.pi)


@pytest.mark.parametrize("m", [1.0, 2.0, 3.0])
def test_third_derivatives_of_bonds_of_equal_length(m: float) -> None:
    # In a crystal the exponent (lambda3 (r_ij - r_ik))**m is a power of zero.
    atoms = bulk("Si")
    crystal = dataclasses.replace(CASES["silicon"]().calc.parameters["Si", "Si", "Si"], m=m)
    atoms.calc = Tersoff({("Si", "Si", "Si"): crystal})
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)

    def along(t: torch.Tensor) -> torch.Tensor:
        strain = torch.eye(3, dtype=h.dtype) + t * torch.tensor(
            [[0.3, 0.1, 0.0], [0.0, -0.2, 0.4], [0.2, 0.0, 0.1]], dtype=h.dtype
        )
        return potential(x @ strain, h @ strain)

    second = torch.func.grad(torch.func.grad(along))
    found = float(torch.func.grad(second)(torch.zeros((), dtype=h.dtype)).detach())
    step = 1e-4
    ends = [float(second(torch.tensor(t * step, dtype=h.dtype)).detach()) for t in (1.0, -1.0)]
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", ["silicon", "silicon_and_germanium", "silicon_dimer"])
def test_energies_of_atoms(name: str) -> None:
    atoms = CASES[name]()
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    term = potential.term("Tersoff")
    found = term.particle_energies(
        x[None], None if h is None else h[None], term.parameter_values(), {}
    )
    np.testing.assert_allclose(
        found[0].detach(), atoms.get_potential_energies() * EV, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", CASES)
def test_consistent_with_itself(name: str) -> None:
    atoms = CASES[name]()
    potential = mdgraft.graft(atoms)
    check_potential(potential, *mdgraft_ase.positions_and_box(atoms), float32_rtol=3e-3)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_by_parameters_and_write_back(name: str) -> None:
    atoms = CASES[name]()
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    before = atoms.get_potential_energy()
    mdgraft_ase.write_parameters(potential, atoms)
    assert atoms.get_potential_energy() == before
    named = dict(potential.named_parameters())
    gradients = torch.autograd.grad(potential(x, h), list(named.values()))
    random = torch.Generator().manual_seed(8)
    writable = {
        key: value
        for key, value in named.items()
        if name == "ions" or key.rpartition(".")[2] not in CONSTANTS
    }
    assert writable
    for (key, parameter), gradient in zip(named.items(), gradients, strict=True):
        if key not in writable:
            continue
        direction = 1e-4 * torch.randn(parameter.shape, generator=random).double()
        direction = direction * parameter.detach()

        energies = []
        for t, _ in FOUR_POINTS:
            other = atoms.copy()
            other.calc = copy.deepcopy(atoms.calc)
            with torch.no_grad():
                parameter.add_(t * direction)
                mdgraft_ase.write_parameters(potential, other)
                parameter.sub_(t * direction)
            energies.append(float(other.get_potential_energy()) * EV)
        truth = sum(weight * e for (_, weight), e in zip(FOUR_POINTS, energies, strict=True))
        found = float((gradient * direction).sum())
        scale = float((gradient * direction).abs().sum())
        rounding = 1e-14 * abs(before) * EV
        assert abs(found - truth) <= 1e-6 * scale + 100 * rounding, key


@pytest.mark.parametrize("name", ["water", "water_of_four_sites"])
def test_derivatives_by_constants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = CASES[name]()
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    named = dict(potential.named_parameters())
    gradients = dict(
        zip(named, torch.autograd.grad(potential(x, h), list(named.values())), strict=True)
    )
    module: Any = __import__(type(atoms.calc).__module__, fromlist=["qH"])
    for constant, parameter in (("qH", "charge"), ("sigma0", "sigma"), ("epsilon0", "epsilon")):
        present = getattr(module, constant)

        def energy(t: float, constant: str = constant, present: float = present) -> float:
            other = atoms.copy()
            other.calc = type(atoms.calc)(rc=atoms.calc.rc)
            with monkeypatch.context() as patch:
                patch.setattr(module, constant, present * (1 + t))
                return float(other.get_potential_energy()) * EV

        truth = finite_difference(energy, step=1e-3)
        (key,) = [k for k in named if k.endswith(f".{parameter}")]
        found = float((gradients[key] * named[key].detach()).sum())
        assert found == pytest.approx(truth.value, rel=1e-7, abs=10 * truth.error)


def test_what_ase_would_refuse_is_refused() -> None:
    water = CASES["water"]()
    water.set_cell([8.0, 20.0, 20.0])
    with pytest.raises(mdgraft.InvalidInputError, match="at least two cutoffs"):
        mdgraft.graft(water)
    mixed = CASES["water"]()
    mixed.numbers[4] = 8
    with pytest.raises(mdgraft.InvalidInputError, match="in the sequence of numbers"):
        mdgraft.graft(mixed)
    acetonitrile = CASES["acetonitrile"]()
    acetonitrile.numbers[4] = 8
    with pytest.raises(mdgraft.InvalidInputError, match="in the sequence Me C N"):
        mdgraft.graft(acetonitrile)
    alloy = CASES["eam alloy"]()
    alloy.numbers[0] = 29
    with pytest.raises(mdgraft.InvalidInputError, match="no functions for Cu; it knows Al, Ni"):
        mdgraft.graft(alloy)
    silicon = CASES["silicon"]()
    silicon.numbers[0] = 6
    with pytest.raises(mdgraft.InvalidInputError, match="no parameters for"):
        mdgraft.graft(silicon)
    listed = CASES["listed_molecule"]()
    listed.set_cell(None)
    with pytest.raises(mdgraft.InvalidInputError, match="wants a cell with a volume"):
        mdgraft.graft(listed)


def test_what_has_no_torch_form_goes_by_the_host() -> None:
    alloy = CASES["eam alloy"]()
    spline = alloy.calc.phi[0, 0]
    alloy.calc.phi[0, 0] = lambda r: spline(r)
    with pytest.raises(mdgraft.UnsupportedForceError, match="phi_Al_Al is a function"):
        mdgraft.graft(alloy, route="native")
    potential = mdgraft.graft(alloy)
    assert potential.routes == {"EAM": "host"}
    native = mdgraft.graft(CASES["eam alloy"]())
    x, h = mdgraft_ase.positions_and_box(alloy)
    torch.testing.assert_close(potential.forces(x, h), native.forces(x, h), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("form", ["alloy", "eam"])
def test_tables_from_files(form: str, tmp_path: Path) -> None:
    r, rho = np.arange(80) * 0.075, np.arange(60) * 0.8
    fade = np.clip(1 - r / 5.5, 0, None) ** 2
    density, rphi = 2.0 * np.exp(-0.8 * r) * fade, 9.0 * r * np.exp(-1.5 * r) * fade
    columns = [-1.1 * np.sqrt(rho + 0.2), density, rphi]
    if form == "eam":
        # Effective charges, in the order embedding, charge, density.
        columns = [columns[0], np.sqrt(rphi / (units.Bohr * units.Hartree)), density]
        head = "test\n29 63.5 3.6 fcc\n60 0.8 80 0.075 5.5\n"
    else:
        head = "test\n\n\n1 Cu\n60 0.8 80 0.075 5.5\n29 63.5 3.6 fcc\n"
    numbers = "\n".join(f"{x:.15e}" for column in columns for x in column)
    path = tmp_path / f"Cu.{form}"
    path.write_text(head + numbers + "\n", encoding="utf-8")
    atoms = bulk("Cu") * (2, 1, 1)
    atoms.rattle(0.1, seed=1)
    atoms.calc = EAM(potential=str(path))
    potential = mdgraft.graft(atoms, route="native")
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-10)
    np.testing.assert_allclose(
        potential.forces(x, h).detach(), atoms.get_forces() * EV / ANGSTROM, atol=1e-7
    )
    check_potential(potential, x, h)


def test_every_form_is_described() -> None:
    page = Path(__file__).parents[2] / "docs/forces/atomistic.md"
    text = page.read_text(encoding="utf-8")
    assert [cls.__name__ for cls in FORMS if f"`{cls.__name__}`" not in text] == []


def test_constants_cannot_be_written() -> None:
    atoms = CASES["water"]()
    potential = mdgraft.graft(atoms)
    with torch.no_grad():
        potential.term("TIP3P").charge.mul_(1.1)
    with pytest.raises(mdgraft.ParameterMismatchError, match="TIP3P.charge: is a constant of ASE"):
        mdgraft_ase.write_parameters(potential, atoms)
