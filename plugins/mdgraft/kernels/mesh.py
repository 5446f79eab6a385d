"""Particle-mesh Ewald sums, by compiled loops where there are any."""

from __future__ import annotations

from torch import Tensor

from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.pme import pme_coulomb, pme_dispersion
from mdgraft.kernels.switch import compiled_kernels


def mesh_coulomb(
    positions: Tensor, charges: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
) -> Tensor:
    """Reciprocal-space Coulomb energy; see `mdgraft.kernels.pme.pme_coulomb`."""
    if not compiled_kernels(positions):
        return pme_coulomb(positions, charges, box, alpha=alpha, grid=grid)
    from mdgraft.kernels.fused.influence import Interaction
    from mdgraft.kernels.fused.mesh import MeshKernel

    kernel = MeshKernel(Interaction.COULOMB, alpha=alpha, grid=grid)
    return differentiable_energy(kernel, positions, box, [charges])


def mesh_dispersion(
    positions: Tensor, c6: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
) -> Tensor:
    """Reciprocal-space dispersion energy; see `mdgraft.kernels.pme.pme_dispersion`."""
    if not compiled_kernels(positions):
        return pme_dispersion(positions, c6, box, alpha=alpha, grid=grid)
    from mdgraft.kernels.fused.influence import Interaction
    from mdgraft.kernels.fused.mesh import MeshKernel

    kernel = MeshKernel(Interaction.DISPERSION, alpha=alpha, grid=grid)
    return differentiable_energy(kernel, positions, box, [c6])
