"""TorchANI models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class TorchANIModel(AtomicModel):
    """A model of the ``torchani`` package, version 2.4 or newer, such as ``torchani.models.ANI2x``.

    Uses the entry point for lists of neighbours that are made elsewhere, so that any cell will do,
    also one that is small against the cutoff. The reference is Gao, Ramezanghorbani, Isayev, Smith,
    Roitberg, J. Chem. Inf. Model. 60, 3408 (2020).

    Parameters
    ----------
    model
        With the attributes ``cutoff`` and ``atomic_numbers``, and ``periodic_table_index`` left at
        True.
    units
        Angstrom and hartree unless the model was trained otherwise.
    charge
        Total charge, for models that know charges.

    Raises
    ------
    InvalidInputError
        If the model lacks what is needed.
    """

    def __init__(
        self, model: nn.Module, *, units: ModelUnits | None = None, charge: int = 0
    ) -> None:
        needed = ("cutoff", "atomic_numbers", "compute_from_external_neighbors")
        missing = [name for name in needed if not hasattr(model, name)]
        if missing:
            raise InvalidInputError(
                f"model: {type(model).__name__} has no {', '.join(missing)}; wanted a model of "
                "torchani 2.4 or newer"
            )
        if not getattr(model, "periodic_table_index", True):
            raise InvalidInputError(
                "model: takes indices of its own instead of atomic numbers; build it with "
                "periodic_table_index=True"
            )
        numbers: Any = model.atomic_numbers
        cutoff: Any = model.cutoff
        super().__init__(
            cutoff=float(cutoff),
            units=units or ModelUnits("angstrom", "hartree"),
            elements=[int(z) for z in numbers],
        )
        self.module = model
        self.charge = int(charge)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of atoms ``(A,)``."""
        # Each pair once: of the two edges, the one that goes up in atoms or, for images of one
        # atom, whose first shift that is not zero is positive.
        first, second, shifts = inputs.first, inputs.second, inputs.shifts
        sign = torch.where(shifts[:, 1] != 0, shifts[:, 1], shifts[:, 2])
        sign = torch.where(shifts[:, 0] != 0, shifts[:, 0], sign)
        kept = (first < second) | ((first == second) & (sign > 0))
        entry: Any = self.module.compute_from_external_neighbors
        # Energies of atoms tell frames apart, which are one large molecule here.
        found = entry(
            inputs.atomic_numbers.unsqueeze(0),
            inputs.positions.unsqueeze(0),
            torch.stack([first[kept], second[kept]]),
            -inputs.offsets[kept],
            charge=self.charge,
            atomic=True,
        )
        energies: Tensor = found[0].squeeze(0)
        return energies
