"""Particle-mesh Ewald sums, by compiled kernels where there are any."""

from __future__ import annotations

import functools

from torch import Tensor

from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.kernel import Kernel
from mdgraft.kernels.pme import pme_coulomb, pme_dispersion
from mdgraft.kernels.switch import compiled_kernels, on_device


def mesh_coulomb(
    positions: Tensor, charges: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
) -> Tensor:
    """Reciprocal-space Coulomb energy; see `mdgraft.kernels.pme.pme_coulomb`."""
    if not compiled_kernels(positions):
        return pme_coulomb(positions, charges, box, alpha=alpha, grid=grid)
    kernel = _kernel(False, alpha, grid, on_device(positions))
    return differentiable_energy(kernel, positions, box, [charges])


def mesh_dispersion(
    positions: Tensor, c6: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
) -> Tensor:
    """Reciprocal-space dispersion energy; see `mdgraft.kernels.pme.pme_dispersion`."""
    if not compiled_kernels(positions):
        return pme_dispersion(positions, c6, box, alpha=alpha, grid=grid)
    kernel = _kernel(True, alpha, grid, on_device(positions))
    return differentiable_energy(kernel, positions, box, [c6])


@functools.lru_cache(maxsize=16)
def _kernel(dispersion: bool, alpha: float, grid: tuple[int, int, int], for_device: bool) -> Kernel:
    from mdgraft.kernels.fused.influence import Interaction

    kind = Interaction.DISPERSION if dispersion else Interaction.COULOMB
    if for_device:
        from mdgraft.kernels.device.guard import Guarded
        from mdgraft.kernels.device.mesh_kernel import DeviceMeshKernel

        return Guarded(DeviceMeshKernel(kind, alpha=alpha, grid=grid))
    from mdgraft.kernels.fused.mesh import MeshKernel

    return MeshKernel(kind, alpha=alpha, grid=grid)
