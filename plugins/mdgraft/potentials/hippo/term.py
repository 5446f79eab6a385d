"""The nonbonded interactions of HIPPO."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import CHARGE, COULOMB, DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.kernels.multipole_pme import MultipoleMesh
from mdgraft.kernels.pairs import Pairs, all_pairs, neighbor_pairs
from mdgraft.kernels.periodic import volume
from mdgraft.kernels.pme import pme_dispersion
from mdgraft.potentials.amoeba.frames import LocalAxes, local_frames
from mdgraft.potentials.amoeba.interactions import (
    Moments,
    Radial,
    both_ways,
    coulomb_radial,
    dipole_field,
    ewald_radial,
    multipole_energy,
    multipole_field,
    multipole_potential,
)
from mdgraft.potentials.hippo.damping import one_center, overlap, two_centers
from mdgraft.potentials.pair_forms import switch
from mdgraft.potentials.term import AbstractTerm

#: What each exception scales.
SCALES = (
    "multipole_multipole",
    "dipole_multipole",
    "dipole_dipole",
    "dispersion",
    "repulsion",
    "charge_transfer",
)

#: Units of the parameters of particles.
UNITS = {
    "charge": CHARGE,
    "dipole": f"{CHARGE}*{NANOMETER}",
    "quadrupole": f"{CHARGE}*{NANOMETER}**2",
    "core_charge": CHARGE,
    "alpha": f"/{NANOMETER}",
    "epsilon": ENERGY,
    "damping": f"/{NANOMETER}",
    "c6": f"({ENERGY})**(1/2)*{NANOMETER}**3",
    "pauli_k": f"(kilojoule*{NANOMETER}/mole)**(1/2)/({CHARGE})",
    "pauli_q": CHARGE,
    "pauli_alpha": f"/{NANOMETER}",
    "polarizability": f"{NANOMETER}**3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HippoSettings:
    """Constants of the term.

    Attributes
    ----------
    extrapolation
        Coefficients of the sums of perturbation theory up to each order.
    cutoff
        [nm] of sums over pairs; infinite without Ewald sums.
    alpha, grid, dispersion_alpha, dispersion_grid
        Ewald splitting parameters [1/nm] and meshes; None without Ewald sums.
    """

    extrapolation: tuple[float, ...]
    cutoff: float = math.inf
    alpha: float | None = None
    grid: tuple[int, int, int] | None = None
    dispersion_alpha: float | None = None
    dispersion_grid: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """Pairs in one evaluation."""

    positions: Tensor
    box: Tensor | None
    pairs: Pairs
    vectors: Tensor
    r: Tensor
    counts: Tensor
    scale: dict[str, Tensor]
    #: Factors of 1/r, 1/r^3, ..., 1/r^9 between the two clouds of each pair.
    clouds: list[Tensor]
    mesh: MultipoleMesh | None


class Hippo(AbstractTerm):
    r"""Electrostatics with charge penetration, induction, dispersion, repulsion, charge transfer.

    Each site has a point charge, its core, in a cloud of exponential density that carries the
    rest of the charge, the dipole and the quadrupole. Clouds damp Coulomb interactions, the
    induction of dipoles and dispersion; their overlap, with a width of its own, repels. Dipoles
    are induced to a given order of perturbation theory and differentiated as they are computed.

    Parameters
    ----------
    parameters
        By the names in `UNITS`: ``(N,)``, but ``dipole`` ``(N, 3)`` and ``quadrupole``
        ``(N, 3, 3)``, traceless and symmetric, in local frames.
    axes
        Local frames.
    exceptions
        ``(exceptions, 2)`` particle indices.
    scales
        ``(exceptions,)`` by the names in `SCALES`.
    settings
        Constants.
    switching_distance
        ``()`` [nm], where repulsion and charge transfer begin to be switched off, which they are
        not if it is the cutoff or more; None without Ewald sums.

    References
    ----------
    J. A. Rackers, R. R. Silva, Z. Wang and J. W. Ponder, J. Chem. Theory Comput. 17, 7056 (2021).
    """

    exceptions: Tensor
    keys: Tensor
    order: Tensor

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        axes: LocalAxes,
        exceptions: Tensor,
        scales: Mapping[str, Tensor],
        settings: HippoSettings,
        switching_distance: Tensor | None = None,
    ) -> None:
        super().__init__(periodic=settings.grid is not None)
        self.settings = settings
        for field in dataclasses.fields(axes):
            self.register_buffer(f"axis_{field.name}", getattr(axes, field.name))
        self.register_buffer("exceptions", exceptions)
        lower, upper = exceptions.min(dim=-1).values, exceptions.max(dim=-1).values
        keys, order = torch.sort(lower * parameters["charge"].shape[0] + upper)
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("order", order, persistent=False)
        for name, unit in UNITS.items():
            self.add_parameter(name, parameters[name], unit)
        for name in SCALES:
            self.add_parameter(f"exception_{name}_scale", scales[name], DIMENSIONLESS)
        if switching_distance is not None:
            self.add_parameter("switching_distance", switching_distance, NANOMETER)

    @property
    def axes(self) -> LocalAxes:
        """Local frames."""
        return LocalAxes(*(getattr(self, f"axis_{f.name}") for f in dataclasses.fields(LocalAxes)))

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)``."""
        at = self._geometry(positions, box, values)
        moments = self._moments(positions, values)
        pairwise = (
            self._electrostatics(at, moments, values)
            + self._dispersion(at, values)
            + self._repulsion(at, moments, values)
            + self._charge_transfer(at, values)
        )
        energy = at.pairs.sum(torch.where(at.counts, pairwise, 0.0), positions.shape[0])
        energy = energy + self._induction(at, moments, values)
        return energy if at.mesh is None else energy + self._long_range(at, moments, values)

    def _geometry(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]
    ) -> _Geometry:
        settings = self.settings
        nothing = torch.empty(0, dtype=torch.long, device=positions.device)
        mesh = None
        if settings.grid is None:
            pairs, box = all_pairs(positions.shape[1], nothing), None
        else:
            assert settings.alpha is not None and box is not None
            pairs = neighbor_pairs(positions, box, cutoff=settings.cutoff, excluded=nothing)
            mesh = MultipoleMesh(positions, box, alpha=settings.alpha, grid=settings.grid)
        vectors = pairs.displacements(positions, box)
        r_squared = vectors.square().sum(dim=-1)
        counts = r_squared <= settings.cutoff**2
        r = torch.sqrt(torch.where(counts, r_squared, 1.0))
        scale = self._scale(pairs, values)
        alpha = values["alpha"]
        clouds = two_centers(alpha[pairs.first] * r, alpha[pairs.second] * r, 5)
        return _Geometry(positions, box, pairs, vectors, r, counts, scale, clouds, mesh)

    def _scale(self, pairs: Pairs, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale factors of every pair by what they scale."""
        n = values["charge"].shape[0]
        ones = values["charge"].new_ones(pairs.first.shape[0])
        if not self.keys.numel():
            return dict.fromkeys(SCALES, ones)
        lower = torch.minimum(pairs.first, pairs.second)
        key = lower * n + torch.maximum(pairs.first, pairs.second)
        place = torch.searchsorted(self.keys, key).clamp(max=self.keys.numel() - 1)
        special = self.keys[place] == key
        entry = self.order[place]
        return {
            name: torch.where(special, values[f"exception_{name}_scale"][entry], ones)
            for name in SCALES
        }

    def _moments(self, positions: Tensor, values: Mapping[str, Tensor]) -> Moments:
        """Multipoles of the clouds in the frame of the coordinates."""
        frames = local_frames(positions, self.axes)
        # Without a frame there are none, as on OpenMM's Reference platform.
        frames = torch.where((self.axes.z < 0)[:, None, None], 0.0, frames)
        dipole = torch.einsum("fnka,nk->fna", frames, values["dipole"])
        given = values["quadrupole"]
        whole = torch.triu(given) + torch.triu(given, 1).transpose(-1, -2)
        quadrupole = frames.transpose(-1, -2) @ whole @ frames
        return Moments(values["charge"] - values["core_charge"], dipole, quadrupole)

    def _radial(self, at: _Geometry, first: int, scale: Tensor, factors: list[Tensor]) -> Radial:
        """Coulomb's radial factors with what a scale factor and damping leave of the bare ones."""
        r_squared, count = at.r**2, first + len(factors)
        bare = coulomb_radial(r_squared, count)
        base = bare
        if self.settings.alpha is not None:
            base = ewald_radial(r_squared, count, self.settings.alpha)
        terms = zip(base[first:], bare[first:], factors, strict=True)
        return tuple(
            torch.where(at.counts, COULOMB * (b + (scale * factor - 1) * c), 0.0)
            for b, c, factor in terms
        )

    # Pairs ---------------------------------------------------------------------------------------

    def _paired(self, at: _Geometry, moments: Moments) -> tuple[Moments, Moments]:
        """Multipoles of both particles of each pair.

        As in OpenMM, the component of a quadrupole along the pair is minus the sum of the others:
        the trace, which should be zero, is taken out there.
        """
        line = at.vectors / at.r.unsqueeze(-1)
        along = line.unsqueeze(-1) * line.unsqueeze(-2)

        def at_pairs(particles: Tensor) -> Moments:
            found = moments.at(at.pairs, particles)
            trace = torch.diagonal(found.quadrupole, dim1=-2, dim2=-1).sum(dim=-1)
            removed = trace[..., None, None] * along
            return dataclasses.replace(found, quadrupole=found.quadrupole - removed)

        return at_pairs(at.pairs.first), at_pairs(at.pairs.second)

    def _electrostatics(
        self, at: _Geometry, moments: Moments, values: Mapping[str, Tensor]
    ) -> Tensor:
        i, j = at.pairs.first, at.pairs.second
        alpha, core = values["alpha"], values["core_charge"]
        first, second = self._paired(at, moments)
        p, q = alpha[i] * at.r, alpha[j] * at.r
        scale = at.scale["multipole_multipole"]
        to_first, to_second, between = (
            self._radial(at, 0, scale, factors)
            for factors in (one_center(p, 3), one_center(q, 3), at.clouds)
        )
        (bare,) = self._radial(at, 0, scale, [torch.ones_like(at.r)])
        energy = bare * core[i] * core[j]
        energy = energy + core[j] * multipole_potential(first, at.vectors, to_first)
        energy = energy + core[i] * multipole_potential(second, -at.vectors, to_second)
        return energy + multipole_energy(first, second, at.vectors, between)

    def _dispersion(self, at: _Geometry, values: Mapping[str, Tensor]) -> Tensor:
        i, j = at.pairs.first, at.pairs.second
        c6 = values["c6"]
        _, third, fifth, *_ = at.clouds
        left = at.scale["dispersion"] * (1.5 * fifth - 0.5 * third) ** 2
        if self.settings.dispersion_alpha is not None:
            x = (self.settings.dispersion_alpha * at.r) ** 2
            left = left - 1 + torch.exp(-x) * (1 + x + 0.5 * x * x)
        return -c6[i] * c6[j] * left / at.r**6

    def _repulsion(self, at: _Geometry, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        i, j = at.pairs.first, at.pairs.second
        charge, width = values["pauli_q"], 0.5 * values["pauli_alpha"]
        clouds = dataclasses.replace(moments, charge=charge)
        radial = tuple(overlap(width[i] * at.r, width[j] * at.r, at.r))
        size = at.scale["repulsion"] * values["pauli_k"][i] * values["pauli_k"][j]
        first, second = self._paired(at, clouds)
        energy = size * multipole_energy(first, second, at.vectors, radial)
        return self._switched(at, energy, values)

    def _charge_transfer(self, at: _Geometry, values: Mapping[str, Tensor]) -> Tensor:
        i, j = at.pairs.first, at.pairs.second
        size, rate = values["epsilon"], values["damping"]
        energy = size[i] * torch.exp(-rate[j] * at.r) + size[j] * torch.exp(-rate[i] * at.r)
        return self._switched(at, -at.scale["charge_transfer"] * energy, values)

    def _switched(self, at: _Geometry, energy: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if "switching_distance" not in values:
            return energy
        start, cutoff = values["switching_distance"], self.settings.cutoff
        # Beyond the cutoff there is nothing to switch.
        return energy * switch(at.r, start, torch.where(start < cutoff, cutoff, start + 1))

    # Induced dipoles -----------------------------------------------------------------------------

    def _induction(self, at: _Geometry, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        """``-E.mu/2`` with the dipoles of perturbation theory."""
        field = self._permanent_field(at, moments, values)
        _, third, fifth, *_ = at.clouds
        mutual = self._radial(at, 1, at.scale["dipole_dipole"], [third, fifth])
        response = values["polarizability"][:, None] / COULOMB
        dipole, total = response * field, torch.zeros_like(field)
        coefficients = self.settings.extrapolation
        for order in range(len(coefficients)):
            if order:
                dipole = response * self._interaction(at, dipole, mutual)
            total = total + sum(coefficients[order:]) * dipole
        return -0.5 * (field * total).sum(dim=(-2, -1))

    def _permanent_field(
        self, at: _Geometry, moments: Moments, values: Mapping[str, Tensor]
    ) -> Tensor:
        i, j = at.pairs.first, at.pairs.second
        alpha, core, scale = values["alpha"], values["core_charge"], at.scale["dipole_multipole"]
        (bare,) = self._radial(at, 1, scale, [torch.ones_like(at.r)])
        found = []
        for source, sign in ((j, -1), (i, 1)):
            radial = self._radial(at, 1, scale, one_center(alpha[source] * at.r, 4)[1:])
            r = sign * at.vectors
            cloud = multipole_field(moments.at(at.pairs, source), r, radial)
            found.append(cloud + (bare * core[source])[..., None] * r)
        field = both_ways(at.pairs, found[0], found[1], at.positions)
        if at.mesh is None:
            return field
        spectrum = at.mesh.spread(values["charge"], moments.dipole, moments.quadrupole)
        return field + at.mesh.field(spectrum) + self._own(moments.dipole)

    def _interaction(self, at: _Geometry, dipole: Tensor, radial: Radial) -> Tensor:
        """Field of induced dipoles at the sites of the others."""
        first, second = (at.pairs.at(dipole, k) for k in (at.pairs.first, at.pairs.second))
        field = both_ways(
            at.pairs,
            dipole_field(second, at.vectors, radial),
            dipole_field(first, at.vectors, radial),
            at.positions,
        )
        if at.mesh is None:
            return field
        return field + at.mesh.field(at.mesh.spread(None, dipole)) + self._own(dipole)

    def _own(self, dipole: Tensor) -> Tensor:
        """Field that takes back what a dipole on the mesh does to itself."""
        assert self.settings.alpha is not None
        return 4 / 3 * COULOMB * self.settings.alpha**3 / math.sqrt(math.pi) * dipole

    # Meshes --------------------------------------------------------------------------------------

    def _long_range(self, at: _Geometry, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        """Permanent multipoles and dispersion in reciprocal space, without self-interactions."""
        settings, charge, c6 = self.settings, values["charge"], values["c6"]
        assert at.mesh is not None and at.box is not None and settings.alpha is not None
        assert settings.dispersion_alpha is not None and settings.dispersion_grid is not None
        alpha = settings.alpha
        spectrum = at.mesh.spread(charge, moments.dipole, moments.quadrupole)
        energy = 0.5 * at.mesh.energy(spectrum, spectrum)
        squared = (
            charge.square().sum()
            + 2 / 3 * alpha**2 * moments.dipole.square().sum(dim=(-2, -1))
            + 8 / 5 * alpha**4 * moments.quadrupole.square().sum(dim=(-3, -2, -1))
        )
        energy = energy - COULOMB * alpha / math.sqrt(math.pi) * squared
        background = 0.5 * math.pi * COULOMB / alpha**2 * charge.sum() ** 2
        energy = energy - background / volume(at.box)
        energy = energy + pme_dispersion(
            at.positions,
            c6,
            at.box,
            alpha=settings.dispersion_alpha,
            grid=settings.dispersion_grid,
        )
        return energy + settings.dispersion_alpha**6 / 12 * c6.square().sum()
