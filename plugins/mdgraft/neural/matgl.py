"""MatGL models."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class MatGLModel(AtomicModel):
    """A model of the ``matgl`` package, version 4: M3GNet, TensorNet, CHGNet, SO3Net.

    Takes the graph that such models take (``node_type``, ``pos``, ``edge_index``, ``pbc_offset``,
    ``pbc_offshift``, ``batch``). Scale, shift, energies of elements and nuclear repulsion of the
    ``Potential`` around the model count; its forces, stresses and other results are not asked for.
    The reference is Ko, Deng, Nassar, Barroso-Luque, Liu, Qi, Thakur, Mishra, Liu, Ceder, Miret,
    Ong, npj Comput. Mater. 11, 253 (2025).

    Parameters
    ----------
    potential
        A ``matgl.apps.pes.Potential``.
    elements
        Atomic number of each of the model's ``element_types``, in order.
    units
        Angstrom and eV unless the model was trained otherwise.

    Raises
    ------
    InvalidInputError
        If it is something else, or depends on more than atoms: on a state of each frame or on
        charges.
    """

    types: Tensor

    def __init__(
        self, potential: nn.Module, elements: Sequence[int], *, units: ModelUnits | None = None
    ) -> None:
        model: Any = getattr(potential, "model", None)
        if not all(hasattr(model, part) for part in ("cutoff", "element_types")):
            raise InvalidInputError(
                f"potential: {type(potential).__name__} has no model with a cutoff and "
                "element_types; wanted a matgl.apps.pes.Potential, such as calculator.potential"
            )
        known = [int(z) for z in elements]
        if len(known) != len(model.element_types):
            raise InvalidInputError(
                f"elements: got {len(known)}, wanted one for each of the model's "
                f"{len(model.element_types)} element_types"
            )
        _check_inputs(potential, model)
        super().__init__(
            cutoff=float(model.cutoff), units=units or ModelUnits("angstrom", "eV"), elements=known
        )
        self.module = potential
        kinds = torch.zeros(max(known) + 1, dtype=torch.long)
        kinds[torch.tensor(known)] = torch.arange(len(known))
        self.register_buffer("types", kinds, persistent=False)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)``."""
        potential: Any = self.module
        # Three-body terms count edges from atom to atom.
        order = inputs.first.argsort(stable=True)
        first, vectors = inputs.first[order], inputs.displacements[order]
        graph = types.SimpleNamespace(
            node_type=self.types[inputs.atomic_numbers],
            pos=inputs.positions,
            edge_index=torch.stack([first, inputs.second[order]]),
            pbc_offset=inputs.shifts[order],
            pbc_offshift=inputs.offsets[order],
            bond_vec=vectors,
            bond_dist=vectors.norm(dim=-1),
            batch=inputs.frame,
            num_graphs=inputs.n_frames,
            num_nodes=inputs.n_atoms,
        )
        energies: Tensor = potential.model(g=graph, state_attr=None, l_g=None).reshape(-1)
        # It keeps all that it found, with graphs that nobody will ask for.
        potential.model.feature_dict = {}
        energies = potential.data_std * energies + potential.data_mean
        if potential.calc_repuls:
            energies = energies + potential.repuls(potential.model.element_types, graph).reshape(-1)
        if potential.element_refs is not None:
            shifts = potential.element_refs.property_offset[graph.node_type]
            energies = energies + inputs.per_frame(shifts.to(energies.dtype))
        return energies


def _check_inputs(potential: Any, model: Any) -> None:
    """Raise for a model that atoms alone do not determine."""
    references = getattr(potential, "element_refs", None)
    if getattr(model, "include_state", False) or (
        references is not None and references.property_offset.ndim != 1
    ):
        raise InvalidInputError(
            f"potential: its {type(model).__name__} depends on a state of each frame, which "
            "atoms do not have; use one without a state"
        )
    if getattr(potential, "calc_charge", False):
        raise InvalidInputError(
            f"potential: its {type(model).__name__} depends on the total charge, which atoms do "
            "not have; use one with calc_charge=False"
        )
    if getattr(model, "is_intensive", False):
        raise InvalidInputError(
            f"potential: its {type(model).__name__} is intensive, which an energy is not; use one "
            "with is_intensive=False"
        )
