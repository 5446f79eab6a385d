"""Calculators of known packages: how their models are taken out, by stand-ins for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import mdgraft
import mdgraft_ase
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase_graft_cases import structure
from mdgraft.testing import check_potential
from mdgraft_ase._units import ANGSTROM, EV
from torch import Tensor, nn

CUTOFF = 4.2


class Edges(nn.Module):
    """``k (1 - r/r_max)**2 / 2`` for each edge, in whatever units it is asked."""

    def __init__(self, k: float, r_max: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.register_buffer("r_max", torch.tensor(r_max, dtype=torch.float64))

    def of(self, vectors: Tensor) -> Tensor:
        return 0.5 * self.k * (1.0 - vectors.norm(dim=-1) / self.r_max) ** 2


def _vectors(x: Tensor, edges: Tensor, offsets: Tensor) -> Tensor:
    return x[edges[1]] - x[edges[0]] + offsets


class MACE(Edges):
    def __init__(self, k: float, r_max: float) -> None:
        super().__init__(k, r_max)
        self.register_buffer("atomic_numbers", torch.tensor([13, 28, 29, 79]))
        self.heads = ["other", "default"]

    def forward(self, data: Any, training: bool, compute_force: bool) -> dict[str, Tensor]:
        assert training
        assert not compute_force
        data["positions"].requires_grad_(True)
        found = self.of(_vectors(data["positions"], data["edge_index"], data["shifts"]))
        frame = data["batch"][data["edge_index"][0]]
        energy = found.new_zeros(len(data["ptr"]) - 1).index_add(0, frame, found)
        return {"energy": energy * (1.0 + data["head"])}


class GraphModel(Edges):
    def __init__(self, k: float, r_max: float) -> None:
        super().__init__(k, r_max)
        self.metadata = {"r_max": str(r_max), "type_names": "Al Ni Cu Au"}

    def forward(self, data: Any) -> dict[str, Tensor]:
        offsets = torch.zeros(data["edge_index"].shape[1], 3, dtype=data["pos"].dtype)
        if "cell" in data:
            cell = data["cell"][data["batch"][data["edge_index"][0]]]
            offsets = (data["edge_cell_shift"].unsqueeze(-2) @ cell).squeeze(-2)
        found = self.of(_vectors(data["pos"], data["edge_index"], offsets))
        energies = torch.zeros_like(data["pos"][:, 0]).index_add(0, data["edge_index"][0], found)
        return {"atomic_energy": energies.unsqueeze(-1)}


class Identity(nn.Module):
    def forward(self, data: Any) -> Any:
        return data


class Readout(Edges):
    def forward(self, data: Any) -> Any:
        edges = torch.stack([data["_idx_i"], data["_idx_j"]])
        found = self.of(_vectors(data["_positions"], edges, data["_offsets"]))
        frame = data["_idx_m"][data["_idx_i"]]
        total = found.new_zeros(len(data["_n_atoms"])).index_add(0, frame, found)
        return {**data, "total": total}


class NeuralNetworkPotential(nn.Module):
    def __init__(self, k: float, r_max: float) -> None:
        super().__init__()
        self.representation = Identity()
        self.representation.cutoff = r_max
        self.input_modules = nn.ModuleList()
        self.output_modules = nn.ModuleList([Readout(k, r_max)])
        self.postprocess = Identity()

    @property
    def k(self) -> Tensor:
        return self.output_modules[0].k


class StandIn(Calculator):
    """What any of the models computes, by ASE's own list of neighbours."""

    implemented_properties: ClassVar = ["energy", "free_energy", "forces", "stress"]
    strength = 1.0
    length = 1.0
    energy = 1.0

    def calculate(
        self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        i, d, vectors = neighbor_list("idD", self.atoms, CUTOFF * self.length)
        k, x = self.strength * self.energy, 1.0 - d / (CUTOFF * self.length)
        slope = -2.0 * k * x / (CUTOFF * self.length)
        pulls = (slope / d)[:, None] * vectors
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, pulls)
        self.results = {
            "energy": 0.5 * k * float((x**2).sum()),
            "free_energy": 0.5 * k * float((x**2).sum()),
            "forces": forces,
        }
        if self.atoms.cell.rank == 3:
            stress = 0.5 * vectors.T @ pulls / self.atoms.get_volume()
            self.results["stress"] = stress.flat[[0, 4, 8, 5, 2, 1]]


def _named(module: str, name: str, **attributes: Any) -> StandIn:
    calculator: StandIn = type(name, (StandIn,), {"__module__": module})()
    for key, value in attributes.items():
        setattr(calculator, key, value)
    return calculator


def mace() -> StandIn:
    return _named(
        "mace.calculators.mace",
        "MACECalculator",
        models=[MACE(0.4, CUTOFF)],
        available_heads=["other", "default"],
        head="default",
        strength=0.8,
        length_units_to_A=1.0,
        energy_units_to_eV=1.0,
    )


def committee_in_atomic_units() -> StandIn:
    return _named(
        "mace.calculators.mace",
        "MACECalculator",
        models=[MACE(0.02, CUTOFF), MACE(0.04, CUTOFF), MACE(0.03, CUTOFF)],
        available_heads=["default"],
        head="default",
        strength=0.03,
        length_units_to_A=1.1,
        energy_units_to_eV=27.2,
        length=1.1,
        energy=27.2,
    )


def nequip() -> StandIn:
    return _named(
        "nequip.integrations.ase",
        "NequIPCalculator",
        model=GraphModel(0.4, CUTOFF),
        strength=0.4,
        length_units_to_A=1.0,
        energy_units_to_eV=2.0,
        energy=2.0,
    )


def schnetpack() -> StandIn:
    size = units.kcal / units.mol
    return _named(
        "schnetpack.interfaces.ase_interface",
        "SpkCalculator",
        model=NeuralNetworkPotential(9.0, CUTOFF),
        property_units={"energy": size},
        property_map={"energy": "total"},
        strength=9.0,
        energy=size,
    )


KNOWN: list[Callable[[], StandIn]] = [mace, committee_in_atomic_units, nequip, schnetpack]


@pytest.mark.parametrize("make", KNOWN)
@pytest.mark.parametrize("name", ["skewed_alloy", "slab", "cluster"])
def test_models_of_known_packages(make: Callable[[], StandIn], name: str) -> None:
    atoms = structure(name)
    atoms.calc = make()
    potential = mdgraft.graft(atoms, route="native")
    x, h = mdgraft_ase.positions_and_box(atoms)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-7)
    np.testing.assert_allclose(
        potential.forces(x, h).detach(), atoms.get_forces() * EV / ANGSTROM, rtol=1e-6, atol=1e-6
    )
    if h is not None:
        stress = mdgraft_ase.stress(potential, atoms)
        np.testing.assert_allclose(stress, atoms.get_stress(), rtol=1e-6, atol=1e-10)
    check_potential(potential, x, h)


@pytest.mark.parametrize("make", KNOWN)
def test_write_back_into_models(make: Callable[[], StandIn]) -> None:
    atoms = structure("cluster")
    atoms.calc = make()
    potential = mdgraft.graft(atoms)
    models = getattr(atoms.calc, "models", None) or [atoms.calc.model]
    before = [float(model.k.detach()) for model in models]
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.5)
    assert [float(model.k.detach()) for model in models] == before
    mdgraft_ase.write_parameters(potential, atoms)
    assert [float(m.k.detach()) for m in models] == pytest.approx([1.5 * k for k in before])


def test_types_that_are_no_elements_are_left_to_the_host() -> None:
    atoms = structure("cluster")
    atoms.calc = nequip()
    atoms.calc.model.metadata["type_names"] = "A B C D"
    with pytest.warns(mdgraft.MDGraftWarning, match=r"cannot be taken out \(KeyError"):
        potential = mdgraft.graft(atoms)
    assert potential.routes == {"NequIPCalculator": "host"}


def test_a_class_of_the_same_name_elsewhere_is_none_of_them() -> None:
    atoms: Atoms = structure("cluster")
    atoms.calc = _named("somewhere.else", "MACECalculator")
    assert mdgraft.graft(atoms).routes == {"MACECalculator": "host"}
