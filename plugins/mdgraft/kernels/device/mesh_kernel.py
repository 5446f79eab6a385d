"""Smooth particle-mesh Ewald sums on the device of the positions, with two derivatives.

The same sums as in `mdgraft.kernels.fused.mesh`; see there for the formulas.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft.kernels.device import modes as on_modes
from mdgraft.kernels.device import programs
from mdgraft.kernels.device.modes import Modes
from mdgraft.kernels.device.numbers import outer_sum
from mdgraft.kernels.device.recording import recorder
from mdgraft.kernels.fused.influence import Interaction
from mdgraft.kernels.kernel import Inputs, PerFrame
from mdgraft.kernels.periodic import reciprocal, volume
from mdgraft.kernels.pme import pme_coulomb, pme_dispersion

#: Mesh points of the frames that are transformed at once; bounds memory.
_POINTS = 1 << 24
#: Sums of integers stay below this.
_LARGEST = 2.0**61
_WARPS = 4


@dataclasses.dataclass(frozen=True)
class _Influence:
    """What a box makes of the modes."""

    reciprocals: Tensor
    volumes: Tensor
    by_mirror: tuple[Tensor, Tensor, Tensor]
    total: Tensor


class DeviceMeshKernel:
    """The energy of `pme_coulomb` or `pme_dispersion`, as a `derivatives.Kernel`.

    Inputs and parameters are those of `mdgraft.kernels.fused.mesh.MeshKernel`. Particles are spread
    on meshes of integers, so that results do not depend on the order of atomic operations.
    """

    fused = True
    framed: tuple[int, ...] = ()

    def __init__(self, kind: Interaction, *, alpha: float, grid: tuple[int, int, int]) -> None:
        self._kind, self._alpha, self._grid = kind, float(alpha), grid
        self.reference: Callable[..., Tensor] | None = self._plain
        self._modes: dict[torch.device, Modes] = {}

    @property
    def label(self) -> tuple[Hashable, ...]:
        """Equal for kernels that run the same programs."""
        return "mesh", self._kind

    def _plain(self, positions: Tensor, box: Tensor, strengths: Tensor) -> Tensor:
        plain = pme_coulomb if self._kind == Interaction.COULOMB else pme_dispersion
        return plain(positions, strengths, box, alpha=self._alpha, grid=self._grid)

    # Kernel -----------------------------------------------------------------------------------

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)``."""
        return self.gradients(inputs, (False, False, False))[0]

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, PerFrame]:
        """Energies, and derivatives of each frame's energy."""
        dtype = inputs[0].dtype
        if not len(inputs[0]):
            return inputs[0].new_zeros(0), _none(inputs, wanted)
        energies, *found = self._batches(inputs, lambda some, _: self._first(some, wanted))
        return energies.to(dtype), [
            t.to(dtype) if on else None for t, on in zip(found, wanted, strict=True)
        ]

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions."""
        if not len(inputs[0]):
            return _none(inputs, wanted)

        def batch(some: Inputs, frames: slice) -> tuple[Tensor, ...]:
            moves = [
                t.new_zeros((len(some[0]), *t.shape) if k == 2 else t.shape)
                if d is None
                else d[frames]
                for k, (t, d) in enumerate(zip(some, directions, strict=True))
            ]
            return self._second(some, moves)

        found = self._batches(inputs, batch)
        return [t.to(inputs[0].dtype) if on else None for t, on in zip(found, wanted, strict=True)]

    def _batches(
        self, inputs: Inputs, batch: Callable[[Inputs, slice], tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """Frames in batches of bounded memory; what is lost is not a number."""
        positions, box, strengths = inputs
        n_frames, size = len(positions), max(1, _POINTS // math.prod(self._grid))
        parts = []
        for start in range(0, n_frames, size):
            frames = slice(start, start + size)
            whole = n_frames <= size
            own = (positions, box) if whole else (positions[frames], box[frames])
            found = batch((*own, strengths), frames)
            # What is recorded is replayed for finite numbers only.
            if recorder(positions) is None:
                lost = (0.0 * own[0]).sum(dim=(1, 2)) + (0.0 * own[1]).sum(dim=(1, 2))
                found = tuple(t + lost.reshape(-1, *(1,) * (t.ndim - 1)) for t in found)
            parts.append(found)
        if len(parts) == 1:
            return list(parts[0])
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    # One batch --------------------------------------------------------------------------------

    def _first(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        """Energies and their derivatives, which are zero if nothing is wanted."""
        positions, box, strengths = inputs
        n_frames, n_particles = positions.shape[:2]
        cell = box.double()
        r, volumes = reciprocal(cell).contiguous(), volume(cell)
        charges = strengths.expand(n_frames, n_particles).contiguous()
        spectra = self._spectra("spread", positions, [r], [charges])
        energies, virials, changed = self._modulated(spectra, r, volumes)
        if not any(wanted):
            zero = torch.zeros_like(positions), torch.zeros_like(box), torch.zeros_like(charges)
            return energies, *zero
        out = self._gathered("gather", 4, positions, [r], [self._potentials(changed)])
        values, g = out[..., 0], charges.double().unsqueeze(-1) * out[..., 1:]
        rt = r.transpose(1, 2)
        # Everything depends on the box through R and V: dR = -R dB R, dV = V tr(R dB).
        turned = outer_sum(positions.double(), g)
        if wanted[1]:
            turned = turned + r @ virials
        boxes = -rt @ turned @ rt - energies[:, None, None] * rt
        return energies, g @ rt, boxes, values

    def _second(self, inputs: Inputs, directions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Changes of the derivatives."""
        positions, box, strengths = inputs
        n_frames, n_particles = positions.shape[:2]
        shifts, strains, dq = (d.contiguous() for d in directions)
        modes, known = self._of(box)
        r, dbox = known.reciprocals, strains.double()
        dr = (-r @ dbox @ r).contiguous()
        rt, drt = r.transpose(1, 2), dr.transpose(1, 2)
        charges = strengths.expand(n_frames, n_particles).contiguous()
        spectra = self._spectra("spread", positions, [r], [charges])
        change = self._spectra("spread_tangent", positions, [shifts, r, dr], [charges, dq])
        power = modes.pairs * _power(spectra)
        product = spectra.to(torch.complex128).conj() * change
        dpower = 2 * modes.pairs * product.real
        value, slope, curve = known.by_mirror
        # Of t = |R m|^2 and ln V.
        metric = rt @ dr + drt @ r
        dt = ((modes.waves[:, None] @ metric) * modes.waves[:, None]).sum(dim=-1)
        growth = (r @ dbox).diagonal(dim1=1, dim2=2).sum(dim=-1)[:, None]
        dinfluence = (slope * dt - value * growth).sum(dim=0)
        energies = 0.5 * (known.total * power).sum(dim=-1)
        denergies = 0.5 * (dinfluence * power + known.total * dpower).sum(dim=-1)
        virials = on_modes.squares(modes.waves, slope * power)
        dslope = curve * dt - slope * growth
        dvirials = on_modes.squares(modes.waves, dslope * power + slope * dpower)
        weight, dweight = known.total.to(positions.dtype), dinfluence.to(positions.dtype)
        phi = self._potentials(weight * spectra)
        dphi = self._potentials(dweight * spectra + weight * change)
        out = self._gathered("gather_tangent", 7, positions, [shifts, r, dr], [phi, dphi])
        slopes, values, dslopes = out[..., :3].double(), out[..., 3], out[..., 4:].double()
        g = charges.double().unsqueeze(-1) * slopes
        dg = dq.double().unsqueeze(-1) * slopes + charges.double().unsqueeze(-1) * dslopes
        x, dx = positions.double(), shifts.double()
        turned = outer_sum(x, g) + r @ virials
        dturned = outer_sum(dx, g) + outer_sum(x, dg) + dr @ virials + r @ dvirials
        boxes = (
            -(drt @ turned @ rt + rt @ dturned @ rt + rt @ turned @ drt)
            - denergies[:, None, None] * rt
            - energies[:, None, None] * drt
        )
        return g @ drt + dg @ rt, boxes, values

    def _modulated(
        self, spectra: Tensor, reciprocals: Tensor, volumes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Energies, their derivatives in |R m|^2 times m m^T, spectra times the influence."""
        modes = self._modes_on(spectra.device)
        if self._kind == Interaction.COULOMB:
            from mdgraft.kernels.device import mesh_programs as of_mesh

            (n_frames, n), size = spectra.shape, of_mesh.MODES
            blocks = -(-n // size)
            factors = on_modes.COULOMB_FACTOR / volumes
            decay = volumes.new_full((1,), (math.pi / self._alpha) ** 2)
            out = torch.empty_like(spectra)
            sums = volumes.new_empty(n_frames, 2 * blocks, of_mesh.SUMS)
            arrays = [torch.view_as_real(spectra), modes.waves, modes.shares, modes.pairs]
            arrays += [reciprocals, factors, decay, torch.view_as_real(out), sums]
            grid = (n_frames * blocks,)
            programs.start(of_mesh.modulate, grid, *arrays, n, blocks, size, warps=_WARPS)
            total = sums.sum(dim=1)
            xx, yy, zz, xy, xz, yz = total[:, 1:].unbind(-1)
            virials = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], dim=-1).reshape(-1, 3, 3)
            return total[:, 0], virials, out
        mirrors = on_modes.influence(self._kind, self._alpha, modes, reciprocals, volumes)
        power, influence = modes.pairs * _power(spectra), mirrors[0].sum(dim=0)
        virials = on_modes.squares(modes.waves, mirrors[1] * power)
        energies = 0.5 * (influence * power).sum(dim=-1)
        return energies, virials, influence.to(spectra.real.dtype) * spectra

    def _modes_on(self, device: torch.device) -> Modes:
        modes = self._modes.get(device)
        if modes is None:
            modes = self._modes[device] = on_modes.modes_of(self._grid, device)
        return modes

    def _of(self, box: Tensor) -> tuple[Modes, _Influence]:
        """Modes, and the influence on them."""
        modes = self._modes_on(box.device)
        cell = box.double()
        r, v = reciprocal(cell).contiguous(), volume(cell)
        mirrors = on_modes.influence(self._kind, self._alpha, modes, r, v)
        return modes, _Influence(r, v, mirrors, mirrors[0].sum(dim=0))

    # Meshes -----------------------------------------------------------------------------------

    def _spectra(
        self, name: str, positions: Tensor, frames: Sequence[Tensor], strengths: Sequence[Tensor]
    ) -> Tensor:
        """Transforms ``(F, M)`` of what a program adds to meshes."""
        n_frames = len(positions)
        bounds = [s.abs().sum(dim=-1, dtype=torch.float64) for s in strengths]
        if name == "spread_tangent":
            # No derivative of a spline is larger than one, on each axis.
            shifts, r, dr = frames
            moved = (shifts.double() @ r + positions.double() @ dr).abs()
            x, y, z = moved.unbind(-1)
            steps = self._grid[0] * x + self._grid[1] * y + self._grid[2] * z
            bounds.append((strengths[0].double().abs() * steps).sum(dim=-1))
        scales = _LARGEST / functools.reduce(torch.add, bounds).clamp(min=1e-200)
        meshes = torch.zeros(n_frames, *self._grid, dtype=torch.int64, device=positions.device)
        self._start(name, positions, frames, [*strengths, scales, meshes])
        density = (meshes.double() / scales[:, None, None, None]).to(positions.dtype)
        spectra: Tensor = torch.fft.rfftn(density, dim=(-3, -2, -1)).flatten(1)
        return spectra

    def _potentials(self, spectra: Tensor) -> Tensor:
        """Inverse transforms ``(F, *grid)``, without a factor."""
        nx, ny, nz = self._grid
        shaped = spectra.reshape(-1, nx, ny, nz // 2 + 1)
        result: Tensor = torch.fft.irfftn(shaped, s=self._grid, dim=(-3, -2, -1), norm="forward")
        return result.contiguous()

    def _gathered(
        self,
        name: str,
        width: int,
        positions: Tensor,
        frames: Sequence[Tensor],
        potentials: Sequence[Tensor],
    ) -> Tensor:
        """What a program finds for each particle ``(F, N, width)``."""
        out = positions.new_empty(*positions.shape[:2], width)
        self._start(name, positions, frames, [*potentials, out])
        return out

    def _start(
        self,
        name: str,
        positions: Tensor,
        frames: Sequence[Tensor],
        arrays: Sequence[Tensor],
    ) -> None:
        from mdgraft.kernels.device import mesh_programs

        n_frames, n = positions.shape[:2]
        size = 64 if programs.interpreted() else mesh_programs.BLOCK
        blocks = -(-n // size)
        function: Any = getattr(mesh_programs, name)
        tensors, numbers = (
            [positions.contiguous(), *frames, *arrays],
            (n, *self._grid, blocks, size),
        )
        # Enough warps that registers do not spill.
        warps = _WARPS * (2 if positions.dtype == torch.float64 else 1)
        programs.start(function, (n_frames * blocks,), *tensors, *numbers, warps=warps)


def _power(spectra: Tensor) -> Tensor:
    """Squared moduli in float64."""
    return spectra.real.double() ** 2 + spectra.imag.double() ** 2


# The transform of no frames at all is an error.
def _none(inputs: Inputs, wanted: Sequence[bool]) -> PerFrame:
    positions, box, strengths = inputs
    found = positions, box, strengths.new_zeros(0, *strengths.shape)
    return [torch.zeros_like(t) if on else None for t, on in zip(found, wanted, strict=True)]
