"""PythonForce, as far as `to_force` made it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import ParameterMismatchError, UnsupportedForceError

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices
from mdgraft_openmm.export.callbacks import callback_of, particles_of
from mdgraft_openmm.export.term import TorchTerm, module_parameters


class PythonForceConverter(AbstractConverter):
    """PythonForce <-> TorchTerm."""

    def read(self, force: Any, host: Host) -> TorchTerm:
        """Unwrap the module of an export; any other function only OpenMM can evaluate."""
        callback = callback_of(force)
        if callback is None:
            raise UnsupportedForceError(
                f"{force.getName()}: runs a Python function, which has no torch form"
            )
        chosen = particles_of(force, callback)
        n_particles = host.system.getNumParticles()
        checked_indices(force.getName(), [(i,) for i in chosen], 0, n_particles=n_particles)
        return TorchTerm(callback.evaluator.function, chosen)

    def write(self, values: Values, force: Any) -> None:
        """Nothing: what differs is refused."""

    def refused(self, values: Values, force: Any) -> str | None:
        """Refuse what differs, see `refuse_changes`."""
        refuse_changes(values, force, force.getName())
        return None

    def global_defaults(self, force: openmm.Force) -> dict[str, float]:
        """Those that the force was made with."""
        return {name: float(value) for name, value in force.getGlobalParameters().items()}

    def settable_globals(self, force: openmm.Force) -> Collection[str]:
        """None: there is no setter."""
        return ()


def refuse_changes(values: Values, force: Any, name: str) -> None:
    """Refuse what differs: a module keeps its own parameters, and the force a copy for files.

    Raises
    ------
    ParameterMismatchError
        If a parameter is not the module's; it calls the force by the name given.
    """
    callback = callback_of(force)
    own = module_parameters(callback.evaluator.function) if callback is not None else {}
    for key, value in own.items():
        if not np.array_equal(values[key], value.detach().to("cpu", torch.float64).numpy()):
            raise ParameterMismatchError(
                f"{name}.{key}: belongs to a torch module, which OpenMM does not write; load the "
                "new values with module.load_state_dict and export the module again with to_force"
            )
