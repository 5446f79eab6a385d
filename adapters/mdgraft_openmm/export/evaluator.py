"""Energy, forces and slopes in global parameters of one configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from mdgraft import NonConservativeForceWarning
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
        Whether energy and forces are compared with each other on first use.
    """

    def __init__(self, function: EnergyFunction, *, slopes: tuple[str, ...], check: bool) -> None:
        self.function = function
        self.slopes = slopes
        self.check = check
        self._unchecked = check
        self._last: tuple[list[Tensor], list[float], Evaluation] | None = None

    def __call__(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        """Evaluate positions ``(N, 3)`` [nm] in a box ``(3, 3)`` [nm], of any type and device.

        A `NonConservativeForceWarning` is issued where `check_forces` finds a reason.
        """
        if self._unchecked:
            self._unchecked = False
            self.check_forces(positions, box, values)
        if not self.slopes:
            return self.evaluate(positions, box, values)
        inputs = [positions] if box is None else [positions, box]
        numbers = [values[name] for name in self.function.defaults]
        # One tuple, so that threads which share an evaluator cannot mix two configurations.
        last = self._last
        if last is not None and last[1] == numbers and all(map(torch.equal, last[0], inputs)):
            return last[2]
        found = self.evaluate(positions, box, values)
        self._last = ([t.clone() for t in inputs], numbers, found)
        return found

    def evaluate(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        """Evaluate without memory and without a check."""
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._pass(positions, box, values)
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of inference mode cannot take part in gradients, and copies can.
            copied = None if box is None else box.clone()
            return self._pass(positions.clone(), copied, values)

    def _pass(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> Evaluation:
        # Makes this thread take the number of threads that torch was told.
        torch.get_num_threads()
        function = self.function
        dtype, device = function.dtype, function.device
        x = positions.detach().to(device, dtype).requires_grad_()
        h = None if box is None else box.to(device, dtype)
        scalars = {
            name: torch.tensor(
                values[name], dtype=dtype, device=device, requires_grad=name in self.slopes
            )
            for name in function.defaults
        }
        energy, forces = function(x, h, scalars)
        wanted = [scalars[name] for name in self.slopes]
        if forces is None:
            gradient, *slopes = _gradients(energy, [x, *wanted])
            forces = gradient.neg()
        else:
            forces, slopes = forces.detach(), _gradients(energy, wanted)
        return Evaluation(energy.detach(), forces, dict(zip(self.slopes, slopes, strict=True)))

    def check_forces(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, float]
    ) -> None:
        """Warn if forces near a configuration are not the gradient of the energy.

        Differences of the energy along two directions, each half along the forces and half at
        random, are compared with the work of the forces; both must disagree, since a pair that
        crosses a cutoff without switching disturbs one.
        """
        found = [self._along(positions, box, values, seed) for seed in range(2)]
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
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, *positions.shape, generator=random, dtype=torch.float64)
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
