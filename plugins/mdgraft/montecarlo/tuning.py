"""Proposals that are tuned by the gradient of how far a chain moves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.gradients.acceptance import RaoBlackwell, proposal_parameters
from mdgraft.montecarlo.gradients.objectives import AbstractObjective, SquaredJump
from mdgraft.montecarlo.metropolis import Metropolis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """The course of a tuning of R rounds.

    Attributes
    ----------
    values
        Parameters in each round by name, each ``(R, *shape)``; then `final`.
    objective, objective_error
        The objective in each round, and its standard error, ``(R,)``.
    final
        The parameters that the sampler was left with: geometric means over the second half.
    clipped
        Fraction of the steps that were shortened.
    """

    values: Mapping[str, Tensor]
    objective: Tensor
    objective_error: Tensor
    final: Mapping[str, Tensor]
    clipped: float

    def summary(self) -> str:
        """Several lines for people."""
        lines = []
        for name, value in self.final.items():
            start = self.values[name][0].reshape(-1).tolist()
            shown = ", ".join(
                f"{a:.4g} -> {b:.4g}"
                for a, b in list(zip(start, value.reshape(-1).tolist(), strict=True))[:6]
            )
            lines.append(f"{name}  {shown}")
        lines.append(
            f"objective {self.objective[0]:.4g} +- {self.objective_error[0]:.2g} at first, "
            f"{self.objective[-1]:.4g} +- {self.objective_error[-1]:.2g} at last; "
            f"{100 * self.clipped:.0f} % of the steps shortened"
        )
        return "\n".join(lines)

    __str__ = summary


def tune(
    sampler: Metropolis,
    *,
    n_rounds: int = 40,
    n_samples: int = 50,
    objective: AbstractObjective | None = None,
    parameters: Sequence[str] | None = None,
    rate: float = 1.0,
) -> Tuning:
    """Make proposals better by stochastic gradient ascent, before sampling starts.

    Each round estimates the objective and its gradient by `RaoBlackwell` and changes the logarithm
    of each parameter by ``rate / k^0.6`` times the derivative of the logarithm of the objective by
    that of the parameter, at most by a factor of two. The chains move on meanwhile with the
    parameters of the round; what they visit must not be used for averages. Parameters are
    fixed afterwards at their geometric mean over the second half of the rounds (Polyak and
    Juditsky, SIAM J. Control Optim. 30, 838 (1992)).

    Parameters
    ----------
    sampler
        The chains, near equilibrium; its moves are changed.
    n_rounds
        R.
    n_samples
        Steps in each round.
    objective
        What is maximised; by default the squared jump of all coordinates.
    parameters
        ``<move>.scale`` and ``<move>.mass``; by default all scales.
    rate
        Size of the first steps.

    Raises
    ------
    InvalidInputError
        For an unknown parameter, a count below two rounds or one sample, or an objective that
        vanishes.
    UnsupportedDerivativeError
        For a move that takes every proposal.
    """
    if n_rounds < 2 or not (math.isfinite(rate) and rate > 0):
        raise InvalidInputError(
            f"n_rounds, rate: got {n_rounds} and {rate}, wanted at least 2 and a positive number"
        )
    estimator = RaoBlackwell(objective=SquaredJump() if objective is None else objective)
    names = list(proposal_parameters(sampler, parameters))
    history: dict[str, list[Tensor]] = {name: [] for name in names}
    worth, errors = [], []
    n_clipped = n_steps = 0
    for k in range(1, n_rounds + 1):
        values = proposal_parameters(sampler, names)
        estimate = estimator.estimate(sampler, n_samples, parameters=names)
        level = float(estimate.value)
        if not level > 0.0:
            raise InvalidInputError(
                f"objective: is {level:g} in round {k}, so that nothing is ever accepted or moved; "
                "start from smaller scales, or run burn_in() first"
            )
        worth.append(estimate.value)
        errors.append(estimate.standard_error)
        changed = {}
        for name, value in values.items():
            history[name].append(value)
            step = rate / k**0.6 * value * estimate.gradient[name] / level
            bounded = step.clamp(min=-math.log(2.0), max=math.log(2.0))
            n_clipped += int((bounded != step).sum())
            n_steps += step.numel()
            changed[name] = value * bounded.exp()
        _assign(sampler, changed)
    final = {
        name: torch.stack(values)[n_rounds // 2 :].log().mean(dim=0).exp()
        for name, values in history.items()
    }
    _assign(sampler, final)
    sampler.reset_statistics()
    return Tuning(
        values={name: torch.stack(values) for name, values in history.items()},
        objective=torch.stack(worth),
        objective_error=torch.stack(errors),
        final=final,
        clipped=n_clipped / max(1, n_steps),
    )


def _assign(sampler: Metropolis, values: Mapping[str, Tensor]) -> None:
    """Give the sampler's moves these parameters, scales up to the largest that mean something."""
    for update in sampler.moves.updates:
        for move in update.components:
            scale, mass = values.get(f"{move.name}.scale"), values.get(f"{move.name}.mass")
            if scale is not None:
                move.rescale(min(float(scale), move.largest_scale(sampler.state)))
            if mass is not None:
                move.mass = mass  # type: ignore[attr-defined]
