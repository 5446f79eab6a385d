"""Pair energies as functions of the squared distance."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.special import dispersion_damping


def root_epsilon(epsilon: Tensor) -> Tensor:
    """Square root of well depths, with derivative 0 at 0.

    The true derivative there is infinite: the Lorentz-Berthelot rule has a square root.
    """
    # Products, since torch.vmap takes selections one by one.
    zero = (epsilon == 0).to(epsilon.dtype)
    return torch.sqrt(epsilon + zero) * (1 - zero)


def lennard_jones(r_squared: Tensor, sigma: Tensor, epsilon: Tensor) -> Tensor:
    """4 epsilon [(sigma/r)^12 - (sigma/r)^6] [kJ/mol]."""
    x = (sigma * sigma / r_squared) ** 3
    return 4 * epsilon * x * (x - 1)


def coulomb(r_squared: Tensor, charge_product: Tensor) -> Tensor:
    """Q q' / (4 pi eps0 r) [kJ/mol]."""
    return COULOMB * charge_product * torch.rsqrt(r_squared)


def reaction_field(
    r_squared: Tensor, charge_product: Tensor, cutoff: float, dielectric: Tensor
) -> Tensor:
    """Q q' / (4 pi eps0) (1/r + k_rf r^2 - c_rf), zero at the cutoff.

    Tironi et al., J. Chem. Phys. 102, 5451 (1995).
    """
    k_rf = (dielectric - 1) / (2 * dielectric + 1) / cutoff**3
    c_rf = 3 * dielectric / (2 * dielectric + 1) / cutoff
    return COULOMB * charge_product * (torch.rsqrt(r_squared) + k_rf * r_squared - c_rf)


def ewald_direct(r_squared: Tensor, charge_product: Tensor, alpha: float) -> Tensor:
    """Q q' erfc(alpha r) / (4 pi eps0 r)."""
    r = torch.sqrt(r_squared)
    return COULOMB * charge_product * torch.erfc(alpha * r) / r


def switch(r: Tensor, switching_distance: Tensor, cutoff: Tensor | float) -> Tensor:
    """S = 1 - 10 t^3 + 15 t^4 - 6 t^5 with t = (r - r_switch)/(r_cutoff - r_switch), 1 before."""
    t = ((r - switching_distance) / (cutoff - switching_distance)).clamp(min=0)
    return 1 - t * t * t * (10 - t * (15 - 6 * t))


def ljpme_direct(
    r_squared: Tensor,
    c6_product: Tensor,
    sigma: Tensor,
    epsilon: Tensor,
    alpha: float,
    cutoff: float,
) -> Tensor:
    """What LJPME adds to a direct-space Lennard-Jones pair.

    The mesh attracts all pairs with geometric C6: its share is taken back, and a constant shift
    makes up for the step between Lorentz-Berthelot and geometric dispersion at the cutoff.
    """
    c2 = torch.as_tensor(cutoff**2, dtype=r_squared.dtype, device=r_squared.device)
    at_cutoff = lennard_jones(c2, sigma, epsilon) + ljpme_mesh_share(c2, c6_product, alpha)
    return ljpme_mesh_share(r_squared, c6_product, alpha) - at_cutoff


def ljpme_mesh_share(r_squared: Tensor, c6_product: Tensor, alpha: float) -> Tensor:
    """C6 [1 - exp(-x)(1 + x + x^2/2)] / r^6 with x = (alpha r)^2, minus the energy on the mesh."""
    return c6_product * alpha**6 * dispersion_damping(alpha**2 * r_squared)
