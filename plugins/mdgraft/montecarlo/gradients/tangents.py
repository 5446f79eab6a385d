"""Derivatives of the configurations of chains along their paths, at fixed random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft._errors import UnsupportedDerivativeError
from mdgraft.montecarlo.gradients.jacobians import by_seed
from mdgraft.montecarlo.gradients.observing import Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates, trainable
from mdgraft.montecarlo.gradients.proposals import density_slopes, looks_at_target
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import HasForces, Target
from mdgraft.montecarlo.transition import transition

#: Steps of central differences: of a position [nm], and of a parameter relative to its size.
_STEP, _RELATIVE_STEP = 1e-5, 1e-4


class Tangents:
    """``v = dx/dtheta`` of each chain for each parameter scalar, ``(P, C, N, 3)``.

    A proposal takes them along, ``v' = (dx'/dx) v + dx'/dtheta``; a rejection keeps them. Exact,
    by automatic differentiation of the move, where the energy's forces can be differentiated
    twice; otherwise, and for energies with forces or moves with trajectories of their own, by
    central differences of the move along ``(v, theta)``, good to about 1e-7.

    Parameters
    ----------
    sampler
        The chains.
    conjugates
        The parameters.

    Raises
    ------
    UnsupportedDerivativeError
        For the temperature, if proposals depend on it, or the scale of a move that changes the
        box.
    """

    def __init__(self, sampler: Metropolis, conjugates: Conjugates) -> None:
        self.conjugates = conjugates
        self.target: Target = sampler.target
        state = sampler.state
        shape = (conjugates.n_scalars, state.n_chains, state.n_particles, 3)
        self.values = state.positions.new_zeros(shape, dtype=torch.float64)
        own_forces = isinstance(self.target.energy, HasForces)
        self._by_differences = {m.name for m in sampler.moves.updates if own_forces}
        self._direct: set[str] = set()
        for move in sampler.moves.updates:
            for part in move.components:
                looks = looks_at_target(part, state[:1])
                scaled = f"{part.name}.scale" in conjugates.scales
                if looks and "temperature" in conjugates.thermodynamic:
                    raise UnsupportedDerivativeError(
                        f"parameters: the proposals of {part.name} depend on temperature, which is "
                        "not differentiated; use Covariance()"
                    )
                if scaled and "volume" in part.changes:
                    raise UnsupportedDerivativeError(
                        f"parameters: the scale of {part.name} moves the box, which is not "
                        "differentiated; use Score()"
                    )
                if looks or scaled:
                    self._direct.add(move.name)
        self._all_direct = self._direct == {move.name for move in sampler.moves.updates}

    @property
    def vanish(self) -> bool:
        """Whether no configuration depends on a parameter."""
        return not bool(self.values.any())

    def advance(self, update: Update, densities: Tensor) -> tuple[Tensor, Tensor]:
        """Go through one update.

        Parameters
        ----------
        update
            One update of C chains.
        densities
            ``(C, P)``: the conjugates of the state before; only used where nothing depends on
            parameters but the target.

        Returns
        -------
        tuple of Tensor
            Total derivatives ``(C, P)`` of ``log_alpha``, zero where it is not finite, and the
            conjugates of the state after.
        """
        if update.move.name not in self._direct and self.vanish:
            return density_slopes(self.conjugates, update, densities)
        result = update.transition
        tangents, slopes = self._propagate(update)
        accepted = result.accepted[:, None, None]
        self.values = torch.where(accepted, tangents, self.values)
        slopes = slopes + self._thermodynamic(update)
        slopes = torch.where(torch.isfinite(result.log_alpha)[:, None], slopes, 0.0)
        if not self._all_direct:
            densities = self.conjugates(result.after)
        return slopes, densities

    def contributions(self, observer: Observer, state: ChainState) -> Tensor | None:
        """``grad O . v``, ``(C, *S, P)``; None where it is zero."""
        return None if self.vanish else observer.directional(state, self.values)

    # Details ----------------------------------------------------------------------------------

    def _propagate(self, update: Update) -> tuple[Tensor, Tensor]:
        """Tangents of the proposals ``(P, C, N, 3)`` and slopes ``(C, P)``, by energy and scale."""
        if update.move.name not in self._by_differences:
            try:
                return self._automatic(update)
            except (NotImplementedError, RuntimeError):
                # Some operation has no derivative of the order that this takes, or no graph.
                self._by_differences.add(update.move.name)
        return self._differences(update)

    def _automatic(self, update: Update) -> tuple[Tensor, Tensor]:
        leaves = self.conjugates.parameters
        with trainable(leaves), torch.enable_grad():
            before = update.transition.before
            x = before.positions.detach().clone().requires_grad_(True)
            move, scales = self._free(update.move)
            result = transition(
                before.replace(positions=x), move, self.target, update.noise, update.u
            )
            outputs = [result.proposed.positions, result.log_alpha]
            seeds = [torch.ones_like(output, requires_grad=True) for output in outputs]
            live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
            variables = [x, *leaves, *scales.values()]
            found = torch.autograd.grad(
                [o for o, _ in live],
                variables,
                [s for _, s in live],
                create_graph=True,
                allow_unused=True,
            )
            # What a host computes has no graph, which is not the same as no derivative. Parts of a
            # mixture that no chain has chosen have neither.
            cut = not result.proposed.positions.requires_grad or found[0] is None
            parts = move.components
            chosen = {f"{parts[k].name}.scale" for k in set(result.component.tolist())}
            by_scale = zip(scales, found[1 + len(leaves) :], strict=True)
            if cut or any(g is None and name in chosen for name, g in by_scale):
                raise UnsupportedDerivativeError(
                    f"sampler: the proposals of {update.move.name} have no graph"
                )
            by_x, *by_theta = (
                torch.zeros_like(variable) if gradient is None else gradient
                for gradient, variable in zip(found, variables, strict=True)
            )
            by_energy = [entry for g in by_theta[: len(leaves)] for entry in g.reshape(-1)]
            by_scalar = dict(enumerate(by_energy))
            first = self.conjugates.n_scalars - len(self.conjugates.scales)
            for name, gradient in zip(scales, by_theta[len(leaves) :], strict=True):
                by_scalar[first + self.conjugates.scales.index(name)] = gradient
            tangents, slopes = [], []
            for p in range(self.conjugates.n_scalars):
                total = (by_x * self.values[p].to(by_x)).sum()
                if p in by_scalar:
                    total = total + by_scalar[p].to(total)
                moved, slope = by_seed(total, seeds)
                tangents.append(moved.double())
                slopes.append(slope.double())
        return torch.stack(tangents), torch.stack(slopes, dim=-1)

    def _free(self, move: AbstractMove) -> tuple[AbstractMove, dict[str, Tensor]]:
        """A copy of the move whose scales, if asked for, require gradients."""
        free = move.copied()
        scales: dict[str, Tensor] = {}
        for part in free.components:
            name = f"{part.name}.scale"
            if name in self.conjugates.scales:
                scales[name] = part.scale.detach().clone().requires_grad_(True)
                part.rescale(scales[name])  # type: ignore[arg-type]
        return free, scales

    @torch.no_grad()
    def _differences(self, update: Update) -> tuple[Tensor, Tensor]:
        """Central differences of the whole move along each tangent."""
        tangents, slopes = [], []
        entries = [
            (leaf, index) for leaf in self.conjugates.parameters for index in range(leaf.numel())
        ]
        first = self.conjugates.n_scalars - len(self.conjugates.scales)
        for p in range(self.conjugates.n_scalars):
            v = self.values[p]
            step = _STEP / max(float(v.abs().max()), 1e-300)
            name = self.conjugates.scales[p - first] if p >= first else None
            if p < len(entries):
                leaf, index = entries[p]
                size = abs(float(leaf.reshape(-1)[index]))
                step = min(step, _RELATIVE_STEP * (size if size > 0 else 1.0))
            elif name is not None:
                size = next(
                    (float(m.scale) for m in update.move.components if f"{m.name}.scale" == name),
                    float("inf"),
                )
                step = min(step, _RELATIVE_STEP * size)
            ends = []
            for sign in (1.0, -1.0):
                ends.append(self._shifted(update, sign * step, v, entries, p, name))
            moved = (ends[0][0] - ends[1][0]) / (2.0 * step)
            tangents.append(moved)
            slopes.append((ends[0][1] - ends[1][1]) / (2.0 * step))
        return torch.stack(tangents), torch.stack(slopes, dim=-1)

    def _shifted(
        self,
        update: Update,
        by: float,
        v: Tensor,
        entries: list[tuple[Tensor, int]],
        p: int,
        name: str | None,
    ) -> tuple[Tensor, Tensor]:
        """Proposed positions and ``log_alpha`` at ``x + by v`` and ``theta_p + by``."""
        before = update.transition.before
        shifted = before.replace(positions=before.positions + (by * v).to(before.positions))
        move = update.move.copied()
        for part in move.components:
            if f"{part.name}.scale" == name:
                part.rescale(float(part.scale) + by)
        leaf, index = entries[p] if p < len(entries) else (None, 0)
        kept = None if leaf is None else leaf.detach().clone()
        try:
            if leaf is not None:
                leaf.view(-1)[index] += by
            result = transition(shifted, move, self.target, update.noise, update.u)
        finally:
            if leaf is not None and kept is not None:
                leaf.copy_(kept)
        return result.proposed.positions.double(), result.log_alpha

    def _thermodynamic(self, update: Update) -> Tensor:
        """Slopes ``(C, P)`` by pressure, activity and temperature at fixed configurations."""
        result = update.transition
        made = result.log_alpha.new_zeros(len(result.log_alpha), self.conjugates.n_scalars)
        if not self.conjugates.thermodynamic:
            return made
        columns = [
            self.conjugates.thermodynamic_columns(state)
            for state in (result.proposed, result.before)
        ]
        start = self.conjugates.n_energy_scalars
        made[:, start : start + columns[0].shape[1]] = columns[0] - columns[1]
        return made
