"""Interactions of donors with acceptors, with an expression of their geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.pairs import exclusion_keys, neighbor_pairs
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables
from mdgraft.potentials.custom.points import GEOMETRY
from mdgraft.potentials.custom.tuples import Tuples, by_frame, in_every_frame

_LABELS = ("d1", "d2", "d3", "a1", "a2", "a3")


class CustomHbond(AbstractCustomTerm):
    """A sum over pairs of a donor and an acceptor of an expression of six particles.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of ``distance``, ``angle`` and ``dihedral`` of ``d1`` to ``a3``, of
        per-donor, per-acceptor and global parameters.
    donors, acceptors
        ``(n, 3)`` particle indices; -1 for one that is not there.
    donor_parameters, acceptor_parameters
        Values ``(donors,)`` and ``(acceptors,)`` of each parameter by name.
    exclusions
        ``(exclusions, 2)`` indices of donors and acceptors.
    cutoff
        Largest distance of ``d1`` and ``a1`` [nm]; infinite for all pairs.
    periodic
        Whether distances are those of nearest periodic images.
    global_names, tables
        See `AbstractCustomTerm`.
    where
        What errors call the expression.

    Raises
    ------
    InvalidInputError
        If the expression is one that OpenMM refuses, or uses a particle that is not there.
    """

    donors: Tensor
    acceptors: Tensor
    excluded: Tensor

    def __init__(
        self,
        energy: str,
        donors: Tensor,
        acceptors: Tensor,
        donor_parameters: Mapping[str, Tensor],
        acceptor_parameters: Mapping[str, Tensor],
        *,
        exclusions: Tensor,
        cutoff: float = math.inf,
        periodic: bool = False,
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        where: str = "energy",
    ) -> None:
        super().__init__(
            {**donor_parameters, **acceptor_parameters},
            global_names=global_names,
            tables=tables,
            periodic=periodic,
        )
        self.donor_names = tuple(donor_parameters)
        self.cutoff = cutoff
        self.register_buffer("donors", donors)
        self.register_buffer("acceptors", acceptors)
        # One list of sites, donors first, serves the neighbour search.
        n_sites = donors.shape[0] + acceptors.shape[0]
        shifted = exclusions + exclusions.new_tensor([0, donors.shape[0]])
        self.register_buffer("excluded", exclusion_keys(shifted, n_sites), persistent=False)
        self.energy = Expression(
            energy,
            variables=(*donor_parameters, *acceptor_parameters, *global_names),
            functions=self.arities,
            geometry=GEOMETRY,
            labels=_LABELS,
            where=where,
        )
        present = dict(zip(_LABELS, (*donors.unbind(-1), *acceptors.unbind(-1)), strict=True))
        for call in self.energy.calls:
            for label in call.arguments:
                if bool((present[label] < 0).any()):
                    raise InvalidInputError(
                        f"{where}: uses {label}, which entry {int(present[label].argmin())} of the "
                        f"{'donors' if label[0] == 'd' else 'acceptors'} does not have"
                    )

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        donor, acceptor, tuples = self._pairs(positions, box)
        within = torch.ones_like(tuples.frame, dtype=torch.bool)
        if math.isfinite(self.cutoff):
            within = tuples.distance(0, 3) < self.cutoff
            tuples = tuples.only(within, self.cutoff)
        variables = self.shared_values(global_values)
        for name, value in self.item_values(values).items():
            variables[name] = value[donor if name in self.donor_names else acceptor]
        variables |= tuples.variables(self.energy, _LABELS)
        energies = self.energy(variables, self.functions(values), like=positions)
        energies = torch.where(within, energies.expand(donor.shape[0]), 0.0)
        nothing = (value.flatten()[:0].sum() for value in values.values())
        unused = sum(nothing, positions.new_zeros(()))
        return tuples.sum(energies) + unused + 0.0 * positions.sum(dim=(-2, -1))

    def _pairs(self, positions: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor, Tuples]:
        """Donor and acceptor of each pair, and the pairs' particles."""
        n, m = self.donors.shape[0], self.acceptors.shape[0]
        if math.isinf(self.cutoff):
            donor = torch.arange(n, device=positions.device).repeat_interleave(m)
            acceptor = torch.arange(m, device=positions.device).repeat(n)
            keep = ~torch.isin(donor * (n + m) + acceptor + n, self.excluded)
            donor, acceptor = donor[keep], acceptor[keep]
            particles = torch.cat([self.donors[donor], self.acceptors[acceptor]], dim=-1)
            tuples = in_every_frame(particles, positions, box)
            n_frames = positions.shape[0]
            return donor.repeat(n_frames), acceptor.repeat(n_frames), tuples
        sites = positions[:, torch.cat([self.donors[:, 0], self.acceptors[:, 0]])]
        pairs = neighbor_pairs(sites, box, cutoff=self.cutoff, excluded=self.excluded)
        assert pairs.frame is not None
        low = torch.minimum(pairs.first, pairs.second)
        high = torch.maximum(pairs.first, pairs.second)
        keep = (low < n) & (high >= n)
        donor, acceptor = low[keep], high[keep] - n
        particles = torch.cat([self.donors[donor], self.acceptors[acceptor]], dim=-1)
        return donor, acceptor, by_frame(pairs.frame[keep], particles, positions, box)
