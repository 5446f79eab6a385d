"""SchNetPack models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class SchNetPackModel(AtomicModel):
    """A model of the ``schnetpack`` package, version 2: SchNet, PaiNN, FieldSchNet and others.

    Takes the dictionary that a ``NeuralNetworkPotential`` takes (``_atomic_numbers``,
    ``_positions``, ``_idx_i``, ``_idx_j``, ``_offsets``, ``_idx_m``, ``_n_atoms``, ``_cell``,
    ``_pbc``). The model's ``Forces`` are left out. The reference is Schuett, Hessmann, Gebauer,
    Lederer, Gastegger, J. Chem. Phys. 158, 144801 (2023).

    Parameters
    ----------
    model
        A ``NeuralNetworkPotential``, with its postprocessors.
    units
        That the model was trained in.
    cutoff
        In the model's unit of length; by default that of its representation.
    energy
        Key of the energy among the results.
    elements
        Atomic numbers that the model was trained on; None if not known.

    Raises
    ------
    InvalidInputError
        If the model is something else, or no cutoff is known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        units: ModelUnits,
        cutoff: float | None = None,
        energy: str = "energy",
        elements: Collection[int] | None = None,
    ) -> None:
        parts = ("representation", "input_modules", "output_modules", "postprocess")
        missing = [name for name in parts if not hasattr(model, name)]
        if missing:
            raise InvalidInputError(
                f"model: {type(model).__name__} has no {', '.join(missing)}; wanted a "
                "schnetpack.model.NeuralNetworkPotential"
            )
        if cutoff is None:
            representation: Any = model.representation
            inner = getattr(representation, "cutoff_fn", None)
            found = getattr(representation, "cutoff", None)
            found = getattr(inner, "cutoff", None) if found is None else found
            if found is None:
                raise InvalidInputError("cutoff: the representation does not tell it; pass it")
            cutoff = float(found)
        super().__init__(cutoff=cutoff, units=units, elements=elements)
        self.module = model
        self.energy = energy

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)``."""
        n_frames, device = inputs.n_frames, inputs.frame.device
        cells = inputs.cells
        if cells is None:
            like = inputs.positions
            cells = torch.zeros(n_frames, 3, 3, dtype=like.dtype, device=device)
        data: dict[str, Any] = {
            "_atomic_numbers": inputs.atomic_numbers,
            "_positions": inputs.positions,
            "_cell": cells,
            "_pbc": torch.tensor(inputs.pbc, device=device).repeat(n_frames),
            "_idx_i": inputs.first,
            "_idx_j": inputs.second,
            "_offsets": inputs.offsets,
            "_idx_m": inputs.frame,
            "_n_atoms": torch.full((n_frames,), inputs.n_atoms // n_frames, device=device),
        }
        module: Any = self.module
        for part in module.input_modules:
            data = part(data)
        data = module.representation(data)
        for part in module.output_modules:
            # What differentiates the energy comes after it, and is not needed.
            if type(part).__name__ not in ("Forces", "Response"):
                data = part(data)
        if self.energy not in data:
            raise InvalidInputError(
                f"energy: the model gives no {self.energy!r}; its outputs are "
                f"{getattr(module, 'model_outputs', None)}"
            )
        energies: Tensor = module.postprocess(data)[self.energy]
        return energies.reshape(-1)
