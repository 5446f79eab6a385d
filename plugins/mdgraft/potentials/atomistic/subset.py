"""A term of some particles alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mdgraft.potentials.term import AbstractTerm


class Subset(AbstractTerm):
    """Another term's energy of some particles without periods, times a constant factor.

    Parameters
    ----------
    term
        The other term, of that many particles; its parameters become ``term.<name>``.
    particles
        ``(n,)`` indices.
    factor
        Such as -1 for an energy that is taken away.
    centre
        ``(3,)`` [nm] where the mean of the positions is moved to, for energies that depend on
        where particles are; None leaves them where they are.
    """

    particles: Tensor
    centre: Tensor | None

    def __init__(
        self,
        term: AbstractTerm,
        particles: Tensor,
        *,
        factor: float = 1.0,
        centre: Tensor | None = None,
    ) -> None:
        super().__init__(periodic=False)
        self.factor = factor
        self.register_buffer("particles", particles)
        self.register_buffer("centre", centre)
        self.add_term("term", term)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        own = positions[:, self.particles]
        if self.centre is not None:
            own = own - own.mean(dim=1, keepdim=True) + self.centre
        term = self.inner_terms()["term"]
        result: Tensor = term(own, None, self.inner_values("term", values), global_values)
        return self.factor * result
