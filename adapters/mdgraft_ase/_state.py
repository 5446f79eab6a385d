"""Whether an energy function is still the one that cached results came from."""

from __future__ import annotations

import functools
import inspect
import itertools
import numbers
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from torch import Tensor, nn

# What is not looked into. A calculator, this one as well, changes with every calculation.
_OPAQUE = (types.ModuleType, type, types.BuiltinFunctionType, BaseCalculator)
# Attributes of modules that are compared.
_PLAIN = (int, float, complex, str, np.ndarray, np.generic, Tensor)


class Snapshot:
    """The contents of everything that an energy function depends on, at one moment.

    Contents and not version counters are compared: writing through ``.data``, a NumPy view or
    ``Module.to`` leaves the counters as they were.

    Parameters
    ----------
    function
        A module or any other callable; see `leaves`.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._contents = [_copied(leaf) for leaf in leaves(function)]

    def current(self) -> bool:
        """Whether nothing has changed since."""
        present = list(leaves(self._function))
        return len(present) == len(self._contents) and all(
            _same(a, b) for a, b in zip(present, self._contents, strict=True)
        )


def leaves(function: Any) -> Iterator[Any]:
    """Tensors, arrays and numbers that a callable depends on, as far as Python can tell.

    Parameters, buffers and plain attributes of a module; for other callables, what the object that
    they are bound to, their closure, defaults, partial arguments and the globals that they name
    hold.
    """
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        item = waiting.pop()
        if isinstance(item, numbers.Number | str):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Tensor | np.ndarray):
                yield item
            elif isinstance(item, nn.Module):
                yield from _of_module(item, seen)
            elif not isinstance(item, _OPAQUE):
                waiting += reversed(_parts(item))


def _of_module(item: nn.Module, seen: set[int]) -> Iterator[Any]:
    for module in item.modules():
        seen.add(id(module))
        # Beside the module's dictionaries: whether it trains, and what else was assigned to it.
        yield from (v for v in vars(module).values() if isinstance(v, _PLAIN))
    yield from item.parameters()
    yield from item.buffers()


def _parts(item: Any) -> list[Any]:
    """What a callable or container holds."""
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if inspect.ismethod(item):
        return [item.__self__, item.__func__]
    if inspect.isfunction(item):
        try:
            named = inspect.getclosurevars(item)
        except ValueError:  # A name of the closure has no value yet.
            return []
        return [
            *named.nonlocals.values(),
            *named.globals.values(),
            *(item.__defaults__ or ()),
            *(item.__kwdefaults__ or {}).values(),
        ]
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    slots = [np.atleast_1d(vars(cls).get("__slots__", ())) for cls in type(item).__mro__]
    in_slots = [getattr(item, str(name), None) for name in itertools.chain(*slots)]
    return [*getattr(item, "__dict__", {}).values(), *in_slots]


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _same(leaf: Any, copy: Any) -> bool:
    if type(leaf) is not type(copy) and not (isinstance(leaf, Tensor) and isinstance(copy, Tensor)):
        return False
    if isinstance(leaf, Tensor):
        alike = leaf.dtype == copy.dtype and leaf.device == copy.device
        return alike and torch.equal(leaf.detach(), copy)
    if isinstance(leaf, np.ndarray):
        return leaf.dtype == copy.dtype and np.array_equal(leaf, copy)
    return bool(leaf == copy)
