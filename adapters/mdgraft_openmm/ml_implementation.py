"""What OpenMM-ML asks of a potential, answered with mdgraft's models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.neural import MessagePassingNetwork
from openmm import app
from openmmml.mlpotential import MLPotentialImpl

from mdgraft_openmm.export.to_force import to_force
from mdgraft_openmm.mixed import energy_of, is_model_of_atoms


class MDGraftPotentialImpl(MLPotentialImpl):  # type: ignore[misc]
    """A model as OpenMM-ML uses it.

    Parameters
    ----------
    model
        See `mdgraft_openmm.ml_potential.MDGraftPotentialImplFactory.createImpl`.
    dtype
        Precision in which the model computes; by default its own. A model of atoms that has
        another one is copied.
    backend
        See `mdgraft_openmm.to_force`.

    Raises
    ------
    InvalidInputError
        If the model is of no known kind, or there are other options.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype | None = None,
        backend: Any = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        _check_known("MLPotential('mdgraft', ...)", unknown, ("model", "dtype", "backend"))
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
            Of a mixed system OpenMM-ML hands on its own options here as well, which it has used.

        Raises
        ------
        InvalidInputError
            For other options, or atoms without an element where a model needs one.
        """
        known = {*_OPTIONS} if atoms is None else {*_OPTIONS, *_OF_EMBEDDINGS}
        _check_known("addForces", args.keys() - known, _OPTIONS)
        everything = list(topology.atoms())
        picked = list(range(len(everything))) if atoms is None else [int(i) for i in atoms]
        periodic = args.get("periodic")
        if periodic is None:
            periodic = (
                topology.getPeriodicBoxVectors() is not None
                or system.usesPeriodicBoundaryConditions()
            )
        device, dtype = args.get("device"), args.get("dtype", self.dtype)
        atoms_of_model = [everything[i] for i in picked]
        energy = energy_of(
            self.model,
            _atomic_numbers(atoms_of_model) if is_model_of_atoms(self.model) else None,
            periodic=bool(periodic),
            name="neural",
            dtype=dtype,
            device=device,
        )
        force = to_force(
            energy,
            particles=None if atoms is None else picked,
            periodic=periodic,
            dtype=dtype,
            device=device,
            backend=args.get("backend", self.backend),
            name="mdgraft",
            force_group=forceGroup,
        )
        system.addForce(force)

    def getMLLongRange(self) -> bool:  # noqa: N802
        """Models of atoms end at a cutoff."""
        return False


#: Keywords of `MDGraftPotentialImpl.addForces`, and of ``createSystem`` and ``createMixedSystem``.
_OPTIONS = ("device", "dtype", "backend", "periodic")
#: What OpenMM-ML's own embedding reads from the keywords that it hands on.
_OF_EMBEDDINGS = ("linkAtomDistances", "mlLongRange")


def _check_known(what: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise for keywords that would be ignored."""
    found = sorted(unknown)
    if found:
        raise InvalidInputError(
            f"{', '.join(found)}: {what} of the potential 'mdgraft' has no such keyword and would "
            f"ignore it; the known ones are {', '.join(known)}"
        )


def _atomic_numbers(atoms: list[Any]) -> list[int]:
    bare = [atom.index for atom in atoms if atom.element is None]
    if bare:
        raise InvalidInputError(
            f"topology: the atoms {bare[:10]} have no element, which a model of atoms needs; "
            "leave sites without an element out of atoms"
        )
    return [atom.element.atomic_number for atom in atoms]
