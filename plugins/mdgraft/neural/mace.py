"""MACE models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class MACEModel(AtomicModel):
    """A model of the ``mace-torch`` package: ``MACE``, ``ScaleShiftMACE`` and what behaves alike.

    Takes the dictionary of a batch that ``mace.data.AtomicData`` would make (``positions``,
    ``node_attrs``, ``edge_index``, ``shifts``, ``unit_shifts``, ``cell``, ``batch``, ``ptr``) and
    returns ``energy``; forces, stress and virial of the model are not asked for. The reference is
    Batatia, Kovacs, Simm, Ortner, Csanyi, NeurIPS 35, 11423 (2022).

    Parameters
    ----------
    model
        With the attributes ``r_max`` and ``atomic_numbers`` that such models have.
    units
        Angstrom and eV unless the model was trained otherwise.
    head
        Which one of several heads answers.

    Raises
    ------
    InvalidInputError
        If the model has no such attributes, or no such head.
    """

    columns: Tensor

    def __init__(
        self, model: nn.Module, *, units: ModelUnits | None = None, head: str | int = 0
    ) -> None:
        cutoff, numbers = getattr(model, "r_max", None), getattr(model, "atomic_numbers", None)
        if cutoff is None or numbers is None:
            raise InvalidInputError(
                f"model: {type(model).__name__} has no r_max and atomic_numbers as models of MACE "
                "have; hand over the module itself, such as calculator.models[0]"
            )
        known = [int(z) for z in torch.as_tensor(numbers)]
        super().__init__(
            cutoff=float(cutoff), units=units or ModelUnits("angstrom", "eV"), elements=known
        )
        self.module = model
        self.head = _head(model, head)
        columns = torch.zeros(max(known) + 1, dtype=torch.long)
        columns[torch.tensor(known)] = torch.arange(len(known))
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)``."""
        positions, n_frames = inputs.positions, inputs.n_frames
        n_elements = len(self.elements or ())
        kinds = nn.functional.one_hot(self.columns[inputs.atomic_numbers], n_elements)
        device = positions.device
        cells = inputs.cells
        if cells is None:
            cells = torch.zeros(n_frames, 3, 3, dtype=positions.dtype, device=device)
        per_frame = inputs.n_atoms // n_frames
        data: dict[str, Any] = {
            "positions": positions,
            "node_attrs": kinds.to(positions.dtype),
            "edge_index": torch.stack([inputs.first, inputs.second]),
            "shifts": inputs.offsets,
            "unit_shifts": inputs.shifts,
            "cell": cells.reshape(-1, 3),
            "batch": inputs.frame,
            "ptr": torch.arange(n_frames + 1, device=device) * per_frame,
            "head": torch.full((n_frames,), self.head, dtype=torch.long, device=device),
        }
        energies: Tensor = self.module(data, training=True, compute_force=False)["energy"]
        return energies


def _head(model: nn.Module, head: str | int) -> int:
    names = [str(name) for name in getattr(model, "heads", None) or ["default"]]
    if isinstance(head, str):
        if head not in names:
            raise InvalidInputError(f"head: got {head!r}, but the model has {names}")
        return names.index(head)
    if not 0 <= int(head) < len(names):
        raise InvalidInputError(f"head: got {head}, but the model has {names}")
    return int(head)
