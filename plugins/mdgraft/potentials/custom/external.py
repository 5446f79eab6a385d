"""An external field on single particles, and an energy of the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft.kernels.periodic import volume
from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm
from mdgraft.potentials.custom.bonds import per_frame
from mdgraft.potentials.custom.compiled_items import CompiledItems
from mdgraft.potentials.custom.points import point_function


class CustomExternal(AbstractCustomTerm):
    """A sum over particles of an expression of ``x``, ``y`` and ``z``.

    ``periodicdistance(x, y, z, x0, y0, z0)`` is the distance to the nearest periodic image. The
    coordinates are those given, not wrapped into the box.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of the coordinates [nm], per-particle and global parameters.
    particles
        ``(n,)`` indices.
    parameters
        Values ``(n,)`` of each per-particle parameter by name.
    global_names
        Global parameters that the expression may use.
    periodic
        Whether the expression uses ``periodicdistance``.
    where
        What errors call the expression.

    Raises
    ------
    InvalidInputError
        If the expression is one that OpenMM refuses.
    """

    particles: Tensor

    def __init__(
        self,
        energy: str,
        particles: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        global_names: Sequence[str] = (),
        periodic: bool = False,
        where: str = "energy",
    ) -> None:
        super().__init__(parameters, global_names=global_names, periodic=periodic)
        self.register_buffer("particles", particles)
        self.energy = Expression(
            energy,
            variables=("x", "y", "z", *parameters, *global_names),
            functions={"periodicdistance": 6},
            where=where,
        )
        self._compiled = CompiledItems(
            self.energy,
            item=tuple(parameters),
            shared=self.global_names,
            measures={axis: (axis, (0,)) for axis in "xyz"},
            n_particles=1,
            periodic=False,
        )

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        return self._compiled.serve_frames(self.particles)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        quantities = self.shared_values(global_values) | self.item_values(values)
        if self._compiled.serve(positions, len(self.particles)):
            return self._compiled.energy(positions, None, self.particles, quantities, self._plain)
        return self._plain(positions, box, quantities, values)

    def _plain(
        self,
        positions: Tensor,
        box: Tensor | None,
        quantities: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Energy of each frame by plain torch operations."""
        x, y, z = positions[:, self.particles].unbind(-1)
        energies = self.energy(
            {**quantities, "x": x, "y": y, "z": z},
            {"periodicdistance": point_function("pointdistance", box)},
        )
        return per_frame(self, energies, x, values or {})


class CustomVolume(AbstractCustomTerm):
    """An expression of the volume ``v`` and the box vectors, ``ax`` to ``cz``.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of ``v`` [nm^3], ``ax``, ``bx``, ``by``, ``cx``, ``cy``, ``cz`` [nm]
        and global parameters.
    global_names
        Global parameters that the expression may use.
    where
        What errors call the expression.

    Raises
    ------
    InvalidInputError
        If the expression is one that OpenMM refuses.
    """

    _ENTRIES = (("ax", 0, 0), ("bx", 1, 0), ("by", 1, 1), ("cx", 2, 0), ("cy", 2, 1), ("cz", 2, 2))

    def __init__(
        self, energy: str, *, global_names: Sequence[str] = (), where: str = "energy"
    ) -> None:
        super().__init__({}, global_names=global_names, periodic=True)
        names = [name for name, _, _ in self._ENTRIES]
        self.energy = Expression(energy, variables=("v", *names, *global_names), where=where)
        # A term without parameters still has a dtype and a device.
        self.register_buffer("precision", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        assert box is not None
        size = volume(box)
        variables = self.shared_values(global_values) | {"v": size}
        variables |= {name: box[:, i, j] for name, i, j in self._ENTRIES}
        return self.energy(variables).expand_as(size) + 0.0 * positions.sum(dim=(-2, -1))
