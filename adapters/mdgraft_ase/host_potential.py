"""A potential that a calculator evaluates."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from mdgraft import Potential

from mdgraft_ase._adapter import as_host, host_term
from mdgraft_ase._held import held_by
from mdgraft_ase._parts import Part, parts


class HostPotential(Potential):
    """Energies and forces by a calculator, inside a torch graph.

    What `mdgraft.graft` gives with ``route="host"``, with a choice of parameters. Energies are the
    force-consistent ones (``free_energy``) where the calculator has them. Position gradients are
    the calculator's forces, the box gradient comes from its stress; what it lacks, and derivatives
    in its numerical parameters, are central differences. Second derivatives are differences of
    forces; third ones raise `UnsupportedDerivativeError`. The term's ``engine.steps`` reports the
    steps.

    Parameters
    ----------
    atoms
        ``ase.Atoms`` with a calculator, or a calculator that has seen its atoms.
    parameters
        Names of numerical parameters of the calculator that become parameters of the potential,
        none by default: each costs four evaluations for a derivative. None takes all of those that
        change the energy or the forces of ``atoms``, which is tried out once for each.
    dtype, device
        Of energies.

    Raises
    ------
    InvalidInputError
        If a calculator or atoms are missing, or a parameter is none, is no number or has no effect.
    """

    def __init__(
        self,
        atoms: Any,
        *,
        parameters: Collection[str] | None = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        structure, calculator = as_host(atoms)
        found: dict[str, Part] = parts(calculator, structure)
        terms = {
            name: part.wrapped(host_term(part.atoms, part.calculator, settings=parameters))
            for name, part in found.items()
        }
        super().__init__(terms, n_particles=len(structure), routes=dict.fromkeys(terms, "host"))
        self.held = held_by(structure)
        self.to(dtype=dtype, device=device)
