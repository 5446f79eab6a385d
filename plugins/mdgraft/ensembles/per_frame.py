"""Derivatives of per-frame quantities with respect to parameters, frame by frame.

The covariance formula needs the derivative of every frame's energy separately, where one backward
pass over a batch only gives their sum. Compiled terms give it at once (`frame_derivatives`). For
others there are three exact ways:

- a backward pass over each frame: the cost does not depend on the number of parameters;
- a backward pass over the batch whose result, linear in its seed, is differentiated by that seed,
  once for each parameter scalar: cheaper for few scalars and many frames;
- a forward-mode pass over the batch for each scalar: independent of both, slower in eager torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, MDGraftError
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.frames import Frames
from mdgraft.potentials import Potential

#: Starting the operations of one pass costs about as much as computing this many particles.
_OVERHEAD_PARTICLES = 1000

#: Frames that plain torch operations evaluate at a time.
_BATCH = 64

#: Maps F frames to tensors ``(F, ...)``.
PerFrame = Callable[[Frames], tuple[Tensor, ...]]


def per_frame_gradients(
    potential: Potential,
    frames: Frames,
    names: Sequence[str],
    *,
    batch_size: int | None = None,
) -> Tensor:
    """Derivative of each frame's energy with respect to each scalar parameter.

    Parameters
    ----------
    potential
        The potential.
    frames
        F frames.
    names
        Names of parameters; P counts their scalars, in this order, each flattened.
    batch_size
        Frames that are evaluated at a time; by default what suits the potential.

    Returns
    -------
    Tensor
        G, float64 ``(F, P)`` [kJ/mol per unit of the parameter]; without a graph.

    Raises
    ------
    InvalidInputError
        For an unknown name.
    """
    if potential.framewise:
        found = frame_derivatives(potential, frames, names, forces=False, batch_size=batch_size)
        return found.gradients

    def energy(batch: Frames) -> tuple[Tensor]:
        return (potential(batch.positions, batch.box),)

    parts = [
        per_frame_jacobian(potential, energy, batch, names)[0]
        for batch in frames.batches(batch_size or _BATCH)
    ]
    n_scalars = sum(dict(potential.named_parameters())[name].numel() for name in names)
    return torch.cat(parts) if parts else torch.empty(0, n_scalars, dtype=torch.float64)


def per_frame_jacobian(
    module: nn.Module,
    function: PerFrame,
    frames: Frames,
    names: Sequence[str],
    *,
    n_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Derivatives of per-frame quantities with respect to a module's parameters.

    Parameters
    ----------
    module
        Holds the parameters.
    function
        Maps frames to a tuple of tensors ``(F, ...)``, using the module.
    frames
        One batch of F frames.
    names
        Names of parameters, P scalars in all.
    n_outputs
        About how many numbers the function gives each frame; it only helps to choose the cheaper
        route.

    Returns
    -------
    tuple of Tensor
        For each of the function's tensors ``(F, *S)``, float64 ``(F, *S, P)``.

    Raises
    ------
    InvalidInputError
        For an unknown name.
    """
    named = dict(module.named_parameters())
    for name in names:
        if name not in named:
            raise InvalidInputError(f"names: no parameter {name!r}; there are {sorted(named)}")
    n_scalars = sum(named[name].numel() for name in names)
    if _batch_is_cheaper(n_scalars, frames, n_outputs):
        try:
            return double_reverse_jacobian(module, function, frames, names)
        except MDGraftError:
            raise
        except (NotImplementedError, RuntimeError):
            # Some operation has no second derivative.
            pass
    return reverse_jacobian(module, function, frames, names)


def _batch_is_cheaper(n_scalars: int, frames: Frames, n_outputs: int) -> bool:
    """Compare the costs of both reverse routes, in evaluations of the function."""
    batch = 1.0 + len(frames) * frames.n_particles / _OVERHEAD_PARTICLES
    single = 1.0 + frames.n_particles / _OVERHEAD_PARTICLES
    return (3.0 + 2.0 * n_scalars) * batch < (2.0 + 2.0 * n_outputs) * len(frames) * single


class _Swappable(nn.Module):
    """A function whose module's parameters ``torch.func.functional_call`` can replace."""

    def __init__(self, module: nn.Module, function: PerFrame) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, frames: Frames) -> tuple[Tensor, ...]:
        return self.function(frames)


def forward_jacobian(
    module: nn.Module, function: PerFrame, frames: Frames, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """As `per_frame_jacobian`, by forward mode: one pass over the batch for each scalar."""
    wrapped = _Swappable(module, function)
    named = dict(module.named_parameters())
    primals = {f"module.{name}": named[name].detach() for name in names}

    def evaluate(values: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(wrapped, values, (frames,))

    columns: list[tuple[Tensor, ...]] = []
    for name in primals:
        for entry in range(primals[name].numel()):
            tangents = {key: torch.zeros_like(value) for key, value in primals.items()}
            tangents[name].view(-1)[entry] = 1.0
            with torch.no_grad():
                columns.append(torch.func.jvp(evaluate, (primals,), (tangents,))[1])
    if not columns:
        with torch.no_grad():
            return tuple(output.double()[..., None][..., :0] for output in function(frames))
    return tuple(torch.stack(parts, dim=-1).double() for parts in zip(*columns, strict=True))


def double_reverse_jacobian(
    module: nn.Module, function: PerFrame, frames: Frames, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """As `per_frame_jacobian`, by differentiating a backward pass by its own seed.

    Raises
    ------
    RuntimeError
        If an operation's backward pass cannot be differentiated.
    """
    with _trainable(module, names) as parameters, torch.enable_grad():
        outputs = function(frames)
        seeds = [torch.ones_like(output, requires_grad=True) for output in outputs]
        live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
        jacobians: list[list[Tensor]] = [[] for _ in outputs]
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if live:
            gradients = torch.autograd.grad(
                [o for o, _ in live],
                parameters,
                [s for _, s in live],
                create_graph=True,
                allow_unused=True,
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            flat = torch.zeros_like(parameter) if gradient is None else gradient
            for total in flat.reshape(-1):
                column = _by_seed(total, seeds)
                _check_linear(total, column)
                for place, part in enumerate(column):
                    jacobians[place].append(part)
    return tuple(
        (torch.stack(j, dim=-1) if j else output[..., None][..., :0]).detach().double()
        for output, j in zip(outputs, jacobians, strict=True)
    )


def _by_seed(total: Tensor, seeds: Sequence[Tensor]) -> list[Tensor]:
    parts: Sequence[Tensor | None] = [None] * len(seeds)
    if total.requires_grad:
        parts = torch.autograd.grad(total, seeds, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(seed) if part is None else part
        for part, seed in zip(parts, seeds, strict=True)
    ]


def _check_linear(total: Tensor, column: Sequence[Tensor]) -> None:
    """Raise unless the parts add up to the whole: a backward pass may have cut its graph."""
    found = sum(float(part.detach().double().sum()) for part in column)
    size = sum(float(part.detach().double().abs().sum()) for part in column)
    wanted = float(total.detach())
    if abs(found - wanted) > 1e-3 * max(size, abs(wanted)):
        raise RuntimeError("the backward pass of an operation is not differentiable")


def reverse_jacobian(
    module: nn.Module, function: PerFrame, frames: Frames, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """As `per_frame_jacobian`, by backward passes over single frames, one for each output."""
    rows: list[list[Tensor]] = []
    with _trainable(module, names) as parameters, torch.enable_grad():
        for one in frames.batches(1):
            outputs = function(one)
            rows.append([_rows(output, parameters) for output in outputs])
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def _rows(output: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Derivatives ``(1, *S, P)`` of one frame's output ``(1, *S)``."""
    n_scalars = sum(parameter.numel() for parameter in parameters)
    rows = []
    for component in output.reshape(-1):
        if not component.requires_grad:
            rows.append(output.new_zeros(n_scalars, dtype=torch.float64))
            continue
        gradients = torch.autograd.grad(component, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).detach().double().reshape(-1)
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
        )
    stacked = torch.stack(rows) if rows else output.new_zeros(0, n_scalars, dtype=torch.float64)
    return stacked.reshape((*output.shape, n_scalars))


class _trainable:  # noqa: N801 - used like a function
    """Let frozen parameters take part in a derivative for a while."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        named = dict(module.named_parameters())
        self.parameters = [named[name] for name in names]
        self.frozen = [p for p in self.parameters if not p.requires_grad]

    def __enter__(self) -> list[Tensor]:
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return list(self.parameters)

    def __exit__(self, *_: object) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(False)
