"""TorchMD-Net models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class TorchMDNetModel(AtomicModel):
    """A model of the ``torchmd-net`` package, ``(z, pos, batch, box, q) -> (energy, forces)``.

    The model makes its own lists of neighbours, by the minimum image: cells must be in OpenMM's
    reduced form, periodic in all directions, and at least two cutoffs wide. Frames of a periodic
    system are evaluated one by one, since the model takes one box. The reference is Pelaez et al.,
    J. Chem. Theory Comput. 20, 4076 (2024).

    Parameters
    ----------
    model
        A ``TorchMD_Net`` that was built with ``derivative=False``.
    units
        Angstrom and eV unless the model was trained otherwise.
    charge
        Total charge, for models that ask for it.
    elements
        Atomic numbers that the model was trained on; None if not known.

    Raises
    ------
    InvalidInputError
        If the model is something else, or finds forces itself.
    """

    general_cell = False

    def __init__(
        self,
        model: nn.Module,
        *,
        units: ModelUnits | None = None,
        charge: float | None = None,
        elements: Collection[int] | None = None,
    ) -> None:
        representation: Any = getattr(model, "representation_model", None)
        cutoff = getattr(representation, "cutoff_upper", None)
        if cutoff is None:
            raise InvalidInputError(
                f"model: {type(model).__name__} has no representation_model with a cutoff_upper; "
                "wanted a TorchMD_Net, as torchmdnet.models.model.load_model returns it"
            )
        if getattr(model, "derivative", False):
            raise InvalidInputError(
                "model: finds forces itself, which cuts the graph of its energy; load it with "
                "derivative=False"
            )
        super().__init__(
            cutoff=float(cutoff), units=units or ModelUnits("angstrom", "eV"), elements=elements
        )
        self.module = model
        self.charge = charge

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)``."""
        if inputs.cells is None:
            return self._call(inputs.atomic_numbers, inputs.positions, inputs.frame, None)
        self._check_cells(inputs)
        numbers = inputs.split(inputs.atomic_numbers)
        frames = zip(numbers, inputs.split(inputs.positions), inputs.cells, strict=True)
        return torch.cat([self._call(z, x, torch.zeros_like(z), cell) for z, x, cell in frames])

    def _call(
        self, numbers: Tensor, positions: Tensor, frame: Tensor, box: Tensor | None
    ) -> Tensor:
        options: dict[str, Any] = {} if box is None else {"box": box}
        if self.charge is not None:
            n_frames = int(frame[-1]) + 1
            options["q"] = positions.detach().new_full((n_frames,), self.charge)
        energies: Tensor = self.module(numbers, positions, frame, **options)[0]
        return energies.reshape(-1)

    def _check_cells(self, inputs: AtomicInputs) -> None:
        assert inputs.cells is not None
        cells = inputs.cells.detach()
        least = float(cells.diagonal(dim1=-2, dim2=-1).min())
        if not all(inputs.pbc) or least < 2 * self.cutoff:
            raise InvalidInputError(
                f"box: TorchMD-Net wants cells that are periodic in all directions and at least "
                f"{2 * self.cutoff:g} on the diagonal; got pbc {inputs.pbc} and, on the diagonal, "
                f"{least:g} in the model's unit of length"
            )
