"""A torch module that knows its particles and its own units as a term."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Inputs, PerFrame
from mdgraft.kernels.switch import under_transform
from mdgraft.potentials.atomistic.base import Periods
from mdgraft.potentials.term import AbstractTerm


class ModuleTerm(AbstractTerm):
    """The energy of a module ``(positions, cell) -> energy`` that takes one frame at a time.

    The module's parameters are this term's, under ``module.<name>``. Backward passes go through
    the module's own graph, to every order that it has. Under transforms of ``torch.func``, which
    modules that set ``requires_grad`` of their input or call ``torch.autograd`` do not bear, the
    module is differentiated by itself, up to the second order.

    Parameters
    ----------
    module
        Takes positions ``(N, 3)`` and the cell ``(3, 3)`` or None, and returns one energy.
    length, energy
        The module's units [nm], [kJ/mol].
    units
        Unit of each parameter, where it has one.
    pbc
        Which box vectors are periods.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        length: float,
        energy: float,
        pbc: Periods,
        units: Mapping[str, str] | None = None,
        general_cell: bool = True,
    ) -> None:
        super().__init__(periodic=any(pbc))
        self.general_cell = general_cell
        self.length, self.energy = length, energy
        self.module = module
        own = dict(units or {})
        self.units = {f"module.{k}": own.get(k, "") for k, _ in module.named_parameters()}

    def parameter_values(self) -> dict[str, Tensor]:
        """The module's parameters by name."""
        return {f"module.{k}": p for k, p in self.module.named_parameters()}

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        names = [key.removeprefix("module.") for key in values]

        def energies(x: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
            replaced = dict(zip(names, parameters, strict=True))
            frames = []
            for f in range(x.shape[0]):
                cell = h[f] / self.length if h.shape[1] else None
                inputs = (x[f] / self.length, cell)
                energy = torch.func.functional_call(self.module, replaced, inputs)
                frames.append(energy.reshape(()).to(x.dtype))
            return self.energy * torch.stack(frames)

        if box is not None:
            box = box.expand(positions.shape[0], 3, 3)
        if not under_transform():
            cells = positions.new_zeros(positions.shape[0], 0, 3) if box is None else box
            return energies(positions, cells, *values.values())
        return differentiable_energy(_Backward(energies), positions, box, list(values.values()))


class _Backward:
    """A function as a kernel that torch's own backward passes differentiate, frame by frame."""

    fused = False
    framed: tuple[int, ...] = ()

    def __init__(self, energies: Callable[..., Tensor]) -> None:
        self._energies = energies
        self.reference: Callable[..., Tensor] | None = energies

    def energies(self, inputs: Inputs) -> Tensor:
        with torch.inference_mode(mode=False), torch.enable_grad():
            # Modules may take derivatives of their own on the way.
            found: Tensor = self._energies(*(t.clone() for t in inputs))
        return found.detach()

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor | None, PerFrame]:
        energies: list[Tensor] = []
        rows: list[list[Any]] = []
        for frame in _frames(inputs):
            with torch.inference_mode(mode=False), torch.enable_grad():
                leaves = [t.clone().requires_grad_(on) for t, on in zip(frame, wanted, strict=True)]
                energy = self._energies(*leaves).sum()
                slopes = _slopes(energy, leaves, wanted, create_graph=False)
            energies.append(energy.detach())
            rows.append(slopes)
        return torch.stack(energies), _columns(rows, wanted)

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        along = [d is not None for d in directions]
        rows: list[list[Any]] = []
        for f, frame in enumerate(_frames(inputs)):
            with torch.inference_mode(mode=False), torch.enable_grad():
                leaves = [
                    t.clone().requires_grad_(a or on)
                    for t, a, on in zip(frame, along, wanted, strict=True)
                ]
                energy = self._energies(*leaves).sum()
                slopes = _slopes(energy, leaves, along, create_graph=True)
                change = energy.new_zeros(())
                for slope, direction in zip(slopes, directions, strict=True):
                    if direction is not None:
                        change = change + (slope.reshape(-1) * direction[f].reshape(-1)).sum()
                rows.append(_slopes(change, leaves, wanted, create_graph=False))
        return _columns(rows, wanted)


def _frames(inputs: Inputs) -> list[list[Tensor]]:
    positions, box, *parameters = inputs
    return [[positions[f : f + 1], box[f : f + 1], *parameters] for f in range(positions.shape[0])]


def _slopes(
    energy: Tensor, leaves: Sequence[Tensor], wanted: Sequence[bool], *, create_graph: bool
) -> list[Any]:
    chosen = [leaf for leaf, on in zip(leaves, wanted, strict=True) if on]
    if energy.requires_grad and chosen:
        found = iter(
            torch.autograd.grad(
                energy,
                chosen,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    else:
        found = iter([torch.zeros_like(leaf) for leaf in chosen])
    return [next(found) if on else None for on in wanted]


def _columns(rows: list[list[Any]], wanted: Sequence[bool]) -> PerFrame:
    """Derivatives of all frames; positions and box have a frame axis already."""
    columns: PerFrame = []
    for k, on in enumerate(wanted):
        parts = [row[k].detach() for row in rows] if on else []
        columns.append((torch.cat(parts) if k < 2 else torch.stack(parts)) if on else None)
    return columns
