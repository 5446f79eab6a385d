"""Sums of calculators, write-back, and calculators around torch models."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import mdgraft
import mdgraft_ase
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.harmonic import HarmonicCalculator, HarmonicForceField, SpringCalculator
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import (
    AverageCalculator,
    LinearCombinationCalculator,
    MixedCalculator,
    SumCalculator,
)
from ase.calculators.morse import MorsePotential
from ase.calculators.qmmm import SimpleQMMM
from ase_graft_cases import structure, with_calculator
from mdgraft.testing import check_potential
from mdgraft_ase._units import ANGSTROM, EV
from torch import Tensor, nn


def _parts() -> list[Any]:
    return [LennardJones(sigma=2.2, epsilon=0.1), MorsePotential(r0=2.5, epsilon=0.2), EMT()]


MIXTURES = {
    "sum": lambda: SumCalculator(_parts()),
    "linear": lambda: LinearCombinationCalculator(_parts(), [0.3, -1.2, 2.0]),
    "mixed": lambda: MixedCalculator(*_parts()[:2], 0.25, 0.75),
    "average": lambda: AverageCalculator(_parts()),
    "nested": lambda: SumCalculator(
        [EMT(), LinearCombinationCalculator([EMT(), SumCalculator(_parts()[:2])], [0.5, 2.0])]
    ),
}


@pytest.mark.parametrize("route", ["native", "host", "some"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_sums_of_calculators(mixture: str, route: str) -> None:
    atoms = with_calculator("skewed_alloy", "lj")
    atoms.calc = MIXTURES[mixture]()
    wanted = {"LennardJones": "host"} if route == "some" else route
    potential = mdgraft.graft(atoms, route=wanted)
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-10)
    np.testing.assert_allclose(
        potential.forces(x, h).detach(), atoms.get_forces() * EV / ANGSTROM, rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        mdgraft_ase.stress(potential, atoms), atoms.get_stress(), rtol=1e-9, atol=1e-12
    )
    if mixture == "sum":
        assert potential.term_names == ("LennardJones", "MorsePotential", "EMT")
        assert potential.routes["LennardJones"] == ("native" if route == "native" else "host")
        assert "LennardJones.sigma" in dict(potential.named_parameters()) or route != "native"
    if mixture == "nested":
        assert potential.term_names == ("EMT", "EMT_1", "LennardJones", "MorsePotential")
        assert float(potential.term("MorsePotential").weight.detach()) == 2.0


def test_weights_are_parameters() -> None:
    atoms = with_calculator("skewed_alloy", "lj")
    atoms.calc = MIXTURES["linear"]()
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    potential(x, h).backward()
    contributions = atoms.calc.mixer.calcs[1].get_potential_energy(atoms) * EV
    weight = potential.term("MorsePotential").weight
    assert float(weight.grad) == pytest.approx(contributions, rel=1e-10)
    assert potential.units["MorsePotential.term.r0"] == "nanometer"
    with torch.no_grad():
        weight.fill_(0.7)
        potential.term("MorsePotential").term.r0.fill_(0.26)
    mdgraft_ase.write_parameters(potential, atoms)
    assert atoms.calc.mixer.weights == pytest.approx([0.3, 0.7, 2.0])
    assert atoms.calc.mixer.calcs[1].parameters["r0"] == pytest.approx(2.6)
    energy = atoms.get_potential_energy() * EV
    assert energy == pytest.approx(float(potential(x, h).detach()), rel=1e-10)


@pytest.mark.parametrize("vacuum", [None, 4.0])
@pytest.mark.parametrize("route", ["native", "host"])
def test_subtractive_embedding(vacuum: float | None, route: str) -> None:
    atoms = with_calculator("slab", "lj")
    own, cheap = EMT(), [LennardJones(sigma=2.3, epsilon=0.1) for _ in range(2)]
    atoms.calc = SimpleQMMM([0, 3, 4], own, *cheap, vacuum=vacuum)
    potential = mdgraft.graft(atoms, route=route)
    assert potential.term_names == ("EMT", "LennardJones", "LennardJones_1")
    assert set(potential.routes.values()) == {route}
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-9)
    np.testing.assert_allclose(
        potential.forces(x, h).detach(), atoms.get_forces() * EV / ANGSTROM, rtol=0, atol=1e-6
    )
    with torch.no_grad():
        dict(potential.named_parameters())["LennardJones.term.sigma"].mul_(1.1)
    mdgraft_ase.write_parameters(potential, atoms)
    assert cheap[0].parameters["sigma"] == pytest.approx(2.3 * 1.1)
    assert cheap[1].parameters["sigma"] == 2.3
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-9)


def test_a_weight_within_an_embedding_has_no_place() -> None:
    atoms = with_calculator("slab", "lj")
    inner = LinearCombinationCalculator([LennardJones(sigma=2.3)], [0.5])
    atoms.calc = SimpleQMMM([0, 3], EMT(), LennardJones(sigma=2.3), inner)
    potential = mdgraft.graft(atoms)
    mdgraft_ase.write_parameters(potential, atoms)
    with torch.no_grad():
        potential.term("LennardJones_1").weight.fill_(0.7)
    with pytest.raises(mdgraft.ParameterMismatchError, match="no single weight can take it"):
        mdgraft_ase.write_parameters(potential, atoms)


def test_weights_of_energies_of_atoms() -> None:
    atoms = with_calculator("skewed_alloy", "lj")
    atoms.calc = LinearCombinationCalculator([EMT()], [-2.0])
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    term = potential.term("EMT")
    found = term.particle_energies(x[None], h[None], term.parameter_values(), {})
    wanted = -2.0 * EMT().get_potential_energies(atoms) * EV
    np.testing.assert_allclose(found[0].detach(), wanted, rtol=1e-10)


def test_a_product_of_weights_has_no_place() -> None:
    atoms = with_calculator("skewed_alloy", "lj")
    atoms.calc = MIXTURES["nested"]()
    potential = mdgraft.graft(atoms)
    mdgraft_ase.write_parameters(potential, atoms)
    with torch.no_grad():
        potential.term("EMT_1").weight.fill_(3.0)
    with pytest.raises(mdgraft.ParameterMismatchError, match="EMT_1.weight: is a product"):
        mdgraft_ase.write_parameters(potential, atoms)


def _harmonic(atoms: Atoms) -> Any:
    matrix = np.random.default_rng(1).normal(size=(3 * len(atoms),) * 2)
    return HarmonicCalculator(HarmonicForceField(atoms.copy(), matrix @ matrix.T, ref_energy=2.0))


WRITABLE = {
    "lj": lambda atoms: LennardJones(sigma=2.2, epsilon=0.3, rc=5.0),
    "lj smooth": lambda atoms: LennardJones(sigma=2.2, epsilon=0.3, rc=5.0, ro=4.0, smooth=True),
    "morse": lambda atoms: MorsePotential(r0=2.5),
    "harmonic": _harmonic,
    "springs": lambda atoms: SpringCalculator(atoms.positions + 0.1, 2.5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRITABLE)
def test_write_back(name: str, dtype: torch.dtype) -> None:
    atoms = structure("cluster")
    atoms.calc = WRITABLE[name](atoms)
    atoms.rattle(0.05, seed=3)
    before = atoms.get_potential_energy()
    potential = mdgraft.graft(atoms, dtype=dtype)
    mdgraft_ase.write_parameters(potential, atoms)
    # Nothing has changed, so no bit may.
    assert atoms.get_potential_energy() == before
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.03)
    mdgraft_ase.write_parameters(potential, atoms.calc)
    x, _ = mdgraft_ase.positions_and_box(atoms)
    energy = float(potential(x).detach())
    assert energy != pytest.approx(before * EV, rel=1e-3)
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    assert atoms.get_potential_energy() * EV == pytest.approx(energy, rel=rel)


@pytest.mark.parametrize(
    "nested",
    [
        lambda part: SumCalculator([SumCalculator([part, EMT()]), EMT()]),
        lambda part: AverageCalculator([MixedCalculator(EMT(), part, 0.4, 0.6)]),
        lambda part: SumCalculator([SimpleQMMM([0, 1], SumCalculator([part]), EMT(), EMT())]),
        lambda part: SimpleQMMM([0, 1], EMT(), SumCalculator([EMT(), part]), EMT()),
    ],
)
def test_write_back_into_sums_within_sums(nested: Any) -> None:
    # Each sum on the way remembers its results.
    atoms = structure("cluster")
    part = LennardJones(sigma=2.2, epsilon=0.1)
    atoms.calc = nested(part)
    before = atoms.get_potential_energy()
    potential = mdgraft.graft(atoms)
    (name,) = (k for k, _ in potential.named_parameters() if k.endswith("epsilon"))
    potential.get_parameter(name).data.mul_(1.5)
    mdgraft_ase.write_parameters(potential, atoms)
    assert part.parameters["epsilon"] == pytest.approx(0.15, rel=1e-12)
    wanted = float(potential(*mdgraft_ase.positions_and_box(atoms)).detach()) / EV
    assert atoms.get_potential_energy() == pytest.approx(wanted, rel=1e-9)
    assert wanted != pytest.approx(before, rel=1e-4)


def test_write_back_of_ties() -> None:
    atoms = structure("cluster")
    atoms.calc = SumCalculator([LennardJones(sigma=2.2), LennardJones(sigma=2.2, epsilon=0.1)])
    potential = mdgraft.graft(atoms)
    potential.tie("sigma", {"LennardJones.sigma": None, "LennardJones_1.sigma": None})
    with torch.no_grad():
        dict(potential.named_parameters())["tied.sigma"].fill_(0.25)
    mdgraft_ase.write_parameters(potential, atoms)
    assert [c.parameters["sigma"] for c in atoms.calc.mixer.calcs] == pytest.approx([2.5, 2.5])


def test_write_back_to_a_calculator_that_occurs_twice() -> None:
    atoms = structure("cluster")
    calculator = LennardJones(sigma=2.2)
    atoms.calc = LinearCombinationCalculator([calculator, calculator], [0.5, 0.25])
    potential = mdgraft.graft(atoms)
    both = [potential.term(name).term.sigma for name in ("LennardJones", "LennardJones_1")]
    with torch.no_grad():
        both[0].mul_(1.1)
    with pytest.raises(mdgraft.ParameterMismatchError, match="one and the same calculator"):
        mdgraft_ase.write_parameters(potential, atoms)
    assert calculator.parameters["sigma"] == 2.2
    with torch.no_grad():
        both[1].copy_(both[0])
    mdgraft_ase.write_parameters(potential, atoms)
    assert calculator.parameters["sigma"] == pytest.approx(2.42)


def test_what_cannot_be_written_is_refused() -> None:
    atoms = with_calculator("cluster", "emt")
    potential = mdgraft.graft(atoms)
    mdgraft_ase.write_parameters(potential, atoms)
    with torch.no_grad():
        potential.term("EMT").E0.mul_(1.1)
    with pytest.raises(mdgraft.ParameterMismatchError, match="share one table"):
        mdgraft_ase.write_parameters(potential, atoms)
    lj = with_calculator("cluster", "lj")
    with pytest.raises(mdgraft.ParameterMismatchError, match="has the calculators"):
        mdgraft_ase.write_parameters(potential, lj)
    smooth = mdgraft.graft(with_calculator("cluster", "lj smooth"))
    with pytest.raises(mdgraft.ParameterMismatchError, match="same options"):
        mdgraft_ase.write_parameters(smooth, lj)
    broken = mdgraft.graft(lj)
    with torch.no_grad():
        broken.term("LennardJones").sigma.fill_(float("nan"))
    with pytest.raises(mdgraft.ParameterMismatchError, match="NaN or infinity"):
        mdgraft_ase.write_parameters(broken, lj)
    with pytest.raises(mdgraft.InvalidInputError, match="wanted what mdgraft.graft returns"):
        mdgraft_ase.write_parameters(lj, lj)  # type: ignore[arg-type]


class Network(nn.Module):
    """Gaussians of all distances through a small network, over the nearest images."""

    def __init__(self, *, marks: bool = False) -> None:
        super().__init__()
        self.marks = marks
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("centres", torch.linspace(1.0, 5.0, 6))

    def forward(self, positions: Tensor, cell: Tensor | None) -> Tensor:
        if self.marks:
            # As models do that find their forces themselves.
            positions.requires_grad_(True)
        first, second = torch.triu_indices(len(positions), len(positions), 1)
        vectors = positions[second] - positions[first]
        if cell is not None:
            images = torch.round(vectors.detach() @ torch.linalg.inv(cell.detach()))
            vectors = vectors - images @ cell
        r = vectors.norm(dim=-1, keepdim=True)
        features = torch.exp(-((r - self.centres) ** 2)).sum(dim=0)
        return self.layers(features).squeeze()


class TorchCalculator(Calculator):
    """A calculator around a torch model, as most of them are."""

    implemented_properties: ClassVar = ["energy", "forces"]

    def __init__(self, model: nn.Module, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.factor = factor
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def calculate(
        self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        dtype = next(self.model.parameters()).dtype
        x = torch.tensor(self.atoms.positions, dtype=dtype, requires_grad=True)
        periodic = self.atoms.pbc.any()
        h = torch.tensor(np.asarray(self.atoms.cell), dtype=dtype) if periodic else None
        energy = self.factor * self.model(x, h)
        (slope,) = torch.autograd.grad(energy, x)
        self.results = {"energy": energy.item(), "forces": -slope.double().numpy()}


class Offering(TorchCalculator):
    def as_torch_module(self, atoms: Atoms) -> nn.Module:
        return self.model


def _network(seed: int = 0, **options: Any) -> Network:
    torch.manual_seed(seed)
    return Network(**options).double()


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("name", ["cluster", "skewed_alloy"])
def test_a_model_is_taken_out_of_its_calculator(name: str, marks: bool) -> None:
    atoms = structure(name)
    atoms.calc = Offering(_network(marks=marks))
    potential = mdgraft.graft(atoms)
    assert potential.routes == {"Offering": "native"}
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(
        potential.forces(x, h).detach(), atoms.get_forces() * EV / ANGSTROM, rtol=1e-10, atol=1e-10
    )
    names = [key for key, _ in potential.named_parameters()]
    assert "Offering.module.layers.0.weight" in names
    assert all(p.requires_grad for p in potential.parameters())
    assert not any(p.requires_grad for p in atoms.calc.model.parameters())
    check_potential(potential, x, h)


def test_derivatives_by_the_parameters_of_a_model_and_write_back() -> None:
    atoms = structure("cluster")
    atoms.calc = Offering(_network())
    potential = mdgraft.graft(atoms)
    x, _ = mdgraft_ase.positions_and_box(atoms)
    bias = dict(potential.named_parameters())["Offering.module.layers.2.bias"]
    # A loss in forces has no derivative in a constant of the energy, but in all other parameters.
    (potential(x) ** 2 + potential.forces(x).square().sum()).backward()
    assert float(bias.grad) == pytest.approx(2 * float(potential(x).detach()) * EV, rel=1e-10)
    with torch.no_grad():
        bias.add_(0.5)
    before = atoms.get_potential_energy()
    assert float(potential(x).detach()) == pytest.approx((before + 0.5) * EV, rel=1e-10)
    mdgraft_ase.write_parameters(potential, atoms)
    assert atoms.get_potential_energy() == pytest.approx(before + 0.5, rel=1e-12)


def test_a_model_in_single_precision_stays_so_in_its_calculator() -> None:
    atoms = structure("cluster")
    atoms.calc = Offering(_network().float())
    potential = mdgraft.graft(atoms)
    assert potential.routes == {"Offering": "native"}
    assert potential.dtype == torch.float64
    assert next(atoms.calc.model.parameters()).dtype == torch.float32
    x, _ = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x).detach()) == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("reason", ["differs", "cannot be taken out", "wanted a torch.nn.Module"])
def test_a_model_that_does_not_do_is_left_to_the_host(reason: str) -> None:
    class Doubtful(TorchCalculator):
        def as_torch_module(self, atoms: Atoms) -> Any:
            if reason == "cannot be taken out":
                raise RuntimeError("compiled")
            return self.model if reason == "differs" else self.model.forward

    atoms = structure("cluster")
    atoms.calc = Doubtful(_network(), factor=1.1)
    with pytest.warns(mdgraft.MDGraftWarning, match=reason):
        potential = mdgraft.graft(atoms)
    assert potential.routes == {"Doubtful": "host"}
    x, _ = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x).detach()) == pytest.approx(energy, rel=1e-12)
    with pytest.raises(mdgraft.UnsupportedForceError, match=reason):
        mdgraft.graft(atoms, route="native")


def test_a_calculator_that_does_not_offer_its_model_goes_by_the_host() -> None:
    atoms = structure("cluster")
    atoms.calc = TorchCalculator(_network())
    potential = mdgraft.graft(atoms)
    assert potential.routes == {"TorchCalculator": "host"}
    x, _ = mdgraft_ase.positions_and_box(atoms)
    # Where gradients are off and under transforms, the model inside still differentiates.
    with torch.no_grad():
        forces = potential.forces(x)
    np.testing.assert_allclose(forces, atoms.get_forces() * EV / ANGSTROM, rtol=1e-10)


def test_a_model_of_edges() -> None:
    from mdgraft.neural import MessagePassingNetwork

    torch.manual_seed(1)
    model = MessagePassingNetwork(elements=[28, 29, 79], cutoff=0.4).double()

    class Edges(Calculator):
        implemented_properties: ClassVar = ["energy", "forces"]

        def as_torch_module(self, atoms: Atoms) -> nn.Module:
            return model

        def calculate(
            self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
        ) -> None:
            super().calculate(atoms, properties, system_changes)
            from mdgraft.neural import neural_potential

            own = neural_potential(model, self.atoms.numbers, pbc=list(self.atoms.pbc))
            x, h = mdgraft_ase.positions_and_box(self.atoms)
            self.results["energy"] = float(own(x, h).detach()) / EV
            self.results["forces"] = own.forces(x, h).detach().numpy() / (EV / ANGSTROM)

    atoms = structure("skewed_alloy")
    atoms.calc = Edges()
    potential = mdgraft.graft(atoms)
    assert potential.routes == {"Edges": "native"}
    check_potential(potential, *mdgraft_ase.positions_and_box(atoms), rtol=1e-5)


def test_a_potential_of_our_own_comes_back() -> None:
    atoms = with_calculator("skewed_alloy", "emt")
    potential = mdgraft.graft(atoms)
    other = atoms.copy()
    other.calc = mdgraft_ase.MDGraftCalculator(potential)
    assert mdgraft.graft(other) is potential
    single = mdgraft.graft(other, dtype=torch.float32)
    assert single.dtype == torch.float32 and potential.dtype == torch.float64
    by_host = mdgraft.graft(other, route="host")
    x, h = mdgraft_ase.positions_and_box(atoms)
    torch.testing.assert_close(by_host.forces(x, h), potential.forces(x, h))
    mdgraft_ase.write_parameters(copy.deepcopy(potential), other)
    summed = atoms.copy()
    summed.calc = SumCalculator([mdgraft_ase.MDGraftCalculator(potential), EMT()])
    both = mdgraft.graft(summed)
    assert set(both.routes.values()) == {"native"}
    torch.testing.assert_close(both(x, h), 2 * potential(x, h))
    shorter = atoms[:2]
    shorter.calc = mdgraft_ase.MDGraftCalculator(potential)
    with pytest.raises(mdgraft.InvalidInputError, match="there are 2 atoms"):
        mdgraft.graft(shorter)


def test_a_module_in_our_own_calculator_comes_back() -> None:
    network = _network()

    def energy(positions: Tensor, box: Tensor | None) -> Tensor:
        return network(positions / ANGSTROM, None if box is None else box / ANGSTROM) * EV

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
            return energy(positions, box)

    atoms = structure("cluster")
    atoms.calc = mdgraft_ase.MDGraftCalculator(Wrapped())
    potential = mdgraft.graft(atoms)
    assert set(potential.routes.values()) == {"native"}
    x, _ = mdgraft_ase.positions_and_box(atoms)
    torch.testing.assert_close(potential(x), energy(x, None))
