"""Energies that an engine outside torch computes, as differentiable functions.

The engine gives energies and first derivatives. Products with second derivatives are differences of
its first derivatives along the direction asked for, which is all that an adjoint, a force-matching
loss or a Hessian-vector product needs. Third derivatives raise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Inputs, PerFrame

#: Positions ``(F, N, 3)``, box ``(F, 3, 3)`` (empty in an open system), then parameters.
Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Displacements of differences.

    Attributes
    ----------
    positions, box
        Largest displacement of a component [nm] along a direction.
    parameters
        Displacement of a parameter, relative to the largest magnitude in its family (or to one
        if all are zero).
    """

    positions: float = 1e-6
    box: float = 1e-4
    parameters: float = 5e-3

    def of(self, k: int, array: np.ndarray) -> float:
        """Step of the ``k``-th array."""
        if k < 2:
            return (self.positions, self.box)[k]
        return self.parameters * (float(np.abs(array).max(initial=0.0)) or 1.0)


#: Points and weights of a central difference that is exact for polynomials of the fourth degree.
FOUR_POINTS: tuple[tuple[float, float], ...] = (
    (-2.0, 1 / 12),
    (-1.0, -2 / 3),
    (1.0, 2 / 3),
    (2.0, -1 / 12),
)


class Engine(Protocol):
    """What computes energies outside torch; numbers are float64 in nm and kJ/mol."""

    @property
    def steps(self) -> Steps:
        """Displacements of the differences that second-order products are."""

    def energies(self, arrays: Arrays) -> np.ndarray:
        """Energies ``(F,)``."""

    def gradients(self, arrays: Arrays, wanted: Sequence[bool]) -> list[np.ndarray | None]:
        """Derivatives of each frame's energy, ``(F, *shape)``, in those arrays that are wanted."""

    def mixed(
        self, arrays: Arrays, wanted: Sequence[bool], along: np.ndarray
    ) -> list[np.ndarray | None]:
        """Derivatives of ``sum(dE/dpositions * along)`` like `gradients`; positions excepted."""


def external_energy(
    engine: Engine, positions: Tensor, box: Tensor | None, parameters: Sequence[Tensor]
) -> Tensor:
    """Energies ``(F,)`` [kJ/mol], twice differentiable in everything.

    Parameters
    ----------
    engine
        Computes them.
    positions
        ``(F, N, 3)`` [nm].
    box
        ``(F, 3, 3)`` [nm], or None. Derivatives are those of the six entries that a reduced box
        has; they are zero for the others.
    parameters
        Shared by all frames, in the engine's own order.

    Raises
    ------
    UnsupportedDerivativeError
        If a third derivative is asked for.
    """
    return differentiable_energy(_Differences(engine), positions, box, parameters)


class _Differences:
    """An engine as a kernel whose second derivatives are differences."""

    fused = False
    framed: tuple[int, ...] = ()
    reference: Callable[..., Tensor] | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def energies(self, inputs: Inputs) -> Tensor:
        energies = self._engine.energies(_arrays(inputs))
        return torch.as_tensor(energies, dtype=inputs[0].dtype, device=inputs[0].device)

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[None, PerFrame]:
        return None, _like(self._engine.gradients(_arrays(inputs), wanted), inputs)

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        arrays = _arrays(inputs)
        along = [None if d is None else _arrays([d])[0] for d in directions]
        return _like(_products(self._engine, wanted, arrays, along), inputs)


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().to("cpu", torch.float64).numpy() for tensor in tensors]


def _like(arrays: Sequence[np.ndarray | None], inputs: Inputs) -> PerFrame:
    return [
        None if a is None else torch.as_tensor(a, dtype=t.dtype, device=t.device)
        for a, t in zip(arrays, inputs, strict=True)
    ]


def _products(
    engine: Engine,
    wanted: Sequence[bool],
    arrays: list[np.ndarray],
    directions: list[np.ndarray | None],
) -> list[np.ndarray | None]:
    """Second derivatives along one direction after the other, frame by frame."""
    n_frames = arrays[0].shape[0]
    sums: list[np.ndarray | None] = []
    for k, (array, on) in enumerate(zip(arrays, wanted, strict=True)):
        shape = array.shape if k < 2 else (n_frames, *array.shape)
        sums.append(np.zeros(shape) if on else None)
    for k, direction in enumerate(directions):
        if direction is None:
            continue
        for f in range(n_frames if direction.any() else 0):
            frame = [arrays[0][f : f + 1], arrays[1][f : f + 1], *arrays[2:]]
            change = direction[f : f + 1] if k < 2 else direction[f]
            if not change.any():
                continue
            for total, product in zip(
                sums, _product(engine, wanted, frame, k, change), strict=True
            ):
                if total is not None and product is not None:
                    total[f] += product[0]
    return sums


def _product(
    engine: Engine, wanted: Sequence[bool], frame: list[np.ndarray], k: int, change: np.ndarray
) -> list[np.ndarray | None]:
    """Second derivatives of one frame along a change of input ``k``."""
    step = engine.steps.of(k, frame[k]) / np.abs(change).max()

    def gradients(t: float, inputs: Sequence[bool]) -> list[np.ndarray | None]:
        moved = [*frame[:k], frame[k] + t * step * change, *frame[k + 1 :]]
        return engine.gradients(moved, inputs)

    if k == 0:
        # Engines know forces best: what else depends on them is the change of the force.
        nothing: list[np.ndarray | None] = [None] * len(frame)
        found = engine.mixed(frame, wanted, change) if any(wanted[1:]) else nothing
        if wanted[0]:
            only = [True, *(False for _ in frame[1:])]
            upper, lower = gradients(1.0, only)[0], gradients(-1.0, only)[0]
            assert upper is not None and lower is not None
            found[0] = (upper - lower) / (2 * step)
        return found
    sums: list[Any] = [0.0 if on else None for on in wanted]
    for t, weight in FOUR_POINTS:
        values = gradients(t, wanted)
        sums = [
            None if v is None else total + weight / step * v
            for total, v in zip(sums, values, strict=True)
        ]
    return sums
