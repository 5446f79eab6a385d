"""SevenNet models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class SevenNetModel(AtomicModel):
    """A model of the ``sevenn`` package.

    Takes the dictionary that such models take (``x``, ``edge_index``, ``edge_vec``, ``batch``,
    ``num_atoms``, ``modal_type``) and returns ``atomic_energy``. The model's layer that finds
    forces is left out. The reference is Park, Kim, Hwang, Han, J. Chem. Theory Comput. 20, 4857
    (2024).

    Parameters
    ----------
    model
        An ``AtomGraphSequential``.
    modal
        Which of several data sets' energies a model of several gives; None if it has one.
    units
        Angstrom and eV unless the model was trained otherwise.

    Raises
    ------
    InvalidInputError
        If the model is something else, or does not know the modal.
    """

    types: Tensor

    def __init__(
        self, model: nn.Module, *, modal: str | None = None, units: ModelUnits | None = None
    ) -> None:
        numbers: Any = getattr(model, "type_map", None)
        cutoff: Any = getattr(model, "cutoff", None)
        if not numbers or not cutoff or not hasattr(model, "set_is_batch_data"):
            raise InvalidInputError(
                f"model: {type(model).__name__} has no cutoff and type_map; wanted an "
                "AtomGraphSequential of sevenn, such as calculator.model"
            )
        modals: Any = getattr(model, "modal_map", None) or {}
        if modal not in (modals or (None,)):
            raise InvalidInputError(f"modal: got {modal!r}, but the model has {sorted(modals)}")
        super().__init__(
            cutoff=float(cutoff),
            units=units or ModelUnits("angstrom", "eV"),
            elements=[int(z) for z in numbers],
        )
        self.module = model
        self.modal = None if modal is None else int(modals[modal])
        types = torch.zeros(max(numbers) + 1, dtype=torch.long)
        for number, index in numbers.items():
            types[number] = index
        self.register_buffer("types", types, persistent=False)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of atoms ``(A,)``."""
        n_frames, device = inputs.n_frames, inputs.frame.device
        data: dict[str, Tensor] = {
            "x": self.types[inputs.atomic_numbers],
            "atomic_numbers": inputs.atomic_numbers,
            "pos": inputs.positions,
            "edge_index": torch.stack([inputs.first, inputs.second]),
            "edge_vec": inputs.displacements,
            "edge_length": inputs.displacements.norm(dim=-1),
            "batch": inputs.frame,
            "num_atoms": torch.full((n_frames,), inputs.n_atoms // n_frames, device=device),
        }
        if self.modal is not None:
            data["modal_type"] = torch.full((n_frames,), self.modal, device=device)
        module: Any = self.module
        # Calculators tell their models that there is one frame.
        before = module.is_batch_data
        module.set_is_batch_data(True)
        try:
            for part in module.children():
                kind = type(part).__name__
                if kind.startswith(("Force", "EdgePreprocess")):
                    continue
                data = part(data)
                if kind == "OnehotEmbedding":
                    # In float32 whatever the model computes in.
                    data = {key: _in_precision_of(inputs, v) for key, v in data.items()}
        finally:
            module.set_is_batch_data(before)
        return data["atomic_energy"].reshape(-1)


def _in_precision_of(inputs: AtomicInputs, value: Tensor) -> Tensor:
    return value.to(inputs.positions.dtype) if value.is_floating_point() else value
