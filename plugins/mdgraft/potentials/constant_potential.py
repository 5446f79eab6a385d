"""Electrodes at constant potential: charges that minimise the electrostatic energy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import CHARGE, CHARGE_SQUARED, COULOMB, NANOMETER
from mdgraft.kernels.observe import observe
from mdgraft.kernels.pairs import Pairs, exclusion_keys, neighbor_pairs
from mdgraft.kernels.periodic import volume
from mdgraft.kernels.pme import pme_coulomb
from mdgraft.kernels.special import erf_over_root
from mdgraft.potentials.geometry import displacement, safe_norm
from mdgraft.potentials.term import AbstractTerm

POTENTIAL = "kilojoule/(elementary charge*mole)"
FIELD = "kilojoule/(elementary charge*nanometer*mole)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantPotentialSettings:
    """Constants of a constant potential term.

    Attributes
    ----------
    cutoff
        [nm] of the sum in direct space.
    alpha, grid
        Ewald splitting parameter [1/nm] and mesh.
    exceptions_periodic
        Whether exceptions act between nearest periodic images.
    """

    cutoff: float
    alpha: float
    grid: tuple[int, int, int]
    exceptions_periodic: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Electrodes:
    """Particles whose charges are solved for.

    Attributes
    ----------
    particles, members
        ``(M,)`` particle indices, and the electrode that each belongs to.
    potential, gaussian_width, thomas_fermi_scale
        ``(electrodes,)`` [kJ/mol/e], [nm], [1/nm].
    """

    particles: Tensor
    members: Tensor
    potential: Tensor
    gaussian_width: Tensor
    thomas_fermi_scale: Tensor


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """What the energy needs besides charges."""

    positions: Tensor
    box: Tensor
    pairs: Pairs
    direct: Tensor
    own: Tensor
    values: Mapping[str, Tensor]


class ConstantPotential(AbstractTerm):
    r"""Coulomb interactions by PME with charges of electrode particles that minimise the energy.

    U = 1/(4 pi eps0) sum_pairs q q' [erfc(alpha r) - erfc(r/w)]/r + (mesh, self, background)
    - sum q x.field + sum_electrodes q^2/(4 pi eps0 sqrt(2 pi) w_i) + q^2 t_i/(2 eps0) - q v_i,
    where electrode particles are Gaussians of width w_i, with w^2 = w_i^2 + w_j^2, other particles
    points, t_i is the Thomas-Fermi scale and v_i the potential. With a target, the charges of the
    electrodes are those of the minimum at which the whole system has this total charge.

    The energy is quadratic in these charges, so that one dense linear system yields them. It is
    solved once, without a graph; a Newton step from the solution, which changes nothing but the
    derivatives, gives the response by the implicit function theorem. Derivatives of the energy are
    exact to the second order; those of the charges to the first.

    Parameters
    ----------
    charge
        ``(N,)`` [e]; that of electrode particles is not used.
    exceptions
        ``(exceptions, 2)`` pairs of other particles.
    exception_charge_product
        ``(exceptions,)`` [e^2].
    electrodes
        Particles and parameters of the electrodes.
    external_field
        ``(3,)`` [kJ/mol/e/nm]. Its energy depends on which periodic image a particle is.
    charge_constraint_target
        ``()`` total charge of the system [e], or None without a constraint.
    settings
        Cutoff and mesh.

    References
    ----------
    J. I. Siepmann and M. Sprik, J. Chem. Phys. 102, 511 (1995); A. Coretti et al., J. Chem. Phys.
    157, 184801 (2022); L. Scalfi et al., J. Chem. Phys. 153, 174704 (2020) (Thomas-Fermi).
    """

    exceptions: Tensor
    excluded: Tensor
    electrode_particles: Tensor
    electrode_members: Tensor
    slot: Tensor

    def __init__(
        self,
        charge: Tensor,
        *,
        exceptions: Tensor,
        exception_charge_product: Tensor,
        electrodes: Electrodes,
        external_field: Tensor,
        charge_constraint_target: Tensor | None,
        settings: ConstantPotentialSettings,
    ) -> None:
        super().__init__(periodic=True)
        self.settings = settings
        n = charge.shape[0]
        self.register_buffer("exceptions", exceptions)
        self.register_buffer("excluded", exclusion_keys(exceptions, n), persistent=False)
        self.register_buffer("electrode_particles", electrodes.particles)
        self.register_buffer("electrode_members", electrodes.members)
        slot = torch.full((n,), -1)
        slot[electrodes.particles] = torch.arange(len(electrodes.particles))
        self.register_buffer("slot", slot, persistent=False)
        self.add_parameter("charge", charge, CHARGE)
        self.add_parameter("exception_charge_product", exception_charge_product, CHARGE_SQUARED)
        self.add_parameter("potential", electrodes.potential, POTENTIAL)
        self.add_parameter("gaussian_width", electrodes.gaussian_width, NANOMETER)
        self.add_parameter("thomas_fermi_scale", electrodes.thomas_fermi_scale, "nanometer**-1")
        self.add_parameter("external_field", external_field, FIELD)
        if charge_constraint_target is not None:
            self.add_parameter("charge_constraint_target", charge_constraint_target, CHARGE)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        assert box is not None
        geometry = self._geometry(positions, box, values)
        energy = self._energy(self._relaxed(geometry), geometry)
        return energy + self._exceptions(positions, box, values)

    def charges(self, positions: Tensor, box: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Charges of all particles, those of the electrodes at the minimum.

        Parameters
        ----------
        positions
            ``(frames, N, 3)`` [nm].
        box
            ``(frames, 3, 3)`` [nm].
        values
            This term's parameters by name.

        Returns
        -------
        Tensor
            ``(frames, N)`` [e], with exact first derivatives.

        Raises
        ------
        InvalidInputError
            If the energy has no minimum in the charges.
        """
        geometry = self._geometry(positions, box, values)
        return self._assembled(self._relaxed(geometry), values)

    def _geometry(self, positions: Tensor, box: Tensor, values: Mapping[str, Tensor]) -> _Geometry:
        """Everything that does not depend on charges."""
        settings, alpha = self.settings, self.settings.alpha
        pairs = neighbor_pairs(positions, box, cutoff=settings.cutoff, excluded=self.excluded)
        r = safe_norm(pairs.displacements(positions, box))
        width = values["gaussian_width"][self.electrode_members]
        square = torch.zeros_like(values["charge"]).index_add(0, self.electrode_particles, width**2)
        squares = square[pairs.first] + square[pairs.second]
        smeared = squares > 0
        joint = torch.sqrt(torch.where(smeared, squares, 1.0))
        blur = torch.where(smeared, torch.erfc(r / joint), 0.0)
        direct = COULOMB * (torch.erfc(alpha * r) - blur) / r
        direct = torch.where(r <= settings.cutoff, direct, 0.0)
        thomas_fermi = values["thomas_fermi_scale"][self.electrode_members]
        own = COULOMB / (math.sqrt(2 * math.pi) * width) + 2 * math.pi * COULOMB * thomas_fermi
        return _Geometry(positions, box, pairs, direct, own, values)

    def _assembled(self, solved: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Charges of all particles ``(frames, N)`` from those of the electrodes."""
        fixed = values["charge"].expand(solved.shape[0], -1)
        if not len(self.electrode_particles):
            return fixed
        return torch.where(self.slot < 0, fixed, solved[:, self.slot.clamp(min=0)])

    def _energy(self, solved: Tensor, geometry: _Geometry) -> Tensor:
        """Energy ``(frames,)`` without products of exceptions, given ``(frames, M)`` charges."""
        positions, box, values = geometry.positions, geometry.box, geometry.values
        alpha = self.settings.alpha
        q = self._assembled(solved, values)
        pairs = geometry.pairs
        assert pairs.frame is not None
        product = q[pairs.frame, pairs.first] * q[pairs.frame, pairs.second]
        energy = pairs.sum(product * geometry.direct, positions.shape[0])
        energy = energy + pme_coulomb(positions, q, box, alpha=alpha, grid=self.settings.grid)
        energy = energy - COULOMB * alpha / math.sqrt(math.pi) * (q * q).sum(dim=-1)
        background = 0.5 * math.pi * COULOMB / alpha**2 * q.sum(dim=-1) ** 2
        energy = energy - background / volume(box)
        energy = energy - (q * (positions @ values["external_field"])).sum(dim=-1)
        potential = values["potential"][self.electrode_members]
        energy = energy + (solved * (geometry.own * solved - potential)).sum(dim=-1)
        i, j = self.exceptions.unbind(-1)
        r2 = self._exception_vectors(positions, box).square().sum(dim=-1)
        screened = alpha * erf_over_root(alpha**2 * r2)
        return energy - COULOMB * (q[:, i] * q[:, j] * screened).sum(dim=-1)

    def _exception_vectors(self, positions: Tensor, box: Tensor) -> Tensor:
        cell = box if self.settings.exceptions_periodic else None
        return displacement(positions, cell, *self.exceptions.unbind(-1))

    def _exceptions(self, positions: Tensor, box: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Coulomb interactions of exceptions ``(frames,)``."""
        product = values["exception_charge_product"]
        r = safe_norm(self._exception_vectors(positions, box))
        # An excluded pair adds nothing, whatever its distance.
        excluded = (product == 0) & (r == 0)
        return (COULOMB * product / torch.where(excluded, 1.0, r)).sum(dim=-1)

    def _relaxed(self, geometry: _Geometry) -> Tensor:
        """Charges of the electrodes at the minimum ``(frames, M)``."""
        positions, values = geometry.positions, geometry.values
        n_frames = positions.shape[0]
        start = positions.new_zeros(n_frames, len(self.electrode_particles))
        if not len(self.electrode_particles):
            return start

        def slope(q: Tensor, at: _Geometry) -> Tensor:
            def total(y: Tensor) -> Tensor:
                return self._energy(y, at).sum()

            gradient: Any = torch.func.grad(total)
            result: Tensor = gradient(q)
            return result

        fixed = _detached(geometry)
        matrix = self._matrix(fixed)
        observe(_check_minimum, lambda result, _: result, matrix)
        target = None
        if "charge_constraint_target" in values:
            other = torch.where(self.slot < 0, values["charge"], 0.0).sum()
            target = values["charge_constraint_target"] - other
        # A product, since the derivative of a solution is wrong under vmap of forward mode.
        inverse = torch.linalg.inv(matrix)
        solution = start
        # The first step solves, the second one carries the derivatives.
        for at in (fixed, geometry):
            last = at is geometry
            step = inverse @ slope(solution, at).unsqueeze(-1)
            solution = solution - step.squeeze(-1)
            if target is not None:
                goal = target if last else target.detach()
                share = inverse.sum(dim=-1)
                share = share / share.sum(dim=-1, keepdim=True)
                solution = solution + share * (goal - solution.sum(dim=-1, keepdim=True))
        return solution

    def _matrix(self, geometry: _Geometry) -> Tensor:
        """Second derivatives of the energy in the charges ``(frames, M, M)``."""
        positions, box, pairs = geometry.positions, geometry.box, geometry.pairs
        n_frames, m = positions.shape[0], len(self.electrode_particles)
        alpha, grid = self.settings.alpha, self.settings.grid
        sites = positions[:, self.electrode_particles]

        def mesh(unit: Tensor) -> Tensor:
            def energy(q: Tensor) -> Tensor:
                return pme_coulomb(sites, q, box, alpha=alpha, grid=grid).sum()

            gradient: Any = torch.func.grad(energy)
            result: Tensor = gradient(unit.expand(n_frames, m))
            return result

        units = torch.eye(m, dtype=positions.dtype, device=positions.device)
        columns: Any = torch.func.vmap(mesh, chunk_size=16)
        matrix: Tensor = columns(units).movedim(0, -1)

        assert pairs.frame is not None
        i, j = self.slot[pairs.first], self.slot[pairs.second]
        factor = torch.where((i >= 0) & (j >= 0), geometry.direct, 0.0)
        i, j = i.clamp(min=0), j.clamp(min=0)
        flat = matrix.new_zeros(n_frames * m * m)
        for row, col in ((i, j), (j, i)):
            flat = flat.index_add(0, (pairs.frame * m + row) * m + col, factor)
        background = math.pi * COULOMB / (alpha**2 * volume(box))
        diagonal = 2 * (geometry.own - COULOMB * alpha / math.sqrt(math.pi))
        matrix = matrix + flat.reshape(n_frames, m, m) - background[:, None, None]
        matrix = matrix + torch.diag_embed(diagonal)
        return 0.5 * (matrix + matrix.transpose(-1, -2))


def _detached(geometry: _Geometry) -> _Geometry:
    """The same without derivatives."""
    return _Geometry(
        geometry.positions.detach(),
        geometry.box.detach(),
        geometry.pairs,
        geometry.direct.detach(),
        geometry.own.detach(),
        {key: value.detach() for key, value in geometry.values.items()},
    )


def _check_minimum(matrix: Tensor) -> Tensor:
    """Raise unless all matrices are positive definite."""
    info: Tensor = torch.linalg.cholesky_ex(matrix).info
    if bool((info != 0).any()):
        raise InvalidInputError(
            "gaussian_width, thomas_fermi_scale: the energy of the electrodes has no minimum in "
            "their charges; smaller widths or larger Thomas-Fermi scales make it stable"
        )
    return info
