"""Energy, forces and slopes in global parameters of one configuration."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from mdgraft import MDGraftWarning, NonConservativeForceWarning
from torch import Tensor

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
    """Slopes of the last configuration that a host asked for, and its numbers bit by bit."""

    positions: bytes
    box: bytes
    values: Mapping[str, float]
    slopes: dict[str, float]


class Evaluator:
    """Evaluates an energy function inside of a host's own evaluation.

    The host may call with gradients turned off, in inference mode or on another thread; none of
    these reaches the module, and no graph outlives the call.

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

    def __call__(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        """Evaluate positions ``(N, 3)`` [nm] in a box ``(3, 3)`` [nm], of any type and device.

        Warnings are issued where `check_forces` or `check_slopes` find a reason.
        """
        if self._unchecked:
            self._check(positions, box, values)
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

    def evaluate(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        """Evaluate without memory and without a check."""
        function = self.function
        with _Gradients():
            # Tensors of inference mode cannot take part in gradients, and copies can.
            x = positions.detach().clone().to(function.device, function.dtype)
            h = None if box is None else box.clone().to(function.device, function.dtype)
            energy, gradient, slopes = self._pass(x, h, values)
            return Evaluation(energy.detach(), gradient.neg(), slopes)

    def energy_and_forces(
        self, positions: np.ndarray, box: np.ndarray | None, values: Mapping[str, float]
    ) -> tuple[float, np.ndarray]:
        """What `__call__` gives, for a host that has arrays, as cheaply as can be.

        Parameters
        ----------
        positions
            ``(N, 3)`` [nm], float64. The module may keep them.
        box
            ``(3, 3)`` [nm], float64.
        values
            Global parameters by name.

        Returns
        -------
        tuple
            Energy [kJ/mol] and forces ``(N, 3)`` [kJ/mol/nm], float64.
        """
        if self._unchecked:
            h = None if box is None else torch.from_numpy(box)
            self._check(torch.from_numpy(positions), h, values)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._of_arrays(positions, box, values)
        with _Gradients():
            return self._of_arrays(positions, box, values)

    def slope_and_forces(
        self,
        name: str,
        positions: np.ndarray,
        box: np.ndarray | None,
        values: Mapping[str, float],
    ) -> float:
        """What `slope` gives, for a host that has arrays; a product of it with zero is zero."""
        # One tuple, so that threads which share an evaluator cannot mix two configurations.
        memory = self._memory
        if (
            memory is None
            or memory.positions != positions.tobytes()
            or memory.values != values
            or (box is not None and memory.box != box.tobytes())
        ):
            self.energy_and_forces(positions, box, values)
            memory = self._memory
        assert memory is not None
        return memory.slopes[name]

    def check_forces(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> None:
        """Warn if forces near a configuration are not the gradient of the energy.

        Differences of the energy along two directions, each half along the forces and half at
        random, are compared with the work of the forces; both must disagree, since a pair that
        crosses a cutoff without switching disturbs one.
        """
        try:
            found = [self._along(positions, box, values, seed) for seed in range(2)]
        except Exception:
            # Not every frame is one that the module accepts; if this one is none, it will tell.
            return
        if all(abs(change - predicted) > allowed for change, predicted, allowed in found):
            change, predicted, allowed = found[0]
            warnings.warn(
                "module: its forces are not the gradient of its energy. Along a direction in "
                f"which they say that the energy changes by {predicted:.6g} kJ/mol/nm it changes "
                f"by {change:.6g} kJ/mol/nm, with an error of at most {allowed:.2g}. Dynamics "
                "will not conserve energy; look for a detach(), no_grad() or rounding inside, or "
                "for forces that are predicted beside the energy",
                NonConservativeForceWarning,
                stacklevel=2,
            )

    def _along(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float], seed: int
    ) -> tuple[float, float, float]:
        """Change of the energy along a direction, what forces say, and the error allowed."""
        step, rtol = _STEPS[self.function.dtype]
        random = torch.Generator("cpu").manual_seed(seed)
        like: Any = {"generator": random, "dtype": torch.float64, "device": "cpu"}
        noise = torch.randn(2, *positions.shape, **like)
        # Away from minima and symmetric places, where forces vanish whether right or wrong.
        start = positions.detach().to("cpu", torch.float64) + 20 * step * noise[0]
        forces = self.evaluate(start, box, values).forces.to("cpu", torch.float64)
        along = noise[1] / noise[1].norm()
        if bool(forces.any()):
            along = along + forces / forces.norm()
        along = along / along.norm(dim=-1).max()

        def energy(t: float) -> float:
            return float(self.evaluate(start + t * step * along, box, values).energy)

        near = {t: energy(t) for t in (-2, -1, 1, 2)}
        rough = (near[1] - near[-1]) / (2 * step)
        change = (4 * rough - (near[2] - near[-2]) / (4 * step)) / 3
        rounding = torch.finfo(self.function.dtype).eps * max(map(abs, near.values())) / step
        scale = max(float(forces.norm() * along.norm()), abs(change))
        allowed = rtol * scale + 3 * abs(change - rough) + 30 * rounding
        return change, -float((forces * along).sum()), allowed

    def check_slopes(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> None:
        """Warn if slopes are not the derivatives of the energy in global parameters.

        Parameters whose slope is zero are moved together, so that one that the module took out of
        the graph is not lost among others, and so are all others; one by one if that finds a
        difference.
        """
        if not self.slopes:
            return
        slopes = {n: float(s) for n, s in self.evaluate(positions, box, values).slopes.items()}
        wrong = []
        for chosen in (
            {n: s for n, s in slopes.items() if s == 0.0},
            {n: s for n, s in slopes.items() if s != 0.0 and math.isfinite(s)},
        ):
            if not chosen or self._wrong(positions, box, values, chosen, 1.0) is None:
                continue
            for name, slope in chosen.items():
                # A large step may meet something else, and a small one is lost in rounding.
                one = {name: slope}
                found = [self._wrong(positions, box, values, one, f) for f in (1.0, 0.01)]
                if None not in found:
                    wrong.append(f"{name!r} ({slope:.6g} instead of about {found[0]:.6g} kJ/mol)")
        if wrong:
            warnings.warn(
                "module: its derivatives in some global parameters are not those of its energy: "
                f"{', '.join(wrong)}. Look for a detach(), float() or item() inside, or do without "
                "such derivatives by parameter_derivatives=False",
                MDGraftWarning,
                stacklevel=2,
            )

    def _wrong(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, float],
        slopes: Mapping[str, float],
        factor: float,
    ) -> float | None:
        """Slope of the energy along parameters, if their slopes say something else.

        At a kink, such as where a parameter is clamped, either side may be right.
        """
        step, rtol = _STEPS[self.function.dtype]
        step *= 10 * factor
        # Not all alike, so that what is wrong cannot cancel.
        along = {
            name: (1 + i / 3) * step * (abs(values[name]) or 1.0) for i, name in enumerate(slopes)
        }

        def energy(t: int) -> float:
            moved = {name: values[name] + t * shift for name, shift in along.items()}
            try:
                return float(self.evaluate(positions, box, {**values, **moved}).energy)
            except Exception:
                # Beyond what the module accepts.
                return math.nan

        near = {t: energy(t) for t in (-2, -1, 0, 1, 2)}
        rough = (near[1] - near[-1]) / 2
        changes = [(4 * rough - (near[2] - near[-2]) / 4) / 3]
        changes += [s * (4 * near[s] - near[2 * s] - 3 * near[0]) / 2 for s in (1, -1)]
        parts = [slopes[name] * shift for name, shift in along.items()]
        change = min(filter(math.isfinite, changes), key=lambda c: abs(c - sum(parts)), default=0.0)
        rounding = torch.finfo(self.function.dtype).eps * max(map(abs, near.values()))
        scale = max(math.hypot(*parts), abs(change))
        allowed = rtol * scale + 3 * abs(changes[0] - rough) + 30 * rounding
        wrong = abs(change - sum(parts)) > allowed
        return change / sum(along.values()) if wrong else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_unchecked": self.check}


#: Displacement [nm] of a difference, and relative tolerance, by precision.
_STEPS = {
    torch.float64: (1e-4, 2e-3),
    torch.float32: (1e-3, 1e-2),
    torch.float16: (1e-2, 0.2),
    torch.bfloat16: (1e-2, 0.2),
}


def _gradients(energy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Derivatives; zero in what the energy does not depend on."""
    if not inputs or not energy.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    found = torch.autograd.grad(energy, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
