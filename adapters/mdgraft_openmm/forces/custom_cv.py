"""CustomCVForce."""

from __future__ import annotations

from typing import Any

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.base import parameter_keys
from mdgraft.potentials.custom.collective_variables import CollectiveVariables

from mdgraft_openmm._classes import known_class
from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    declared_globals,
    set_declared_global,
)
from mdgraft_openmm.export.derivatives import VARIABLE
from mdgraft_openmm.export.term import TorchTerm
from mdgraft_openmm.forces import _nested
from mdgraft_openmm.forces._custom import global_names, refused_tables, tables, write_tables
from mdgraft_openmm.forces.python_force import PythonForceConverter, refuse_changes


class CustomCVConverter(AbstractConverter):
    """CustomCVForce <-> CollectiveVariables."""

    def read(self, force: openmm.CustomCVForce, host: Host) -> CollectiveVariables | TorchTerm:
        """Build the term and those of its variables; of an export with derivatives, its module."""
        exported = _exported(force)
        if exported is not None:
            return _EXPORTED.read(exported, host)
        names = _names(force)
        for name in names:
            if names.count(name) > 1:
                raise InvalidInputError(
                    f"{force.getName()}: two collective variables are called {name!r}; rename one"
                )
        variables = {n: _variable(force, i) for i, n in enumerate(names)}
        return CollectiveVariables(
            force.getEnergyFunction(),
            _nested.read_inner(force, variables, host),
            global_names=global_names(force),
            tables=tables(force),
            where=f"{force.getName()}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomCVForce) -> None:
        """Set the parameters of the variables and tabulated functions."""
        if _exported(force) is not None:
            return
        _nested.write_inner(_variables(force), values)
        write_tables(force, values, ())

    def refused(self, values: Values, force: openmm.CustomCVForce) -> str | None:
        """Ask the variables, and find periodic tables whose ends differ."""
        if (exported := _exported(force)) is not None:
            refuse_changes(values, exported, force.getName())
            return None
        return _nested.refused_inner(_variables(force), values) or refused_tables(force, values, ())

    def structural(self, values: Values, force: openmm.CustomCVForce) -> list[str]:
        """A live Context takes over tabulated functions, but no change of a variable."""
        if _exported(force) is not None:
            return []
        return _nested.changed_inner(_variables(force), values)

    def global_defaults(self, force: openmm.CustomCVForce) -> dict[str, float]:
        """Those of the variables too; the force's own win."""
        return _nested.inner_globals(_variables(force)) | declared_globals(force)

    def set_global_default(self, force: openmm.CustomCVForce, name: str, value: float) -> None:
        """Declare it here and in the variables."""
        set_declared_global(force, name, value)
        _nested.set_inner_global(_variables(force), name, value)


def _names(force: openmm.CustomCVForce) -> list[str]:
    count = force.getNumCollectiveVariables()
    return [force.getCollectiveVariableName(i) for i in range(count)]


def _variable(force: openmm.CustomCVForce, index: int) -> Any:
    return known_class(force.getCollectiveVariable(index))


def _variables(force: openmm.CustomCVForce) -> dict[str, Any]:
    """The variables by the names of their terms."""
    keys = parameter_keys(_names(force))
    return {key: _variable(force, i) for i, key in enumerate(keys)}


_EXPORTED = PythonForceConverter()


def _exported(force: openmm.CustomCVForce) -> Any | None:
    """The force with the energy of an export that has derivatives in parameters."""
    names = _names(force)
    return _variable(force, 0) if names[:1] == [VARIABLE] else None
