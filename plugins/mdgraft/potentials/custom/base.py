"""What all terms with expressions share: parameters under the user's names, tables, globals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft._units import DIMENSIONLESS
from mdgraft.lepton import TabulatedFunction
from mdgraft.potentials.term import AbstractTerm

#: Tabulated functions with their values ``(entries,)``, by name.
Tables = Mapping[str, tuple[TabulatedFunction, Tensor]]


def parameter_key(name: str) -> str:
    """What a term calls a parameter: dots separate modules, and no name is empty."""
    return name.replace(".", "_") or "_"


def parameter_keys(names: Sequence[str]) -> list[str]:
    """`parameter_key` of each name; repeats get ``_1``, ``_2``.

    Per-item parameters come first, tabulated functions after them: an expression may well use one
    name for both.
    """
    keys: list[str] = []
    for name in names:
        key, repeat = parameter_key(name), 0
        while key in keys:
            repeat += 1
            key = f"{parameter_key(name)}_{repeat}"
        keys.append(key)
    return keys


class AbstractCustomTerm(AbstractTerm):
    """A term whose energy is an expression of parameters that the user named.

    Parameters
    ----------
    parameters
        Values ``(items,)`` of each per-item parameter by name, in the host's order.
    global_names
        Names of the global parameters that the expression may use.
    tables
        Tabulated functions and their values; the values are parameters too, under the function's
        name.
    periodic
        Whether the energy depends on the box.
    """

    replays = True

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        periodic: bool = False,
    ) -> None:
        super().__init__(periodic=periodic)
        tables = tables or {}
        self.global_names = tuple(global_names)
        keys = parameter_keys([*parameters, *tables])
        self.item_keys = dict(zip(parameters, keys, strict=False))
        self.table_keys = dict(zip(tables, keys[len(parameters) :], strict=True))
        self.tabulated = {name: function for name, (function, _) in tables.items()}
        for name, value in parameters.items():
            self.add_parameter(self.item_keys[name], value, DIMENSIONLESS)
        for name, (_, entries) in tables.items():
            self.add_parameter(self.table_keys[name], entries, DIMENSIONLESS)

    # Users choose names freely; what a term itself keeps under such a name gives way.

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As of `torch.nn.Module`; where a parameter or inner term has the name, under another."""
        if name in self._parameters or name in self._modules:
            own = parameter_keys([*self._parameters, *self._buffers, name])[-1]
            self.__dict__.setdefault("_renamed", {})[name] = name = own
        super().register_buffer(name, tensor, persistent)

    def __getattr__(self, name: str) -> Any:
        renamed: dict[str, str] = self.__dict__.get("_renamed", {})
        return super().__getattr__(renamed.get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        renamed: dict[str, str] = self.__dict__.get("_renamed", {})
        name = renamed.get(name, name)
        taken = any(name in self.__dict__.get(kind, {}) for kind in ("_parameters", "_modules"))
        if taken and not isinstance(value, nn.Parameter | nn.Module):
            # Found before the parameter or the term, which nobody asks for in this way.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def arities(self) -> dict[str, int]:
        """Number of arguments of each tabulated function, as `Expression` wants it."""
        return {name: function.arguments for name, function in self.tabulated.items()}

    def item_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per-item parameters ``(items,)`` by the names that expressions use."""
        return {name: values[key] for name, key in self.item_keys.items()}

    def shared_values(self, global_values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Global parameters ``()`` by the names that expressions use."""
        return {name: global_values[parameter_key(name)] for name in self.global_names}

    def entries(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries ``(entries,)`` of tabulated functions by the names that expressions use.

        Raises
        ------
        InvalidInputError
            For another number of entries than the function has.
        """
        for name, key in self.table_keys.items():
            wanted = (math.prod(self.tabulated[name].sizes),)
            # Compiled loops would read beyond the end of what is too short.
            if values[key].shape != wanted:
                raise InvalidInputError(
                    f"{key}: got values of shape {tuple(values[key].shape)}, wanted {wanted}, one "
                    "for each entry of the tabulated function; replace all of them"
                )
        return {name: values[key] for name, key in self.table_keys.items()}

    def functions(self, values: Mapping[str, Tensor]) -> dict[str, Callable[..., Tensor]]:
        """Tabulated functions with the present values, as `Expression` wants them."""
        entries = self.entries(values)
        return {
            name: functools.partial(function, entries[name])
            for name, function in self.tabulated.items()
        }
