"""What an energy model of atoms is given, and what it gives back."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor, nn

from mdgraft.neural.units import ModelUnits


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomicInputs:
    """A batch of frames as one graph of atoms and edges, in the model's own units.

    Frames are concatenated: with F frames of N atoms there are A = F N atoms, and no edge joins
    atoms of different frames. Every pair within the cutoff has two edges, one each way; in a small
    cell a pair has one for each image, and an atom may have edges to images of itself.

    Attributes
    ----------
    positions
        ``(A, 3)``.
    atomic_numbers
        ``(A,)``, int64.
    frame
        ``(A,)`` frame of each atom, int64, ascending.
    n_frames
        F.
    cells
        ``(F, 3, 3)``, cell vectors as rows; None in an open system.
    pbc
        In which directions of the cell the system is periodic.
    first, second
        ``(E,)`` atoms at the start and the end of each edge, int64.
    shifts
        ``(E, 3)`` whole numbers of cell vectors, in the dtype of the positions.
    displacements
        ``(E, 3)`` from first to second: ``positions[second] - positions[first] + shifts @ cell``.
        Forces are derivatives through these or through ``positions`` and ``cells``, as the model
        likes.
    """

    positions: Tensor
    atomic_numbers: Tensor
    frame: Tensor
    n_frames: int
    cells: Tensor | None
    pbc: tuple[bool, bool, bool]
    first: Tensor
    second: Tensor
    shifts: Tensor
    displacements: Tensor

    @property
    def n_atoms(self) -> int:
        """Number of atoms A in all frames together."""
        return int(self.positions.shape[0])

    @property
    def offsets(self) -> Tensor:
        """Displacements by whole cells ``(E, 3)``, zero in an open system."""
        if self.cells is None:
            return torch.zeros_like(self.shifts)
        cell = self.cells[self.frame[self.first]]
        return (self.shifts.unsqueeze(-2) @ cell).squeeze(-2)

    def per_frame(self, values: Tensor) -> Tensor:
        """Sum a quantity of atoms ``(A, ...)`` over each frame, ``(F, ...)``."""
        return sum_at(values, self.frame, self.n_frames)

    def split(self, values: Tensor) -> Tensor:
        """A quantity of atoms ``(A, ...)`` with frames apart, ``(F, N, ...)``."""
        return values.reshape(self.n_frames, -1, *values.shape[1:])


class AtomicModel(nn.Module, abc.ABC):
    """An energy model of atoms.

    Any `torch.nn.Module` with the attributes and the ``forward`` of this class will do; deriving
    from it is not needed. A model must be able to take several frames in one call, must be
    differentiable in what it is given, and its energy must not depend on an edge whose length
    reaches the cutoff. A model that finds forces itself is not believed: forces are gradients of
    its energy.

    Parameters
    ----------
    cutoff
        Length of the longest edge that the model wants, in its own unit of length. With several
        rounds of message passing it is that of one round.
    units
        Units that the model computes in.
    elements
        Atomic numbers that the model knows; None if any.
    """

    #: Whether cells may have any shape, rather than OpenMM's reduced form alone.
    general_cell: bool = True

    def __init__(
        self,
        *,
        cutoff: float,
        units: ModelUnits | None = None,
        elements: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        self.cutoff = float(cutoff)
        self.units = ModelUnits() if units is None else units
        self.elements = None if elements is None else tuple(int(z) for z in elements)

    @property
    def mappable(self) -> bool:
        """Whether transforms of ``torch.func`` may go through the model.

        If not, they see it from outside, and `torch.vmap` calls it for one frame after the other.
        A model that says yes computes from ``displacements`` with operations that ``vmap`` knows.
        Under it, edges of other frames may be among them; they have the length of the cutoff, where
        they count for nothing.
        """
        return False

    @abc.abstractmethod
    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)`` or of atoms ``(A,)``, in the model's unit of energy."""


def sum_at(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum rows ``(n, ...)`` into the rows of a result ``(size, ...)`` that ``index`` names."""
    zeros = values.new_zeros(size, *values.shape[1:])
    return zeros.index_add(0, index, values)
