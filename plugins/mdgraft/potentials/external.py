"""A term that an engine outside torch evaluates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft.kernels.external import Engine, external_energy
from mdgraft.potentials.term import AbstractTerm


class ExternalTerm(AbstractTerm):
    """Energy by an engine, with its forces as gradients.

    Second derivatives are differences of first ones, `Engine.steps` apart; third ones raise
    `UnsupportedDerivativeError`. Every trainable parameter whose derivative the engine does not
    know costs it several energies for each entry, so freeze what is not needed.

    Parameters
    ----------
    engine
        Takes this term's parameters in the order given, then the global ones.
    parameters
        Values by name.
    units
        Unit of each parameter.
    global_names
        Global parameters that the energy depends on, as the potential calls them.
    periodic
        Whether the energy depends on the box.
    borrows
        Other terms whose parameters the engine takes after this term's own.
    """

    precision: Tensor

    def __init__(
        self,
        engine: Engine,
        parameters: Mapping[str, Tensor],
        *,
        units: Mapping[str, str],
        global_names: Sequence[str] = (),
        periodic: bool = False,
        borrows: tuple[str, ...] = (),
    ) -> None:
        super().__init__(periodic=periodic)
        self.engine = engine
        self.borrows = borrows
        self.global_names = tuple(global_names)
        # A term without parameters still has a dtype and a device.
        self.register_buffer("precision", torch.zeros((), dtype=torch.float64), persistent=False)
        for name, value in parameters.items():
            self.add_parameter(name, value, units[name])

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        shared = [global_values[name] for name in self.global_names]
        return external_energy(self.engine, positions, box, [*values.values(), *shared])
