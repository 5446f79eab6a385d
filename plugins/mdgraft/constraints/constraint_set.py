"""Distance constraints of a system, and projections onto them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft._types import BoxLike, PositionsLike
from mdgraft._units import NANOMETER
from mdgraft.constraints._clusters import AbstractClusters, batches_of, dot
from mdgraft.constraints._images import image_shifts
from mdgraft.constraints._inputs import (
    as_numbers,
    as_tensor,
    check_positive,
    check_structure,
    joint_frames,
)
from mdgraft.constraints._multipliers import Problem, multipliers
from mdgraft.constraints.host_projection import HostProjection, by_host, check_agreement
from mdgraft.constraints.newton import Newton
from mdgraft.constraints.virtual_sites import VirtualSites

#: Takes the rows of one batch out of those of all: ``(F, R, ...) -> (F, K, m, ...)``.
Rows: TypeAlias = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """Positions that meet their constraints, and how they were found.

    Attributes
    ----------
    positions
        ``(..., N, 3)`` [nm].
    multipliers
        ``(..., C)`` [Da]: particle j of a constraint i-j is moved by ``2 lambda r_ij / m_j``, with
        r_ij of the reference, and particle i by the opposite over its own mass.
    residual
        ``(...,)`` largest relative error of a length in each frame; without a graph.
    """

    positions: Tensor
    multipliers: Tensor
    residual: Tensor


class ConstraintSet(nn.Module):
    """Constrained distances between particles, with differentiable projections.

    Positions are projected as SHAKE does, velocities as RATTLE does; rigid water (SETTLE) is the
    same map. Each connected cluster is solved at once. Derivatives of every order are those of the
    implicit functions, one linear solve for each cluster, in positions, velocities, masses and
    lengths; nothing is unrolled. ``torch.func`` transforms, batches of frames and ``to`` work.

    Parameters
    ----------
    pairs
        ``(C, 2)`` particle indices.
    lengths
        ``(C,)`` [nm].
    masses
        ``(N,)`` [Da]; particles of mass zero do not move.
    sites
        Virtual sites, which are placed anew whenever positions are projected.
    pbc
        Directions in which a constraint reaches the nearest image, as ASE means it. By default
        none: OpenMM takes distances as they are.

    Attributes
    ----------
    lengths, masses
        Parameters that are constant until ``requires_grad_()`` is called on them. Every method
        also takes other tensors in their place.

    Raises
    ------
    InvalidInputError
        For indices out of range, a pair that repeats or has no movable particle, a length that is
        not positive, or a negative mass.
    """

    pairs: Tensor
    _first: Tensor
    _second: Tensor
    _places: Tensor

    def __init__(
        self,
        pairs: Any,
        lengths: Any,
        masses: Any,
        *,
        sites: VirtualSites | None = None,
        pbc: Sequence[bool] = (False, False, False),
    ) -> None:
        super().__init__()
        weights, distances = (
            as_numbers("masses", masses, "dalton"),
            as_numbers("lengths", lengths, NANOMETER),
        )
        # Single precision only if both are.
        dtype = torch.promote_types(weights.dtype, distances.dtype)
        self.masses = nn.Parameter(weights.to(dtype), requires_grad=False)
        self.lengths = nn.Parameter(distances.to(self.masses), requires_grad=False)
        index = torch.as_tensor(pairs).reshape(-1, 2).long().cpu()
        check_structure(index.numpy(), self.lengths.detach(), self.masses.detach())
        if sites is not None and sites.n_particles != self.n_particles:
            raise InvalidInputError(
                f"sites: are those of {sites.n_particles} particles, but there are "
                f"{self.n_particles} masses"
            )
        self.register_buffer("pairs", index)
        self._modules["sites"] = sites
        self.pbc = (bool(pbc[0]), bool(pbc[1]), bool(pbc[2]))
        self._batches = nn.ModuleList(batches_of(index.numpy(), self.n_particles))
        self._sort_rows(len(index))
        self.to(self.masses)

    def _sort_rows(self, n_constraints: int) -> None:
        """Lay out the rows of all batches."""
        order = [batch.slots.reshape(-1) for batch in self.batches]
        joined = torch.cat(order) if order else torch.empty(0, dtype=torch.long)
        kept = [
            torch.ones_like(batch.first, dtype=torch.bool)
            if batch.present is None
            else batch.present > 0
            for batch in self.batches
        ]
        places = torch.cat([k.reshape(-1) for k in kept]) if kept else joined.bool()
        # Where each constraint is found among the rows of all batches.
        found = torch.empty(n_constraints, dtype=torch.long)
        found[joined[places]] = places.nonzero().squeeze(-1)
        self.register_buffer("_places", found)
        for name in ("first", "second"):
            ends = [getattr(batch, name).reshape(-1) for batch in self.batches]
            self.register_buffer(f"_{name}", torch.cat(ends) if ends else joined)

    # Structure --------------------------------------------------------------------------------

    @property
    def n_particles(self) -> int:
        """Number of particles N, virtual sites included."""
        return int(self.masses.shape[0])

    @property
    def n_constraints(self) -> int:
        """Number of constraints C."""
        return int(self.lengths.shape[0])

    @property
    def batches(self) -> list[AbstractClusters]:
        """Connected clusters in batches of equal size."""
        return list(self._batches)  # type: ignore[arg-type]

    def rows(self) -> Iterator[tuple[AbstractClusters, Rows]]:
        """Each batch, with what takes its rows ``(F, K, m, ...)`` out of those of all batches.

        Every method sorts constraints like this: batch after batch, cluster after cluster.
        """
        start = 0
        for batch in self.batches:
            stop = start + batch.first.numel()
            yield batch, functools.partial(_taken, start, stop, batch.first.shape)
            start = stop

    @property
    def sites(self) -> VirtualSites | None:
        """Virtual sites, or None."""
        found = self._modules["sites"]
        assert found is None or isinstance(found, VirtualSites)
        return found

    @property
    def periodic(self) -> bool:
        """Whether a box is needed."""
        return any(self.pbc) or (self.sites is not None and self.sites.periodic)

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which projections are computed."""
        return self.masses.dtype

    # Projections ------------------------------------------------------------------------------

    def forward(
        self, positions: PositionsLike, reference: PositionsLike | None = None, **options: Any
    ) -> Tensor:
        """`project_positions`, for ``torch.func.functional_call``."""
        return self.project_positions(positions, reference, **options)

    def project_positions(
        self,
        positions: PositionsLike,
        reference: PositionsLike | None = None,
        *,
        box: BoxLike = None,
        lengths: Tensor | None = None,
        masses: Tensor | None = None,
        solver: Newton | HostProjection | None = None,
    ) -> Tensor:
        """Positions that meet the constraints; `position_projection` tells more.

        Solves ``x' = x* + M^-1 A(x)^T lambda`` with ``|r'_ij| = d_ij`` (SHAKE; Ryckaert, Ciccotti
        and Berendsen, J. Comput. Phys. 23, 327 (1977)).

        Parameters
        ----------
        positions
            x*, ``(..., N, 3)`` [nm].
        reference
            x, ``(..., N, 3)`` [nm]: the positions before the step, along whose constrained
            vectors the correction acts. None means x* itself.
        box
            ``(..., 3, 3)`` box vectors as rows [nm]; needed when `periodic`.
        lengths, masses
            Replace the set's own.
        solver
            `Newton` by default, or a host's projection.

        Returns
        -------
        Tensor
            ``(..., N, 3)`` [nm], with virtual sites placed.

        Raises
        ------
        ConstraintError
            If the solver does not converge, constraints depend on each other, or a derivative is
            asked for with a loose tolerance.
        InvalidInputError
            For a wrong shape or NaN.
        """
        return self.position_projection(
            positions, reference, box=box, lengths=lengths, masses=masses, solver=solver
        ).positions

    def position_projection(
        self,
        positions: PositionsLike,
        reference: PositionsLike | None = None,
        *,
        box: BoxLike = None,
        lengths: Tensor | None = None,
        masses: Tensor | None = None,
        solver: Newton | HostProjection | None = None,
    ) -> Projection:
        """As `project_positions`, with multipliers and residuals."""
        given_positions = {"positions": positions}
        if reference is not None:
            given_positions["reference"] = reference
        (trial, *others), cells, leading = self.frames(box, **given_positions)
        old = others[0] if others else trial
        own_lengths, inverse = self._lengths(lengths), self.inverse_masses(masses)
        given = None
        newton = Newton()
        if isinstance(solver, Newton):
            newton = solver
        elif solver is not None:
            if reference is not None:
                raise InvalidInputError(
                    "reference: got positions, but a host projects along the vectors of the "
                    "positions that it is given; pass None, or leave the solver out"
                )
            given = by_host(solver.project_positions, trial)
        shifts = self._shifts(old, cells)
        before, after = self._vectors(old, shifts), self._vectors(trial, shifts)
        added = None if given is None else self._vectors(given - trial.detach(), None)
        squares = own_lengths.square()
        kappas, residuals = [], [trial.new_zeros(trial.shape[0])]
        for batch, rows in self.rows():
            kappa, residual = multipliers(
                Problem(clusters=batch, solver=newton),
                rows(after),
                rows(before),
                batch.coupling(inverse[batch.first], inverse[batch.second]),
                squares[batch.slots].unsqueeze(0),
                None if added is None else rows(added),
            )
            kappas.append(kappa.flatten(1))
            residuals.append(residual.amax(dim=-1))
        kappa = torch.cat(kappas, dim=1) if kappas else trial.new_zeros(trial.shape[0], 0)
        moved = trial + self._displacements(kappa, before, inverse)
        if given is not None:
            # The host's numbers, with the derivatives of the map that it computes.
            moved = moved + (given - moved).detach()
        if self.sites is not None:
            moved = self.sites(moved, cells)
        return Projection(
            positions=moved.reshape(*leading, self.n_particles, 3),
            multipliers=(0.5 * kappa[:, self._places]).reshape(*leading, self.n_constraints),
            residual=torch.stack(residuals).amax(dim=0).reshape(leading),
        )

    def project_velocities(
        self,
        velocities: PositionsLike,
        positions: PositionsLike,
        *,
        box: BoxLike = None,
        masses: Tensor | None = None,
        solver: HostProjection | None = None,
    ) -> Tensor:
        """Velocities without a component along any constraint.

        Solves ``v' = v* + M^-1 A(x)^T kappa`` with ``A(x) v' = 0`` (RATTLE; Andersen, J. Comput.
        Phys. 52, 24 (1983)), a linear problem.

        Parameters
        ----------
        velocities
            v*, ``(..., N, 3)`` [nm/ps].
        positions
            x, ``(..., N, 3)`` [nm].
        box, masses
            As in `project_positions`.
        solver
            A host's projection; by default the equations are solved here.

        Returns
        -------
        Tensor
            ``(..., N, 3)`` [nm/ps]; those of virtual sites and massless particles as they were.

        Raises
        ------
        ConstraintError
            If constraints depend on each other.
        InvalidInputError
            For a wrong shape or NaN.
        """
        (x, v), cells, leading = self.frames(box, positions=positions, velocities=velocities)
        inverse = self.inverse_masses(masses)
        vectors = self._vectors(x, self._shifts(x, cells))
        along = -dot(vectors, self._relative(v))
        kappas = []
        for batch, rows in self.rows():
            r = rows(vectors)
            coupling = batch.coupling(inverse[batch.first], inverse[batch.second])
            matrix = batch.matrix(coupling * batch.products(r, r))
            batch.check_regular(matrix)
            kappas.append(batch.solve(matrix, rows(along)).flatten(1))
        if kappas:
            projected = v + self._displacements(torch.cat(kappas, dim=1), vectors, inverse)
        else:
            projected = v + 0.0 * x
        if solver is not None:
            given = by_host(solver.project_velocities, v, x)
            check_agreement(given, projected)
            projected = projected + (given - projected).detach()
        return projected.reshape(*leading, self.n_particles, 3)

    # Residuals --------------------------------------------------------------------------------

    def residuals(
        self, positions: PositionsLike, *, box: BoxLike = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Relative errors of all lengths ``|r_ij| / d_ij - 1``, ``(..., C)``."""
        (x,), cells, leading = self.frames(box, positions=positions)
        r = self._vectors(x, self._shifts(x, cells))[:, self._places]
        errors: Tensor = torch.linalg.vector_norm(r, dim=-1) / self._lengths(lengths) - 1.0
        return errors.reshape(*leading, self.n_constraints)

    def velocity_residuals(
        self, velocities: PositionsLike, positions: PositionsLike, *, box: BoxLike = None
    ) -> Tensor:
        """Rates of change of all lengths ``r_ij . v_ij / |r_ij|``, ``(..., C)`` [nm/ps]."""
        (x, v), cells, leading = self.frames(box, positions=positions, velocities=velocities)
        r = self._vectors(x, self._shifts(x, cells))[:, self._places]
        rates: Tensor = (r * self._relative(v)[:, self._places]).sum(dim=-1)
        rates = rates / torch.linalg.vector_norm(r, dim=-1)
        return rates.reshape(*leading, self.n_constraints)

    # Parts ------------------------------------------------------------------------------------

    def inverse_masses(self, masses: Tensor | None = None) -> Tensor:
        """``(N,)`` [1/Da], zero for massless particles; ``masses`` replace the set's own."""
        found = self.masses if masses is None else as_tensor("masses", masses, self.masses)
        if found.shape != self.masses.shape:
            raise InvalidInputError(
                f"masses: got shape {tuple(found.shape)}, wanted ({self.n_particles},)"
            )
        # Whether a particle is massless is part of the structure.
        massless = self.masses.detach() == 0
        if masses is not None:
            check_positive("masses", torch.where(massless, 1.0, found), "Da")
        return torch.where(massless, 0.0, 1.0 / torch.where(massless, 1.0, found))

    def unit_vectors(self, frames: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Directions ``(F, R, 3)`` and distances ``(F, R)`` of the rows of all batches."""
        r = self._vectors(frames, self._shifts(frames, cells))
        distances = torch.linalg.vector_norm(r, dim=-1)
        # Rows that are filled up have no direction.
        present = torch.ne(self._first, self._second).to(r.dtype)
        distances = distances * present + (1.0 - present)
        return r / distances.unsqueeze(-1), distances

    def _vectors(self, x: Tensor, shifts: Tensor | None) -> Tensor:
        """``x_j - x_i`` of the rows of all batches, ``(F, R, 3)``."""
        n_frames, n, _ = x.shape
        flat = x.reshape(n_frames * n, 3)
        r = flat[self._at(self._second, n_frames)] - flat[self._at(self._first, n_frames)]
        r = r.reshape(n_frames, len(self._first), 3)
        return r if shifts is None else r + shifts

    def _relative(self, velocities: Tensor) -> Tensor:
        """``v_j - v_i`` of the rows, with particles at rest that cannot move."""
        mobile = (self.masses.detach() != 0).unsqueeze(-1)
        return self._vectors(torch.where(mobile, velocities, 0.0), None)

    def _displacements(self, kappa: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
        """``M^-1 sum_a kappa_a r_a`` of all particles, ``(F, N, 3)``."""
        n_frames = vectors.shape[0]
        y = kappa.unsqueeze(-1) * vectors
        ends = torch.cat([self._first, self._second])
        weighted = torch.cat([-y, y], dim=1) * inverse[ends].unsqueeze(-1)
        total = y.new_zeros(n_frames * self.n_particles, 3)
        total = total.index_add(0, self._at(ends, n_frames), weighted.flatten(0, 1))
        return total.reshape(n_frames, self.n_particles, 3)

    def _at(self, particles: Tensor, n_frames: int) -> Tensor:
        """Rows of particles in flattened frames, which index operations are fastest on."""
        if n_frames == 1:
            return particles
        starts = torch.arange(n_frames, device=particles.device) * self.n_particles
        return (starts.unsqueeze(-1) + particles).reshape(-1)

    def _shifts(self, frames: Tensor, cells: Tensor | None) -> Tensor | None:
        """Box vectors ``(F, R, 3)`` that lead from x_j - x_i to the nearest image."""
        if not any(self.pbc):
            return None
        assert cells is not None
        vectors = self._vectors(frames, None)
        return image_shifts(vectors, cells, self.pbc)

    # Inputs -----------------------------------------------------------------------------------

    def frames(
        self, box: Any = None, **named: Any
    ) -> tuple[list[Tensor], Tensor | None, torch.Size]:
        """Bring positions and velocities to ``(F, N, 3)``; return boxes and leading shape too."""
        return joint_frames(
            named, box, like=self.masses, n_particles=self.n_particles, periodic=self.periodic
        )

    def _lengths(self, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return self.lengths
        found = as_tensor("lengths", lengths, self.masses)
        if found.shape != self.lengths.shape:
            raise InvalidInputError(
                f"lengths: got shape {tuple(found.shape)}, wanted ({self.n_constraints},)"
            )
        check_positive("lengths", found, "nm")
        return found


def _taken(start: int, stop: int, shape: torch.Size, rows: Tensor) -> Tensor:
    own = rows[:, start:stop]
    return own.reshape(own.shape[0], *shape, *own.shape[2:])
