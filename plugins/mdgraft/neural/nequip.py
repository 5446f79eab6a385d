"""NequIP and Allegro models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel
from mdgraft.neural.units import ModelUnits


class NequIPModel(AtomicModel):
    """A model of the ``nequip`` package or of Allegro, in the format of NequIP 0.7 or newer.

    Takes the dictionary that such models take (``pos``, ``edge_index``, ``edge_cell_shift``,
    ``cell``, ``atom_types``, ``batch``, ``num_atoms``) and returns ``atomic_energy``. A model that
    finds forces as well is asked for its energy alone: what it holds under ``func`` is used. The
    reference is Batzner, Musaelian, Sun, Geiger, Mailoa, Kornbluth, Molinari, Smidt, Kozinsky, Nat.
    Commun. 13, 2453 (2022).

    Parameters
    ----------
    model
        A ``GraphModel``, or the energy model inside it.
    elements
        Atomic number of each of the model's atom types, in order.
    cutoff
        In the model's unit of length; by default ``r_max`` of the model's metadata.
    units
        Angstrom and eV unless the model was trained otherwise.

    Raises
    ------
    InvalidInputError
        If no cutoff is known.
    """

    types: Tensor

    def __init__(
        self,
        model: nn.Module,
        elements: Sequence[int],
        *,
        cutoff: float | None = None,
        units: ModelUnits | None = None,
    ) -> None:
        if cutoff is None:
            metadata: Any = getattr(model, "metadata", {})
            if "r_max" not in metadata:
                raise InvalidInputError(
                    f"cutoff: got None, but the metadata of {type(model).__name__} has no r_max; "
                    "pass the cutoff"
                )
            cutoff = float(metadata["r_max"])
        known = [int(z) for z in elements]
        super().__init__(cutoff=cutoff, units=units or ModelUnits("angstrom", "eV"), elements=known)
        self.module = _energy_model(model)
        types = torch.zeros(max(known) + 1, dtype=torch.long)
        types[torch.tensor(known)] = torch.arange(len(known))
        self.register_buffer("types", types, persistent=False)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of atoms ``(A,)``."""
        n_frames = inputs.n_frames
        counts = torch.full((n_frames,), inputs.n_atoms // n_frames, device=inputs.frame.device)
        data = {
            "pos": inputs.positions,
            "edge_index": torch.stack([inputs.first, inputs.second]),
            "atom_types": self.types[inputs.atomic_numbers],
            "batch": inputs.frame,
            "num_atoms": counts,
        }
        if inputs.cells is not None:
            data["cell"] = inputs.cells
            data["edge_cell_shift"] = inputs.shifts
        energies: Tensor = self.module(data)["atomic_energy"].squeeze(-1)
        return energies


def _energy_model(model: nn.Module) -> nn.Module:
    """What finds energies, without the layer around it that differentiates them."""
    while not hasattr(model, "func"):
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
    func = model.func
    differentiates = type(model).__name__.endswith("Output")
    return func if differentiates and isinstance(func, nn.Module) else model
