"""CHGNet models."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits

_PARTS = (
    "bond_basis_expansion",
    "angle_basis_expansion",
    "graph_converter",
    "composition_model",
    "is_intensive",
    "_compute",
)


class CHGNetModel(AtomicModel):
    """A model of the ``chgnet`` package, version 0.4.

    The graph of bonds and angles that the package makes from a structure is made here from the
    edges: a bond is a pair of opposite edges, an angle two edges from one atom that are shorter
    than the second, smaller cutoff. Energies are of whole frames also where the model's own are
    averages over atoms. Magnetic moments are not asked for. The reference is Deng, Zhong, Jun,
    Riebesell, Han, Bartel, Ceder, Nat. Mach. Intell. 5, 1031 (2023).

    Parameters
    ----------
    model
        A ``CHGNet``.
    units
        Angstrom and eV unless the model was trained otherwise.

    Raises
    ------
    InvalidInputError
        If the model is something else.
    """

    def __init__(self, model: nn.Module, *, units: ModelUnits | None = None) -> None:
        missing = [name for name in _PARTS if not hasattr(model, name)]
        if missing:
            raise InvalidInputError(
                f"model: {type(model).__name__} has no {', '.join(missing)}; wanted a "
                "chgnet.model.CHGNet of version 0.4, such as CHGNet.load() or calculator.model"
            )
        converter: Any = model.graph_converter
        embedding: Any = model.atom_embedding
        super().__init__(
            cutoff=float(converter.atom_graph_cutoff),
            units=units or ModelUnits("angstrom", "eV"),
            elements=range(1, embedding.embedding.num_embeddings + 1),
        )
        self.module = model
        self.angle_cutoff = float(converter.bond_graph_cutoff)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)``."""
        module: Any = self.module
        bond_of_edge, edge_of_bond = _bonds(inputs)
        vectors = -inputs.displacements
        lengths = vectors.norm(dim=-1)
        bonds = lengths[edge_of_bond]
        left, right = _angles(inputs.first, lengths < self.angle_cutoff)
        directions = vectors / lengths.unsqueeze(-1)
        basis = module.bond_basis_expansion
        graph = types.SimpleNamespace(
            atomic_numbers=inputs.atomic_numbers,
            atom_owners=inputs.frame,
            bond_bases_ag=basis.rbf_expansion_ag(bonds),
            bond_bases_bg=basis.rbf_expansion_bg(bonds),
            angle_bases=module.angle_basis_expansion(directions[left], directions[right]),
            batched_atom_graph=torch.stack([inputs.first, inputs.second], dim=1),
            directed2undirected=bond_of_edge,
            batched_bond_graph=torch.stack(
                [inputs.first[left], bond_of_edge[left], bond_of_edge[right]], dim=1
            ),
        )
        energies: Tensor = module._compute(graph)["e"]
        n_atoms = inputs.n_atoms // inputs.n_frames
        composition = module.composition_model
        if composition is not None:
            energies = energies + self._composition_energies(composition, inputs)
        return energies * n_atoms if module.is_intensive else energies

    def _composition_energies(self, composition: Any, inputs: AtomicInputs) -> Tensor:
        """Energies by numbers of atoms of each element; the model's own path is in float32."""
        kinds = nn.functional.one_hot(inputs.atomic_numbers - 1, composition.max_num_elements)
        counts = inputs.per_frame(kinds.to(inputs.positions.dtype))
        if composition.is_intensive:
            counts = counts * (inputs.n_frames / inputs.n_atoms)
        energies: Tensor = composition._get_energy(counts)
        return energies


def _bonds(inputs: AtomicInputs) -> tuple[Tensor, Tensor]:
    """The bond of each edge ``(E,)``, and one of the two edges of each bond ``(E / 2,)``."""
    first, second, shifts = inputs.first, inputs.second, inputs.shifts.long()
    # An edge from an atom to an image of itself goes back if its first shift does.
    lead = torch.zeros_like(first)
    for axis in (2, 1, 0):
        lead = torch.where(shifts[:, axis] != 0, shifts[:, axis], lead)
    back = (second < first) | ((first == second) & (lead < 0))
    ends = torch.stack([first, second], dim=1)
    opposite = torch.cat([ends.flip(1), -shifts], dim=1)
    rows = torch.where(back.unsqueeze(-1), opposite, torch.cat([ends, shifts], dim=1))
    _, bond_of_edge = torch.unique(rows, dim=0, return_inverse=True)
    forth = (~back).nonzero().squeeze(-1)
    edge_of_bond = torch.empty_like(forth)
    edge_of_bond[bond_of_edge[forth]] = forth
    return bond_of_edge, edge_of_bond


def _angles(first: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different short edges from one atom."""
    edges = short.nonzero().squeeze(-1)
    edges = edges[first[edges].argsort(stable=True)]
    atoms = first[edges]
    counts = torch.bincount(atoms)[atoms] if len(atoms) else atoms
    starts = torch.searchsorted(atoms, atoms)
    left = torch.arange(len(edges), device=first.device).repeat_interleave(counts)
    within = torch.arange(len(left), device=first.device)
    within = within - (counts.cumsum(0) - counts).repeat_interleave(counts)
    right = starts[left] + within
    kept = left != right
    return edges[left[kept]], edges[right[kept]]
