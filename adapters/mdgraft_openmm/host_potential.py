"""A potential that OpenMM evaluates."""

from __future__ import annotations

from typing import Any

import torch
from mdgraft import Potential

from mdgraft_openmm._adapter import as_host, global_parameters, read_terms
from mdgraft_openmm._converter import global_key
from mdgraft_openmm._held import held_by
from mdgraft_openmm.virtual_sites import read_sites


class HostPotential(Potential):
    """Energies and forces by OpenMM, on the platform of a Context, inside a torch graph.

    What `mdgraft.graft` gives with ``route="host"``: one term for each Force, each with the same
    parameters as its native form; a Force of unknown class has its global parameters. Position
    gradients are OpenMM's forces. Derivatives in global parameters that the Force declares
    (``addEnergyParameterDerivative``) are OpenMM's, in other parameters they are central
    differences: exact where the energy is a polynomial in the parameter, and otherwise good to
    about 1e-9 on the Reference platform. Second derivatives are differences of forces; third ones
    raise `UnsupportedDerivativeError`. The term's ``engine.steps`` reports the steps.

    The Context stays as it is: each Force runs in a Context of its own on the same platform.

    Parameters
    ----------
    context
        ``openmm.Context`` or ``app.Simulation``; also a ``System``, which runs on Reference.
    dtype
        Of energies; OpenMM computes in its platform's precision all the same.
    device
        Where energies and gradients go.

    Raises
    ------
    UnsupportedHostError
        If ``context`` is none of these.
    InvalidInputError
        If OpenMM cannot run a force, or its parameters are not finite.
    """

    def __init__(
        self,
        context: Any,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        host = as_host(context)
        terms = read_terms(host, "host")
        shared = global_parameters(host, terms)
        super().__init__(
            terms,
            n_particles=host.system.getNumParticles(),
            global_parameters={
                global_key(name): torch.tensor(value, dtype=torch.float64)
                for name, value in shared.items()
            },
            sites=read_sites(host.system),
            routes=dict.fromkeys(terms, "host"),
        )
        self.held = held_by(host.system)
        self.to(dtype=dtype, device=device)
