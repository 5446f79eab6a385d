"""Energies, forces and parameter gradients of every frame in one pass over a batch.

Compiled terms find the derivatives of each frame anyway, and hand them out here before they would
be summed. Terms of plain torch operations are differentiated under `torch.vmap`. No graph is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.frames import Frames
from mdgraft.kernels.pieces import collected
from mdgraft.potentials import Potential

#: Numbers, of positions or gradients, that a batch holds at most.
_NUMBERS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameDerivatives:
    """What `frame_derivatives` finds for F frames of N particles and P parameter scalars.

    Attributes
    ----------
    energies
        ``(F,)`` [kJ/mol].
    forces
        ``(F, N, 3)`` [kJ/mol/nm], or None.
    gradients
        ``(F, P)`` [kJ/mol per unit of the parameter].
    """

    energies: Tensor
    forces: Tensor | None
    gradients: Tensor


def frame_derivatives(
    potential: Potential,
    frames: Frames,
    names: Sequence[str],
    *,
    forces: bool = True,
    batch_size: int | None = None,
) -> FrameDerivatives:
    """Energies, forces and derivatives in parameters, frame by frame.

    Parameters
    ----------
    potential
        The potential.
    frames
        F frames.
    names
        Names of parameters; P counts their scalars, in this order, each flattened.
    forces
        Whether forces are wanted.
    batch_size
        Frames that are evaluated at a time; by default as many as memory allows.

    Returns
    -------
    FrameDerivatives
        In float64, without a graph.

    Raises
    ------
    InvalidInputError
        For an unknown name.
    """
    named = dict(potential.named_parameters())
    for name in names:
        if name not in named:
            raise InvalidInputError(f"names: no parameter {name!r}; there are {sorted(named)}")
    # A name that comes twice has one derivative.
    leaves = {name: named[name].detach() for name in names}
    n_scalars = sum(leaf.numel() for leaf in leaves.values())
    if batch_size is None:
        batch_size = max(1, _NUMBERS // max(3 * frames.n_particles, n_scalars, 1))
        if potential.periodic and not potential.framewise:
            # Under `torch.vmap` one list of pairs serves all frames, and grows with them.
            batch_size = 1
    parts = []
    for batch in frames.batches(batch_size):
        parts.append(_collected(potential, batch, leaves, forces))
    if not parts:
        empty = torch.empty(0, dtype=torch.float64)
        return FrameDerivatives(
            energies=empty,
            forces=empty.reshape(0, frames.n_particles, 3) if forces else None,
            gradients=empty.reshape(0, sum(named[name].numel() for name in names)),
        )
    sizes = [leaf.numel() for leaf in leaves.values()]
    columns = torch.split(_joined([g for _, _, g in parts]), sizes, dim=1)
    gradients = dict(zip(leaves, columns, strict=True))
    return FrameDerivatives(
        energies=_joined([e for e, _, _ in parts]),
        forces=-_joined([f for _, f, _ in parts if f is not None]) if forces else None,
        gradients=torch.cat([gradients[name] for name in names], dim=1)
        if len(names) != len(leaves)
        else _joined([g for _, _, g in parts]),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).double()


#: Energies ``(F,)``, gradient in positions, gradients ``(F, P)``.
_Found: TypeAlias = "tuple[Tensor, Tensor | None, Tensor]"


def _collected(
    potential: Potential, batch: Frames, values: Mapping[str, Tensor], forces: bool
) -> _Found:
    """From what compiled terms know of every frame; what is left is differentiated by torch."""
    n = len(batch)
    with torch.enable_grad():
        # Parameters stay as they are: other threads may be using them.
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        parameters = list(leaves.values())
        positions = batch.positions.detach()
        if positions.is_inference():
            positions = positions.clone()
        positions.requires_grad_(forces)
        with collected() as pieces:
            by_term = potential.energy_by_term(
                positions, batch.box, values=potential.values(leaves)
            )
            energies = sum(by_term.values(), start=0.0 * positions.sum(dim=(-2, -1)))
        live = [piece for piece in pieces if piece.energies.requires_grad]
        weights: Sequence[Tensor | None] = []
        if live:
            weights = torch.autograd.grad(
                energies.sum(), [p.energies for p in live], retain_graph=True, allow_unused=True
            )
        # Quantities that are computed from parameters.
        derived: list[Tensor] = []
        of_derived: list[Tensor] = []
        # One frame's energy depends on that frame alone, so positions need no batch of seeds.
        outputs, seeds = [energies.sum()], [torch.ones_like(energies[0])]
        whole = torch.zeros(
            n, sum(p.numel() for p in parameters), dtype=torch.float64, device=positions.device
        )
        parts = torch.split(whole, [p.numel() for p in parameters], dim=1)
        total = {id(p): part for p, part in zip(parameters, parts, strict=True)}
        for piece, weight in zip(live, weights, strict=True):
            if weight is None:
                continue
            for tensor, gradient, framed in zip(
                piece.inputs, piece.gradients, piece.framed, strict=True
            ):
                if gradient is None:
                    continue
                seed = gradient
                if not bool((weight == 1).all()):
                    seed = weight.reshape(-1, *(1,) * (gradient.ndim - 1)) * gradient
                if framed:
                    outputs.append(tensor)
                    seeds.append(seed)
                elif id(tensor) in total:
                    total[id(tensor)] += seed.reshape(n, -1)
                else:
                    derived.append(tensor)
                    of_derived.append(seed)
        slopes = None
        if forces:
            slopes = torch.autograd.grad(
                outputs, positions, seeds, retain_graph=True, allow_unused=True
            )[0]
            slopes = torch.zeros_like(positions) if slopes is None else slopes
        # What plain operations add to energies.
        if _reaches(energies, parameters):
            derived.append(energies)
            of_derived.append(torch.eye(n, dtype=energies.dtype))
        if derived:
            jacobians = torch.autograd.grad(
                derived, parameters, of_derived, is_grads_batched=True, allow_unused=True
            )
            for parameter, jacobian in zip(parameters, jacobians, strict=True):
                if jacobian is not None:
                    total[id(parameter)] += jacobian.reshape(n, -1)
    return energies.detach(), slopes, whole


def _reaches(output: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the graph of an output leads to any of these."""
    if not output.requires_grad or not parameters:
        return False
    slopes = torch.autograd.grad(
        output, parameters, torch.zeros_like(output), retain_graph=True, allow_unused=True
    )
    return any(slope is not None for slope in slopes)
