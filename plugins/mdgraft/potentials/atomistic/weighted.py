"""A term times a factor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mdgraft._units import DIMENSIONLESS
from mdgraft.potentials.term import AbstractTerm


class Weighted(AbstractTerm):
    """Another term's energy times a weight, which can be trained.

    Parameters
    ----------
    term
        The other term; its parameters become ``term.<name>``.
    weight
        ``()``, dimensionless.
    """

    def __init__(self, term: AbstractTerm, weight: Tensor) -> None:
        super().__init__(periodic=term.periodic)
        self.general_cell = term.general_cell
        self.borrows = term.borrows
        self.add_parameter("weight", weight, DIMENSIONLESS)
        self.add_term("term", term)
        if hasattr(term, "particle_energies"):
            self.particle_energies: Callable[..., Tensor] = self._particle_energies

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        term = self.inner_terms()["term"]
        inner = self.inner_values("term", values)
        result: Tensor = values["weight"] * term(positions, box, inner, global_values)
        return result

    def _particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        term: Any = self.inner_terms()["term"]
        inner = self.inner_values("term", values)
        result: Tensor = values["weight"] * term.particle_energies(
            positions, box, inner, global_values
        )
        return result
