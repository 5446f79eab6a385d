"""Rao-Blackwellised acceptance: the decision is averaged over instead of drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MDGraftError, UnsupportedDerivativeError
from mdgraft.ensembles.recompute import leaves_of
from mdgraft.estimate import Estimate
from mdgraft.montecarlo.gradients._assembly import assemble, chain_error
from mdgraft.montecarlo.gradients.base import steps
from mdgraft.montecarlo.gradients.jacobians import chain_jacobian
from mdgraft.montecarlo.gradients.objectives import AbstractObjective, SquaredJump
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.target import HasForces, Target
from mdgraft.montecarlo.transition import transition

#: Relative step of central differences.
_STEP = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaoBlackwell:
    """``<alpha(x, x') h(x, x')>`` over stationary x and proposals x', and its derivatives.

    Averaging over the decision makes the integrand continuous in the parameters of a proposal,
    ``x' = T(x, noise)``, so that it can be differentiated at fixed noise: nothing needs to be
    coupled and no decision is drawn. The stationary law does not depend on the proposal; for
    derivatives in parameters of the target use another estimator.

    Derivatives are automatic where the energy can be differentiated as often as the move needs,
    and central differences at fixed noise elsewhere, with two evaluations of the move for each
    parameter, so that energies of a host serve as well.

    Parameters
    ----------
    objective
        h.
    """

    objective: AbstractObjective = dataclasses.field(default_factory=SquaredJump)

    def estimate(
        self,
        sampler: Metropolis,
        n_samples: int,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> Estimate:
        """Average over the steps to come.

        Parameters
        ----------
        sampler
            Equilibrated chains, whose own proposals are used.
        n_samples
            Number of steps T that are looked at, for each chain.
        stride
            Steps from one to the next.
        parameters
            ``<move>.scale`` and ``<move>.mass`` (of moves that have one number or one for each
            particle); by default all scales.

        Returns
        -------
        Estimate
            Of the sum over the moves of a step, with the gradient by parameter name.

        Raises
        ------
        InvalidInputError
            For an unknown parameter.
        UnsupportedDerivativeError
            For a move that takes every proposal.
        """
        if not sampler.adjusted:
            raise UnsupportedDerivativeError(
                "sampler: takes proposals without a test, so that there is no acceptance to "
                "average over; use MALA instead of ULA"
            )
        values = proposal_parameters(sampler, parameters)
        shapes = {name: value.shape for name, value in values.items()}
        worth, slopes = [], []
        for updates, sample in steps(sampler, n_samples, stride):
            if not sample:
                continue
            parts = [self._one(update, values, sampler.target) for update in updates]
            worth.append(sum((part[0] for part in parts), torch.zeros(())))
            slopes.append(sum((part[1] for part in parts), torch.zeros(())))
        series, gradients = torch.stack(worth), torch.stack(slopes)
        mean, gradient = series.mean(), gradients.mean(dim=(0, 1))
        error, inefficiency = chain_error(gradients)

        def named(columns: Tensor) -> dict[str, Tensor]:
            parts = torch.split(columns, [shape.numel() for shape in shapes.values()])
            return {n: part.reshape(s) for part, (n, s) in zip(parts, shapes.items(), strict=True)}

        return assemble(
            value=mean,
            value_influence=series - mean,
            gradient=named(gradient),
            gradient_error=named(error),
            gradient_inefficiency=named(inefficiency),
            method=f"Rao-Blackwellised {self.objective.name}",
            bias="consistent",
        )

    def _one(
        self, update: Update, values: Mapping[str, Tensor], target: Target
    ) -> tuple[Tensor, Tensor]:
        """Expected objective ``(C,)`` of one update and its derivatives ``(C, P)``."""
        if not isinstance(target.energy, HasForces):
            try:
                return self._automatic(update, values, target)
            except UnsupportedDerivativeError:
                pass
            except MDGraftError:
                raise
            except (NotImplementedError, RuntimeError):
                # Some operation has no derivative of the order that this takes.
                pass
        return self._differences(update, values, target)

    def _expected(self, update: Update, move: AbstractMove, target: Target) -> Tensor:
        result = transition(update.transition.before, move, target, update.noise, update.u)
        # The derivative of min(1, .) is zero above one, and so is that of what is impossible.
        counts = (result.log_alpha < 0) & (result.log_alpha > -torch.inf)
        alpha = torch.where(counts, result.log_alpha, 0.0).exp()
        possible = result.log_alpha > -torch.inf
        worth = self.objective(update.transition.before, result.proposed)
        return torch.where(possible, alpha * worth, 0.0)

    def _automatic(
        self, update: Update, values: Mapping[str, Tensor], target: Target
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = {n: v.detach().clone().requires_grad_(True) for n, v in values.items()}
            worth = self._expected(update, with_values(update.move, leaves), target)
            own = {f"{part.name}." for part in update.move.components}
            for name, leaf in leaves.items():
                # What a host computes has no graph, which is not the same as no derivative.
                if name.rpartition(".")[0] + "." in own and not _reaches(worth, leaf):
                    raise UnsupportedDerivativeError(f"sampler: the move of {name} has no graph")
            (slopes,) = chain_jacobian((worth,), list(leaves.values()))
        # An energy that is infinite has no derivative, and a proposal there no probability.
        possible = update.transition.log_alpha > -torch.inf
        return worth.detach(), torch.where(possible[:, None], slopes, 0.0)

    @torch.no_grad()
    def _differences(
        self, update: Update, values: Mapping[str, Tensor], target: Target
    ) -> tuple[Tensor, Tensor]:
        columns = []
        for name, value in values.items():
            for entry in range(value.numel()):
                step = _STEP * float(value.reshape(-1)[entry])
                ends = []
                for sign in (1.0, -1.0):
                    shifted = value.detach().clone()
                    shifted.view(-1)[entry] += sign * step
                    move = with_values(update.move, {**values, name: shifted})
                    ends.append(self._expected(update, move, target))
                columns.append((ends[0] - ends[1]) / (2.0 * step))
        worth = self._expected(update, update.move, target)
        return worth, torch.stack(columns, dim=-1) if columns else worth[:, None][:, :0]


def _reaches(worth: Tensor, leaf: Tensor) -> bool:
    """Whether a graph leads back to a leaf."""
    return any(found is leaf for found in leaves_of([worth]))


def proposal_parameters(
    sampler: Metropolis, parameters: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Present values of the parameters of proposals by name, see `RaoBlackwell.estimate`."""
    known: dict[str, Tensor] = {}
    scales = []
    for update in sampler.moves.updates:
        for move in update.components:
            if move.has_scale:
                known[f"{move.name}.scale"] = move.scale
                scales.append(f"{move.name}.scale")
            mass = getattr(move, "mass", None)
            if torch.is_tensor(mass) and mass.ndim < 2:
                known[f"{move.name}.mass"] = mass
    chosen = scales if parameters is None else parameters
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise InvalidInputError(
            f"parameters: got {chosen}, wanted some of {sorted(known)}, which these moves have"
        )
    return {name: known[name].detach().clone() for name in chosen}


def with_values(move: AbstractMove, values: Mapping[str, Tensor]) -> AbstractMove:
    """A copy of a move with other scales and masses, which may require gradients."""
    made = move.copied()
    for part in made.components:
        scale, mass = values.get(f"{part.name}.scale"), values.get(f"{part.name}.mass")
        if scale is not None:
            part.rescale(scale)  # type: ignore[arg-type]
        if mass is not None:
            part.mass = mass  # type: ignore[attr-defined]
    return made
