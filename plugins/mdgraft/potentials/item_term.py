"""Terms that are sums over a list of items: bonds, angles, torsions."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Kernel
from mdgraft.kernels.routes import Route, item_kernel, route
from mdgraft.kernels.switch import compiled_kernels
from mdgraft.potentials.term import AbstractTerm

if TYPE_CHECKING:
    from mdgraft.kernels.fused.tuples import TupleFormula


class ItemSum:
    """A sum over items, by a compiled loop where there is one.

    Parameters
    ----------
    particles
        ``(items, P)`` indices.
    plain
        The sum by plain torch operations, ``(positions, box, *quantities) -> (frames,)``, where
        ``box`` is ``(frames, 0, 3)`` unless it matters.
    formula
        Gives the formula of an item; called when it is needed.
    periodic
        Whether vectors are those of the nearest periodic images.
    constants
        The formula's constants by name.
    """

    def __init__(
        self,
        particles: Tensor,
        plain: Callable[..., Tensor],
        formula: Callable[[], TupleFormula],
        *,
        periodic: bool,
        constants: Mapping[str, float] | None = None,
    ) -> None:
        self.particles = particles
        self._seen = _mark(particles)
        self._plain, self._formula = plain, formula
        self._periodic, self._constants = periodic, constants
        self._kernels: dict[Route, Kernel] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to this process.
        return self.__dict__ | {"_kernels": {}}

    def energy(self, positions: Tensor, box: Tensor | None, *quantities: Tensor) -> Tensor:
        """Energies ``(frames,)`` [kJ/mol].

        Parameters
        ----------
        positions, box
            ``(frames, N, 3)``, ``(frames, 3, 3)`` [nm].
        quantities
            Those of items, of particles and shared ones, in the formula's order.
        """
        cell = box if self._periodic else None
        if not compiled_kernels(positions):
            if cell is None:
                cell = positions.new_zeros(positions.shape[0], 0, 3)
            return self._plain(positions, cell, *quantities)
        if self._seen != _mark(self.particles):
            self._seen = _mark(self.particles)
            self._kernels.clear()
        key = route(positions)
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = item_kernel(positions)(
                self._formula(),
                plain_array(self.particles),
                constants=self._constants,
                periodic=self._periodic,
                reference=self._plain,
            )
        return differentiable_energy(kernel, positions, cell, quantities)


class ItemTerm(AbstractTerm):
    """A sum over items whose particles are the buffer ``particles``.

    A subclass names its `quantities`, writes its energy as a formula, and by plain torch operations
    as the reference.
    """

    replays = True

    particles: Tensor
    #: Names of the parameters and buffers that items have, in the formula's order.
    quantities: tuple[str, ...]

    def __init__(self, particles: Tensor, *, periodic: bool) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        self._sum: ItemSum | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sum": None}

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        return True

    @abc.abstractmethod
    def plain(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """Energies ``(frames,)`` by plain torch operations; ``box`` may be ``(frames, 0, 3)``."""

    @staticmethod
    @abc.abstractmethod
    def formula() -> TupleFormula:
        """The energy of an item."""

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        quantities = [
            values[name] if name in values else self.get_buffer(name).to(positions.dtype)
            for name in self.quantities
        ]
        # Buffers may be replaced.
        if self._sum is None or self._sum.particles is not self.particles:
            self._sum = ItemSum(self.particles, self.plain, self.formula, periodic=self.periodic)
        return self._sum.energy(positions, box, *quantities)


def cell_of(box: Tensor) -> Tensor | None:
    """The box that a plain form is handed, or None if there is none."""
    return box if box.shape[1] else None


def plain_array(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor that is no input of a transform, inside of one too."""
    if tensor.device.type == "cpu":
        return np.from_dlpack(tensor.detach() if tensor.requires_grad else tensor).copy()
    return np.array(tensor.tolist()).reshape(tensor.shape)


def _mark(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
