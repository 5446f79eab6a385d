"""Gay-Berne interactions of ellipsoids."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.kernels.pairs import Pairs, all_pairs, exclusion_keys, neighbor_pairs
from mdgraft.potentials.geometry import direction, displacement, safe_norm
from mdgraft.potentials.pair_forms import root_epsilon, switch
from mdgraft.potentials.term import AbstractTerm

_PARTICLE = ("sigma", "epsilon", "sx", "sy", "sz", "ex", "ey", "ez")
_UNITS = (NANOMETER, ENERGY, NANOMETER, NANOMETER, NANOMETER, *3 * (DIMENSIONLESS,))


class GayBerne(AbstractTerm):
    r"""Lennard-Jones interactions of ellipsoids, by the distance of their surfaces.

    U = 4 epsilon [rho^12 - rho^6] eta chi^2 with rho = sigma / (r - sigma_12 + sigma),
    sigma_12 = (r.G^{-1}.r / 2)^{-1/2}, eta = (2 s_1 s_2 / det G)^{1/2} and chi = 2 r.B^{-1}.r for
    unit vectors r; G and B add up the squared semi-axes and the inverse roots of the well depths
    of both particles, turned into their frames. The frame of a particle has its x axis towards it
    from one particle, its y axis in the half plane of another.

    Parameters
    ----------
    sigma, epsilon
        ``(N,)`` [nm], [kJ/mol].
    diameters, wells
        ``(N, 3)`` [nm], and relative well depths along the axes.
    axes
        ``(N, 2)`` particles that give the x and y axes; -1 for none.
    exceptions
        ``(exceptions, 2)`` particle indices.
    exception_sigma, exception_epsilon
        ``(exceptions,)`` [nm], [kJ/mol].
    cutoff
        [nm]; infinite for all pairs. Exceptions are cut off too.
    switching
        Switching distance ``()`` and the cutoff that the switching function has [nm], or None.
    periodic
        Whether distances are those of nearest periodic images.

    References
    ----------
    R. Everaers and M. R. Ejtehadi, Phys. Rev. E 67, 041710 (2003).
    """

    replays = True

    axes: Tensor
    exceptions: Tensor
    excluded: Tensor

    def __init__(
        self,
        sigma: Tensor,
        epsilon: Tensor,
        diameters: Tensor,
        wells: Tensor,
        *,
        axes: Tensor,
        exceptions: Tensor,
        exception_sigma: Tensor,
        exception_epsilon: Tensor,
        cutoff: float = math.inf,
        switching: tuple[Tensor, float] | None = None,
        periodic: bool = False,
    ) -> None:
        super().__init__(periodic=periodic)
        self.cutoff = cutoff
        self.switching_cutoff = None if switching is None else switching[1]
        self.register_buffer("axes", axes)
        self.register_buffer("exceptions", exceptions)
        self.register_buffer(
            "excluded", exclusion_keys(exceptions, sigma.shape[0]), persistent=False
        )
        columns = (sigma, epsilon, *diameters.unbind(-1), *wells.unbind(-1))
        for name, value, unit in zip(_PARTICLE, columns, _UNITS, strict=True):
            self.add_parameter(name, value.clone(), unit)
        self.add_parameter("exception_sigma", exception_sigma, NANOMETER)
        self.add_parameter("exception_epsilon", exception_epsilon, ENERGY)
        if switching is not None:
            self.add_parameter("switching_distance", switching[0], NANOMETER)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)``."""
        if math.isinf(self.cutoff):
            pairs = all_pairs(positions.shape[1], self.excluded)
        else:
            pairs = neighbor_pairs(positions, box, cutoff=self.cutoff, excluded=self.excluded)
        i, j = pairs.first, pairs.second
        sigma = 0.5 * (values["sigma"][i] + values["sigma"][j])
        root = root_epsilon(values["epsilon"])
        shapes = self._shapes(positions, values)
        vectors = pairs.displacements(positions, box)
        energies = self._energies(vectors, sigma, root[i] * root[j], pairs, shapes, values)
        total = pairs.sum(energies, positions.shape[0])

        i, j = self.exceptions.unbind(-1)
        own = Pairs(first=i, second=j)
        vectors = displacement(positions, box, i, j)
        sigma, epsilon = values["exception_sigma"], values["exception_epsilon"]
        return total + self._energies(vectors, sigma, epsilon, own, shapes, values).sum(dim=-1)

    def _shapes(self, positions: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Matrices G and B ``(frames, N, 3, 3)`` and shape factors ``(N,)``."""
        frames = self._frames(positions)
        semiaxes = 0.5 * torch.stack([values[k] for k in ("sx", "sy", "sz")], dim=-1)
        wells = torch.stack([values[k] for k in ("ex", "ey", "ez")], dim=-1)
        x, y, z = semiaxes.unbind(-1)
        turned = frames.transpose(-1, -2)
        return (
            turned @ (semiaxes.square().unsqueeze(-1) * frames),
            turned @ (torch.rsqrt(wells).unsqueeze(-1) * frames),
            (x * y + z * z) * torch.sqrt(x * y),
        )

    def _frames(self, positions: Tensor) -> Tensor:
        """Axes of each particle as rows ``(frames, N, 3, 3)``."""
        first, second = self.axes.unbind(-1)
        unit = torch.eye(3, dtype=positions.dtype, device=positions.device)
        has_x = (first >= 0).unsqueeze(-1)
        x = torch.where(has_x, positions - positions[:, first.clamp(min=0)], unit[0])
        x = direction(x)
        # Without a y axis it is the axis of the coordinates that is farther from x, or y.
        near = has_x & (x.detach()[..., 1:2].abs() >= 0.5)
        default = torch.where(near, unit[0], unit[1])
        has_y = has_x & (second >= 0).unsqueeze(-1)
        y = torch.where(has_y, positions - positions[:, second.clamp(min=0)], default)
        y = direction(y - x * (x * y).sum(dim=-1, keepdim=True))
        return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-2)

    def _energies(
        self,
        vectors: Tensor,
        sigma: Tensor,
        epsilon: Tensor,
        pairs: Pairs,
        shapes: tuple[Tensor, ...],
        values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each pair."""
        extent, depth, factor = shapes
        r = safe_norm(vectors)
        counts = r < self.cutoff
        if pairs.frame is None:
            # An excluded pair adds nothing, whatever its distance.
            counts = counts & ~((epsilon == 0) & (r == 0))
        # Ellipsoids at one point need some direction for their energy to be that of a contact.
        apart = (counts & (r > 0)).unsqueeze(-1)
        unit = direction(torch.where(apart, vectors, torch.ones_like(vectors)))
        g, det_g = _inverse_form(_added(extent, pairs), unit)
        b, _ = _inverse_form(_added(depth, pairs), unit)
        rho = sigma / (torch.where(counts, r, 1.0) - torch.rsqrt(0.5 * g) + sigma)
        x = rho**6
        shape = torch.sqrt(2 * factor[pairs.first] * factor[pairs.second] / det_g)
        energy = 4 * epsilon * x * (x - 1) * shape * (2 * b).square()
        if self.switching_cutoff is not None:
            energy = energy * switch(r, values["switching_distance"], self.switching_cutoff)
        return torch.where(counts, energy, 0.0)


def _added(matrices: Tensor, pairs: Pairs) -> Tensor:
    """Sum of what both particles of each pair have."""
    return pairs.at(matrices, pairs.first) + pairs.at(matrices, pairs.second)


def _inverse_form(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """``v.M^{-1}.v`` of symmetric matrices, and their determinants."""
    a, b, c = matrix.unbind(-2)
    adjugate = torch.stack(
        [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-1
    )
    determinant = (a * adjugate[..., 0]).sum(dim=-1)
    form = torch.einsum("...i,...ij,...j->...", vector, adjugate, vector)
    return form / determinant, determinant
