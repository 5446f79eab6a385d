"""What OpenMM-ML asks of a potential, answered with mdgraft's models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import openmm
import torch
from mdgraft import InvalidInputError, Potential
from mdgraft.neural import MessagePassingNetwork, neural_potential
from openmm import app
from openmmml.mlpotential import MLPotentialImpl
from torch import nn

from mdgraft_openmm.export.to_force import to_force


class MDGraftPotentialImpl(MLPotentialImpl):  # type: ignore[misc]
    """A model as OpenMM-ML uses it.

    Parameters
    ----------
    model
        See `mdgraft_openmm.ml_potential.MDGraftPotentialImplFactory.createImpl`.
    dtype
        Precision in which a model of atoms computes; by default its own.
    backend
        See `mdgraft_openmm.to_force`.
    """

    def __init__(
        self, model: Any, *, dtype: torch.dtype | None = None, backend: Any = "auto"
    ) -> None:
        super().__init__()
        if isinstance(model, str | os.PathLike):
            model = MessagePassingNetwork.load(model)
        if not callable(model):
            raise InvalidInputError(
                f"model: got {type(model).__name__}, wanted a model of atoms, a function, a "
                "Potential, or the path of a file that MessagePassingNetwork.save wrote, as in "
                "MLPotential('mdgraft', model=network)"
            )
        self.model: Callable[..., Any] = model
        self.dtype = dtype
        self.backend = backend

    def addForces(  # noqa: N802
        self,
        topology: app.Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        **args: Any,
    ) -> None:
        """Add the model's force, of all atoms or of some, to a System.

        Parameters
        ----------
        topology
            Gives elements, and by its box whether the model is periodic; so does the System.
        system
            Is changed.
        atoms
            Particles in the order in which the model gets them; all if None.
        forceGroup
            Of the force.
        **args
            ``device`` and ``dtype`` say where the model computes, ``backend`` how (see
            `mdgraft_openmm.to_force`), and ``periodic`` overrides what topology and System say.
            OpenMM-ML hands on its own options here as well, which are ignored.
        """
        everything = list(topology.atoms())
        picked = list(range(len(everything))) if atoms is None else [int(i) for i in atoms]
        periodic = args.get("periodic")
        if periodic is None:
            periodic = (
                topology.getPeriodicBoxVectors() is not None
                or system.usesPeriodicBoundaryConditions()
            )
        device = args.get("device")
        force = to_force(
            self._energy([everything[i] for i in picked], periodic, args.get("dtype", self.dtype)),
            particles=None if atoms is None else picked,
            periodic=periodic,
            device=torch.device(device) if isinstance(device, str) else device,
            backend=args.get("backend", self.backend),
            name="mdgraft",
            force_group=forceGroup,
        )
        system.addForce(force)

    def getMLLongRange(self) -> bool:  # noqa: N802
        """Models of atoms end at a cutoff."""
        return False

    def _energy(self, atoms: list[Any], periodic: bool, dtype: torch.dtype | None) -> Any:
        model = self.model
        if isinstance(model, Potential) or not (
            isinstance(model, nn.Module) and hasattr(model, "units")
        ):
            return model
        bare = [atom.index for atom in atoms if atom.element is None]
        if bare:
            raise InvalidInputError(
                f"topology: the atoms {bare[:10]} have no element, which a model of atoms needs; "
                "leave sites without an element out of atoms"
            )
        numbers = [atom.element.atomic_number for atom in atoms]
        return neural_potential(model, numbers, pbc=bool(periodic), name="neural", dtype=dtype)
