"""The sum of an expression over bonds, angles and other items, as a compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdgraft.kernels.fused.lepton import describe
from mdgraft.kernels.switch import compiled_kernels
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.compiled_pairs import MOST_STEPS
from mdgraft.potentials.item_term import ItemSum, cell_of

if TYPE_CHECKING:
    from mdgraft.kernels.fused.tuples import TupleFormula
    from mdgraft.potentials.custom.item_formula import Measure

#: ``(positions, box, quantities by name) -> energies``.
PlainSum = Callable[[Tensor, "Tensor | None", Mapping[str, Tensor]], Tensor]


class CompiledItems:
    """An expression of items that is compiled when it is first evaluated.

    Parameters
    ----------
    expression
        Of quantities of items, shared ones and measures.
    item, shared
        Names of these quantities. Those of items hide shared ones, measures hide both.
    measures
        By the name or key that the expression has for it, see `item_formula`.
    n_particles
        Particles of an item.
    periodic
        Whether vectors are those of nearest periodic images.
    """

    def __init__(
        self,
        expression: Expression,
        *,
        item: Sequence[str],
        shared: Sequence[str],
        measures: Mapping[str, Measure],
        n_particles: int,
        periodic: bool,
    ) -> None:
        # Also what the expression does not use: its derivatives are zero, not missing.
        self._item, self._shared = tuple(item), tuple(n for n in shared if n not in item)
        self._measures = tuple(measures.values())
        names = {name: f"shared{k}" for k, name in enumerate(self._shared)}
        names |= {name: f"item{k}" for k, name in enumerate(self._item)}
        names |= {name: f"measure{k}" for k, name in enumerate(measures)}
        known = expression.variables <= names.keys()
        short = len(expression.program.steps) <= MOST_STEPS
        self._description = describe(expression.program, names) if known and short else None
        self._n_particles, self._periodic = n_particles, periodic
        self._sum: ItemSum | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sum": None}

    def serve(self, positions: Tensor, n_items: int) -> bool:
        """Whether the expression can be compiled, and it is worth while for so many items."""
        # Many frames make it so for a single item.
        size = max(n_items, positions.shape[0])
        return self._description is not None and compiled_kernels(positions, n_particles=size)

    def serve_frames(self, particles: Tensor) -> bool:
        """Whether the expression is compiled for many frames, where the list of items is."""
        example = torch.empty(0, dtype=torch.float64, device=particles.device)
        return self._description is not None and compiled_kernels(example)

    def energy(
        self,
        positions: Tensor,
        box: Tensor | None,
        particles: Tensor,
        quantities: Mapping[str, Tensor],
        plain: PlainSum,
    ) -> Tensor:
        """Energies ``(frames,)`` [kJ/mol].

        Parameters
        ----------
        positions, box
            ``(frames, N, 3)``, ``(frames, 3, 3)`` [nm].
        particles
            ``(items, n_particles)`` indices, or ``(items,)``.
        quantities
            Those of items ``(items,)`` and shared ones ``()`` by name.
        plain
            The same sum by torch operations.
        """
        # Buffers may be replaced.
        if self._sum is None or self._sum.particles is not particles:
            reference = functools.partial(self._reference, plain)
            self._sum = ItemSum(particles, reference, self._formula, periodic=self._periodic)
        inputs = [quantities[name] for name in (*self._item, *self._shared)]
        return self._sum.energy(positions, box, *inputs)

    def _reference(
        self, plain: PlainSum, positions: Tensor, box: Tensor, *quantities: Tensor
    ) -> Tensor:
        named = dict(zip((*self._item, *self._shared), quantities, strict=True))
        return plain(positions, cell_of(box), named)

    def _formula(self) -> TupleFormula:
        from mdgraft.potentials.custom.item_formula import item_formula

        assert self._description is not None
        return item_formula(
            self._description,
            n_particles=self._n_particles,
            n_item=len(self._item),
            n_shared=len(self._shared),
            measures=self._measures,
        )
