"""One frame's energy of whatever a user calls a model."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import openmm
import torch
from mdgraft import InvalidInputError, Potential
from torch import Tensor, nn

from mdgraft_openmm._converter import global_key


class EnergyFunction:
    """A module or callable as a function of one frame.

    Parameters
    ----------
    module
        ``(positions, box, **globals) -> energy``, or ``-> (energy, forces)``; the box may be left
        out of the signature of a model that knows none. An mdgraft `Potential` takes its global
        parameters by name.
    periodic
        Whether there is a box.
    defaults
        Global parameters with their defaults.
    dtype, device
        Of the tensors that the module gets.
    compiled
        Whether ``torch.compile`` compiles it, when it is called for the first time.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        *,
        periodic: bool,
        defaults: Mapping[str, float],
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        self.module = module
        self.periodic = periodic
        self.defaults = dict(defaults)
        self.dtype = dtype
        self.device = device
        self.compiled = compiled
        self.takes_box = isinstance(module, Potential) or _takes_box(module, periodic, defaults)
        self._call: Callable[..., Any] | None = None

    def __call__(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Energy ``()`` [kJ/mol] and, if the module computes them, forces ``(N, 3)`` [kJ/mol/nm].

        Parameters
        ----------
        positions
            ``(N, 3)`` [nm].
        box
            ``(3, 3)`` [nm], or None.
        values
            Global parameters by name.

        Raises
        ------
        InvalidInputError
            If the module returns something else.
        """
        result = self.call(positions, box, values)
        pair = isinstance(result, tuple) and len(result) == 2
        energy, forces = result if pair else (result, None)
        if not isinstance(energy, Tensor) or energy.numel() != 1:
            raise InvalidInputError(
                f"module: returned {_described(energy)} for one frame, wanted one energy, or a "
                "pair (energy, forces), as tensors; add up the energies of its parts"
            )
        if forces is not None and (
            not isinstance(forces, Tensor) or forces.shape != positions.shape
        ):
            raise InvalidInputError(
                f"module: returned {_described(forces)} as forces, wanted a tensor of shape "
                f"{tuple(positions.shape)}"
            )
        return energy.reshape(()) if energy.ndim else energy, forces

    def call(self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]) -> Any:
        """Whatever the module returns."""
        if self._call is None:
            self._call = self._callable()
        return self._call(positions, box, values)

    def _callable(self) -> Callable[..., Any]:
        module = self.module
        if isinstance(module, Potential):
            return self._of_potential
        # torch.compile returns the same type of thing that it gets.
        call: Any = torch.compile(module) if self.compiled else module
        if self.takes_box and not self.defaults:
            return lambda x, box, values: call(x, box)
        if self.takes_box:
            return lambda x, box, values: call(x, box, **values)
        return lambda x, box, values: call(x, **values)

    def _of_potential(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]
    ) -> Tensor:
        # Replacing values makes all others constants, whose gradients cost nothing.
        potential = self.module
        assert isinstance(potential, Potential)
        replaced = {f"globals.{global_key(name)}": value for name, value in values.items()}
        energies = potential.energy_by_term(positions, box, values=potential.values(replaced))
        if not energies:
            return 0.0 * positions.sum()
        return torch.stack(list(energies.values())).sum()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_call": None}
        if isinstance(self.module, torch.jit.ScriptModule):
            # TorchScript has a format of its own and no pickle.
            buffer = io.BytesIO()
            torch.jit.save(self.module, buffer)
            state["module"] = _Scripted(buffer.getvalue())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]
        if isinstance(module, _Scripted):
            where = None if torch.cuda.is_available() else "cpu"
            load: Any = torch.jit.load
            module = load(io.BytesIO(module.content), map_location=where)
        self.__dict__.update(state, module=module)


@dataclasses.dataclass(frozen=True)
class _Scripted:
    """What ``torch.jit.save`` writes."""

    content: bytes


def defaults_of(
    module: Callable[..., Any], asked: Mapping[str, Any] | Iterable[str] | None
) -> dict[str, float]:
    """Global parameters with their defaults.

    Names without a value take that of the potential or of the signature; a `Potential` has all of
    its own unless told otherwise.

    Raises
    ------
    InvalidInputError
        If a name is not known, repeats or is empty, or a default is missing or not finite.
    """
    known = _known_defaults(module)
    if asked is None:
        asked = known if isinstance(module, Potential) else {}
    if isinstance(asked, str):
        asked = [asked]
    named = asked if isinstance(asked, Mapping) else dict.fromkeys(asked)
    defaults: dict[str, float] = {}
    for name, value in named.items():
        if not isinstance(name, str) or not name:
            raise InvalidInputError(
                f"global_parameters: got {name!r}, wanted a mapping from names to defaults, "
                "or names"
            )
        if isinstance(module, Potential) and global_key(name) not in known:
            raise InvalidInputError(
                f"global_parameters: the potential has no global parameter {name!r}; there are "
                f"{sorted(known)}"
            )
        if isinstance(module, Potential) and global_key(name) in map(global_key, defaults):
            raise InvalidInputError(
                f"global_parameters: {name!r} is a global parameter that was named before"
            )
        if value is None:
            value = known.get(global_key(name) if isinstance(module, Potential) else name)
        if value is None:
            raise InvalidInputError(
                f"global_parameters: {name!r} has no default; pass a mapping such as "
                f"{{{name!r}: 1.0}}"
            )
        try:
            if hasattr(value, "value_in_unit_system"):
                value = value.value_in_unit_system(openmm.unit.md_unit_system)
            defaults[name] = float(value)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"global_parameters: the default of {name!r} is {value!r}, wanted a number"
            ) from error
        if not math.isfinite(defaults[name]):
            raise InvalidInputError(
                f"global_parameters: the default of {name!r} is {defaults[name]}, wanted a finite "
                "number"
            )
    return defaults


def kind_of(
    module: Any, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Precision and device of the tensors that a module wants: its own, else float64 on the CPU."""
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    floating = [t for t in tensors if t.is_floating_point()]
    if dtype is None:
        dtype = floating[0].dtype if floating else torch.float64
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise InvalidInputError(f"dtype: got {dtype!r}, wanted a floating-point type of torch")
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise InvalidInputError(
            f"device: got {device!r}, where torch computes nothing here ({error})"
        ) from error
    return dtype, torch.device(device)


def check_evaluation_mode(module: Any) -> None:
    """Raise for layers whose output is random, or depends on what they saw before, in training."""
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    for name, layer in module.named_modules():
        if layer.training and isinstance(layer, kinds):
            raise InvalidInputError(
                f"module: its layer {name!r} ({type(layer).__name__}) is in training mode, where "
                "an energy is no function of the positions; call module.eval() first"
            )


def _known_defaults(module: Any) -> dict[str, float]:
    if isinstance(module, Potential):
        shared = {
            name.removeprefix("globals."): float(value.detach())
            for name, value in module.values().items()
            if name.startswith("globals.")
        }
        return shared
    try:
        parameters = inspect.signature(_entry(module)).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {
        p.name: p.default
        for p in parameters
        if isinstance(p.default, int | float) and not isinstance(p.default, bool)
    }


def _entry(module: Any) -> Any:
    """What is called in the end: hooks aside, a module's own forward."""
    return module.forward if isinstance(module, nn.Module) else module


def _takes_box(module: Any, periodic: bool, defaults: Iterable[str]) -> bool:
    """Whether the module is called with a box, which may be None.

    Raises
    ------
    InvalidInputError
        If it can be called neither way.
    """
    names = dict.fromkeys(defaults, 0.0)
    if not callable(module):
        raise InvalidInputError(
            f"module: got {type(module).__name__}, wanted a torch.nn.Module, a callable "
            "(positions, box, **globals) -> energy, or what mdgraft.graft returns"
        )
    if isinstance(module, torch.jit.ScriptModule):
        forward: Any = module.forward
        taken = [a.name for a in forward.schema.arguments[1:] if a.name not in names]
        return len(taken) > 1
    try:
        signature = inspect.signature(_entry(module))
    except (TypeError, ValueError):
        # Built-in functions tell nothing.
        return True
    second = [*signature.parameters.values()][1:2]
    # An open system needs no box, and None would replace a default that means something else.
    with_default = any(p.default not in (p.empty, None) for p in second)
    for positional in ((None,),) if with_default and not periodic else ((None, None), (None,)):
        try:
            signature.bind(*positional, **names)
        except TypeError:
            continue
        if len(positional) == 1 and periodic:
            raise InvalidInputError(
                f"module: {signature} takes no box, but periodic is true; add the box as its "
                "second argument, or pass periodic=False"
            )
        return len(positional) == 2
    wanted = ", ".join(["positions", "box", *names])
    raise InvalidInputError(
        f"module: {signature} cannot be called as ({wanted}); global parameters are passed by "
        "name, so name its arguments like them, or give others defaults"
    )


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} things"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
