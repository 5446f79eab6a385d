"""Energy, forces and slopes in global parameters of one configuration."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mdgraft_openmm.export.checks import check_forces, check_slopes
from mdgraft_openmm.export.energy import EnergyFunction


class Evaluation(NamedTuple):
    """What one pass through a module gives.

    Attributes
    ----------
    energy
        ``()`` [kJ/mol].
    forces
        ``(N, 3)`` [kJ/mol/nm].
    slopes
        Derivatives of the energy in global parameters, by name [kJ/mol].
    """

    energy: Tensor
    forces: Tensor
    slopes: dict[str, Tensor]


class _Memory(NamedTuple):
    """Slopes of the configuration whose energy a host asked for last, known bit by bit."""

    positions: bytes
    box: bytes | None
    values: dict[str, float]
    slopes: dict[str, float]


class Evaluator:
    """Evaluates an energy function inside of a host's own evaluation.

    The host may call with gradients turned off, in inference mode or on another thread; none of
    these reaches the module, and no graph outlives the call. There are two ways in: tensors, and
    arrays, which cost less.

    Parameters
    ----------
    function
        The energy.
    slopes
        Global parameters whose derivatives are wanted. One evaluation is then remembered, since
        energy and slopes are asked for one after the other.
    check
        Whether energy, forces and slopes are compared with each other on first use.
    """

    def __init__(self, function: EnergyFunction, *, slopes: tuple[str, ...], check: bool) -> None:
        self.function = function
        self.slopes = slopes
        self.check = check
        self._unchecked = check
        self._last: tuple[list[Tensor], list[float], Evaluation] | None = None
        self._memory: _Memory | None = None
        self._array_type = _array_type(function)

    def __call__(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        """Evaluate positions ``(N, 3)`` [nm] in a box ``(3, 3)`` [nm], of any type and device.

        Warnings are issued where `checks.check_forces` or `checks.check_slopes` find a reason.
        """
        if self._unchecked:
            self.compare(positions, box, values)
        found = self.evaluate(positions, box, values)
        if self.slopes:
            inputs = [positions.clone()] if box is None else [positions.clone(), box.clone()]
            self._last = (inputs, self._numbers(values), found)
        return found

    def slope(
        self, name: str, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Tensor:
        """Derivative of the energy in a global parameter [kJ/mol].

        That of the evaluation before, if it was of the same configuration: the module may have
        changed since then, so that an energy is never remembered, but slopes follow an energy.
        """
        # One tuple, so that threads which share an evaluator cannot mix two configurations.
        last = self._last
        inputs = [positions] if box is None else [positions, box]
        if (
            last is not None
            and last[1] == self._numbers(values)
            and all(map(torch.equal, last[0], inputs))
        ):
            return last[2].slopes[name]
        return self(positions, box, values).slopes[name]

    def _numbers(self, values: Mapping[str, float]) -> list[float]:
        return [values[name] for name in self.function.defaults]

    def energy_and_forces_of_tensors(
        self, positions: Tensor, box: Tensor | None, values: dict[str, float]
    ) -> tuple[Tensor, Tensor]:
        """What a call gives, for a host that has tensors and reads the memory of the forces.

        These are contiguous and on the device of the positions, in the precision of the module.
        """
        if self.slopes or self._unchecked or torch.is_inference_mode_enabled():
            found = self(positions, box, values)
            energy, forces = found.energy, found.forces
        elif torch.is_grad_enabled():
            energy, forces = self._energy_and_forces(positions, box, values)
        else:
            with torch.enable_grad():
                energy, forces = self._energy_and_forces(positions, box, values)
        if forces.device != positions.device:
            forces = forces.to(positions.device)
        if forces.is_neg() or not forces.is_contiguous():
            forces = forces.resolve_neg().contiguous()
        return energy, forces

    def energy_and_forces(
        self, positions: np.ndarray, box: np.ndarray | None, values: dict[str, float]
    ) -> tuple[float, np.ndarray]:
        """What a call gives, for a host that has arrays.

        Parameters
        ----------
        positions
            ``(N, 3)`` [nm], float64. They become the module's.
        box
            ``(3, 3)`` [nm], float64. It becomes the module's.
        values
            Global parameters by name, and nothing else.

        Returns
        -------
        tuple
            Energy [kJ/mol] and forces ``(N, 3)`` [kJ/mol/nm], float64.
        """
        if self._unchecked:
            h = None if box is None else torch.from_numpy(box.copy())
            self.compare(torch.from_numpy(positions.copy()), h, values)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            energy, forces, _ = self._of_arrays(positions, box, values)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                energy, forces, _ = self._of_arrays(positions, box, values)
        return energy, forces

    def slope_of_arrays(
        self,
        name: str,
        positions: np.ndarray,
        box: np.ndarray | None,
        values: dict[str, float],
    ) -> float:
        """What `slope` gives, for a host that has arrays; never NaN or infinite."""
        # One tuple, so that threads which share an evaluator cannot mix two configurations.
        memory = self._memory
        if (
            memory is not None
            and memory.values == values
            and memory.positions == positions.tobytes()
            and (box is None or memory.box == box.tobytes())
        ):
            return memory.slopes[name]
        with torch.inference_mode(False), torch.enable_grad():
            return self._of_arrays(positions, box, values)[2][name]

    def _of_arrays(
        self, positions: np.ndarray, box: np.ndarray | None, values: dict[str, float]
    ) -> tuple[float, np.ndarray, dict[str, float]]:
        """Energy, forces and slopes; the latter are remembered."""
        h = None if box is None else self._tensor(box)
        if not self.slopes:
            energy, gradient, forces, _ = self._pass(self._tensor(positions), h, values)
            slopes = {}
        else:
            # What the module does to its positions must not change what they are known by.
            known = positions.tobytes(), None if box is None else box.tobytes()
            energy, gradient, forces, found = self._pass(self._tensor(positions), h, values)
            slopes = dict(zip(self.slopes, map(_finite, found), strict=True))
            self._memory = _Memory(*known, values, slopes)
        if gradient is None:
            assert forces is not None
            return energy.item(), forces.to("cpu", torch.float64).resolve_neg().numpy(), slopes
        if self._array_type is None:
            return energy.item(), gradient.to("cpu", torch.float64).neg().numpy(), slopes
        array = np.negative(gradient.resolve_neg().numpy(), dtype=np.float64)
        return energy.item(), array, slopes

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A tensor of the module's kind, which shares the memory of an array if it can."""
        if self._array_type is None:
            return torch.from_numpy(array).to(self.function.device, self.function.dtype)
        return torch.from_numpy(array.astype(self._array_type, copy=False))

    def evaluate(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        """Evaluate without memory and without a check."""
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._of_tensors(positions, box, values)
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of inference mode cannot take part in gradients, and copies can.
            copied = None if box is None else box.clone()
            return self._of_tensors(positions, copied, values)

    def _of_tensors(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        x, h = self._inputs(positions, box)
        energy, gradient, forces, slopes = self._pass(x, h, values)
        if forces is None:
            assert gradient is not None
            forces = gradient.neg()
        return Evaluation(energy.detach(), forces, dict(zip(self.slopes, slopes, strict=True)))

    def _energy_and_forces(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """The same without slopes, in every step of a simulation."""
        x, h = self._inputs(positions, box)
        energy, gradient, forces, _ = self._pass(x, h, values)
        return (energy, gradient.neg()) if gradient is not None else (energy, cast(Tensor, forces))

    def _inputs(self, positions: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Copies of the module's kind: a host's memory changes, and a module may keep them."""
        dtype, device = self.function.dtype, self.function.device
        x = positions.detach()
        same = x.dtype == dtype and x.device == device
        x = x.clone() if same else x.to(device, dtype)
        return x, None if box is None else box.to(device, dtype)

    def _pass(
        self, x: Tensor, h: Tensor | None, values: Mapping[str, float]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]]:
        """Energy, its gradient or else the module's own forces, and slopes."""
        # Makes this thread take the number of threads that torch was told.
        torch.get_num_threads()
        x.requires_grad_()
        function, slopes = self.function, self.slopes
        if not function.defaults:
            energy, forces = function(x, h, {})
            if forces is not None:
                return energy, None, _dense(forces.detach()), ()
            return energy, _gradients(energy, [x])[0], None, ()
        scalars = {name: self._tensor(np.array(values[name])) for name in function.defaults}
        wanted = [scalars[name].requires_grad_() for name in slopes]
        energy, forces = function(x, h, scalars)
        if forces is not None:
            return energy, None, _dense(forces.detach()), _gradients(energy, wanted)
        gradient, *found = _gradients(energy, [x, *wanted])
        return energy, gradient, None, found

    def compare(self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]) -> None:
        """Compare energy, forces and slopes with each other; not again on first use then."""
        self._unchecked = False
        check_forces(self, positions, box, values)
        check_slopes(self, positions, box, values)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_memory": None, "_unchecked": self.check}

    def move(self, device: torch.device) -> None:
        """Evaluate on this device, where the module is now."""
        self.function.device = device
        self._array_type = _array_type(self.function)


#: Types of arrays by those of tensors.
_ARRAYS: dict[torch.dtype, type[np.floating[Any]]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
}


def _array_type(function: EnergyFunction) -> type[np.floating[Any]] | None:
    """Type of arrays that can share memory with the tensors that a module gets; None if none."""
    return _ARRAYS.get(function.dtype) if function.device.type == "cpu" else None


def _gradients(energy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Derivatives; zero in what the energy does not depend on."""
    if not inputs or not energy.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    found = torch.autograd.grad(energy, inputs, allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else _dense(g) for g, t in zip(found, inputs, strict=True)
    ]


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _finite(slope: Tensor) -> float:
    """The nearest number, so that its product with zero is zero."""
    number = float(slope)
    if math.isfinite(number):
        return number
    largest = sys.float_info.max
    return largest if math.isnan(number) else math.copysign(largest, number)
