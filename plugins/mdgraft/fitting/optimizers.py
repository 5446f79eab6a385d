"""What proposes the next parameters: Gauss-Newton, scipy's and torch's optimisers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch

from mdgraft._errors import ConfigurationError
from mdgraft.fitting.config import OptimizerConfig
from mdgraft.fitting.journal import Evaluation
from mdgraft.fitting.objective import Objective

# What scipy's stubs say depends on whether they are installed.
_scipy: Any = scipy.optimize

#: Runs from scaled parameters ``(P,)`` until the objective ends it or it finds nothing better.
Optimizer = Callable[[Objective, np.ndarray], None]

# Relative error of a linear prediction, for weighing distant samples against near ones.
_NONLINEARITY = 0.1
_MINIMIZE = (
    *("Nelder-Mead", "Powell", "CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "COBYLA", "COBYQA"),
    *("SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-exact", "trust-krylov"),
)
_WITH_BOUNDS = (
    *("Nelder-Mead", "L-BFGS-B", "TNC", "SLSQP", "Powell", "trust-constr", "COBYLA"),
    "COBYQA",
)
_WITHOUT_GRADIENT = ("Nelder-Mead", "Powell", "COBYLA", "COBYQA")
_WITH_HESSIAN = ("Newton-CG", "dogleg", "trust-ncg", "trust-exact", "trust-krylov", "trust-constr")


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """The optimiser of this name, with its options checked.

    Raises
    ------
    ConfigurationError
        For an unknown method or option.
    """
    package, _, method = config.method.partition(".")
    if config.method == "gauss_newton":
        return _gauss_newton_optimizer(config.options)
    if package == "torch" and method:
        return _torch_optimizer(method, config.options)
    if config.method == "scipy.least_squares":
        _check_options(_scipy.least_squares, config, ("fun", "x0", "jac", "bounds"))
        return lambda objective, start: _least_squares(objective, start, config.options)
    names = {name.lower(): name for name in _MINIMIZE}
    if package == "scipy" and method.lower() in names:
        chosen = names[method.lower()]
        return lambda objective, start: _minimize(objective, start, chosen, config.options)
    raise ConfigurationError(
        f"optimizer.method: got {config.method!r}, wanted gauss_newton, scipy.least_squares, "
        f"scipy.<method> with one of {', '.join(_MINIMIZE)}, or torch.<class> such as torch.Adam"
    )


# Gauss-Newton ---------------------------------------------------------------------------------


def _gauss_newton_optimizer(options: dict[str, Any]) -> Optimizer:
    unknown = set(options) - {"max_step"}
    if unknown:
        raise ConfigurationError(
            f"optimizer.options: {sorted(unknown)} are unknown to gauss_newton, wanted max_step"
        )
    max_step = options.get("max_step", 0.1)
    if not isinstance(max_step, int | float) or not 0 < max_step < math.inf:
        raise ConfigurationError(
            f"optimizer.options.max_step: got {max_step!r}, wanted a positive number"
        )
    return lambda objective, start: gauss_newton(objective, start, max_step=float(max_step))


def gauss_newton(objective: Objective, start: np.ndarray, *, max_step: float = 0.1) -> None:
    """Gauss-Newton steps within a trust region, with the noise of the averages in mind.

    Every sampling so far predicts the residuals here by its own linear model; predictions are
    pooled, each weighed by its standard error and by a tenth of the change that it predicts. Near
    the solution steps thus follow from all samples rather than from the noise of the last ones.
    A step is taken back, and the region halved, only when the loss grows by more than its noise.

    Parameters
    ----------
    objective
        What is minimised.
    start
        Scaled parameters ``(P,)``.
    max_step
        Largest change of a scaled parameter in one step.
    """
    here = objective.evaluate(start)
    radius = max_step
    while True:
        x = objective.point(here)
        residuals, jacobian, errors = _pooled(objective, here)
        lower, upper = objective.bounds
        low, high = np.maximum(lower - x, -radius), np.minimum(upper - x, radius)
        # A parameter at its bound has room on one side only; scipy wants some on both.
        high = np.maximum(high, low + 1e-12)
        step = _scipy.lsq_linear(jacobian, -residuals, bounds=(low, high)).x
        trial = objective.evaluate(x + step)
        predicted = residuals + jacobian @ step
        if not trial.resampled and objective.within(predicted, errors):
            # All samples together say that this is it; one set alone cannot overrule them.
            trial = objective.evaluate(x + step, fresh=True)
        noise = _loss_error(objective, here) + _loss_error(objective, trial)
        if objective.loss(trial) > objective.loss(here) + 2.0 * noise:
            radius *= 0.5
            if radius < 1e-6:
                return
        else:
            radius = min(2.0 * radius, max_step)
            here = trial


def _pooled(objective: Objective, here: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals ``(K,)``, their Jacobian ``(K, P)`` and standard errors ``(K,)`` at a point."""
    # Of each set of frames, the evaluation that is nearest to this point speaks.
    x = objective.point(here)
    nearest: dict[int, Evaluation] = {}
    number = -1
    for row in objective.rows:
        number += row.resampled
        old = nearest.get(number)
        if old is None or _distance(objective, row, x) < _distance(objective, old, x):
            nearest[number] = row
    weights, predictions, jacobians = [], [], []
    for row in nearest.values():
        jacobian = objective.jacobian(row)
        shift = jacobian @ (x - objective.point(row))
        variance = objective.residual_errors(row) ** 2 + (_NONLINEARITY * shift) ** 2
        weights.append(1.0 / np.maximum(variance, 1e-24))
        predictions.append(objective.residuals(row) + shift)
        jacobians.append(jacobian)
    w = np.array(weights)
    total = w.sum(axis=0)
    return (
        (w * np.array(predictions)).sum(axis=0) / total,
        (w[:, :, None] * np.array(jacobians)).sum(axis=0) / total[:, None],
        total**-0.5,
    )


def _distance(objective: Objective, row: Evaluation, x: np.ndarray) -> float:
    return float(np.linalg.norm(objective.point(row) - x))


def _loss_error(objective: Objective, evaluation: Evaluation) -> float:
    """Standard error of the loss, to second order in the errors of independent residuals."""
    r, s = objective.residuals(evaluation), objective.residual_errors(evaluation)
    return math.sqrt(float((r**2 * s**2).sum() + 0.5 * (s**4).sum()))


# scipy ----------------------------------------------------------------------------------------


def _least_squares(objective: Objective, start: np.ndarray, options: dict[str, Any]) -> None:
    bounds: dict[str, Any] = {} if options.get("method") == "lm" else {"bounds": objective.bounds}
    _scipy.least_squares(
        lambda x: objective.residuals(objective.evaluate(x)),
        np.clip(start, *objective.bounds),
        jac=lambda x: objective.jacobian(objective.evaluate(x)),
        **bounds,
        **options,
    )


def _minimize(
    objective: Objective, start: np.ndarray, method: str, options: dict[str, Any]
) -> None:
    def gradient(x: np.ndarray) -> np.ndarray:
        evaluation = objective.evaluate(x)
        slope: np.ndarray = objective.jacobian(evaluation).T @ objective.residuals(evaluation)
        return slope

    def hessian(x: np.ndarray) -> np.ndarray:
        # Gauss-Newton's: the residuals' own curvature is left out.
        jacobian = objective.jacobian(objective.evaluate(x))
        curvature: np.ndarray = jacobian.T @ jacobian
        return curvature

    _scipy.minimize(
        lambda x: objective.loss(objective.evaluate(x)),
        start,
        method=method,
        jac=None if method in _WITHOUT_GRADIENT else gradient,
        hess=hessian if method in _WITH_HESSIAN else None,
        bounds=_scipy.Bounds(*objective.bounds) if method in _WITH_BOUNDS else None,
        options=options,
    )


def _check_options(
    function: Callable[..., Any], config: OptimizerConfig, reserved: tuple[str, ...]
) -> None:
    known = set(inspect.signature(function).parameters) - set(reserved)
    unknown = set(config.options) - known
    if unknown:
        raise ConfigurationError(
            f"optimizer.options: {sorted(unknown)} are unknown to {config.method}, which takes "
            f"{', '.join(sorted(known))}"
        )


# torch ----------------------------------------------------------------------------------------


def _torch_optimizer(method: str, options: dict[str, Any]) -> Optimizer:
    cls = getattr(torch.optim, method, None)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigurationError(f"optimizer.method: torch.optim has no optimiser {method!r}")
    arguments: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in options.items()
    }

    def build(x: torch.Tensor) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls([x], **arguments)
        return optimizer

    try:
        build(torch.zeros(2, dtype=torch.float64, requires_grad=True))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"optimizer.options: torch.{method}: {error}") from error

    def run(objective: Objective, start: np.ndarray) -> None:
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        lower, upper = (torch.from_numpy(bound) for bound in objective.bounds)
        optimizer = build(x)

        def closure() -> float:
            evaluation = objective.evaluate(x.detach().numpy())
            residuals = objective.residuals(evaluation)
            x.grad = torch.from_numpy(objective.jacobian(evaluation).T @ residuals)
            return objective.loss(evaluation)

        while True:
            optimizer.step(closure)
            with torch.no_grad():
                x.clamp_(lower, upper)

    return run
