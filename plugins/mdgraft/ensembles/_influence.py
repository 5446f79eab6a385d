"""From per-frame numbers to estimates, by influence series."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.ensembles.overlap import Overlap
from mdgraft.ensembles.statistics import _standard_error
from mdgraft.estimate import Estimate

#: Entries of an influence series that are formed at a time, which bounds the memory.
_CHUNK = 1 << 24


def estimate(
    *,
    weights: Tensor,
    values: Tensor,
    energy_gradients: Tensor,
    value_gradients: Tensor | None,
    shapes: Mapping[str, torch.Size],
    beta: float,
    function: Callable[[Tensor], Tensor] | None,
    overlap: Overlap,
) -> Estimate:
    """Build the estimate of ``function(<O>)``.

    Influence series, with normalised weights w: ``N w (O - <O>)`` for the value, and
    ``N w {dO - <dO> - beta [(O - <O>)(G - <G>) - Cov(O, G)]}`` for its gradient.

    Parameters
    ----------
    weights
        ``(F,)`` normalised.
    values
        O, ``(F, *S)``.
    energy_gradients
        G, ``(F, P)`` [kJ/mol per unit of the parameter].
    value_gradients
        dO, ``(F, *S, P)``, or None when O does not depend on the parameters.
    shapes
        Shapes of the parameters by name, P scalars in all.
    beta
        [mol/kJ].
    function
        Maps the average ``S`` to the estimated quantity ``T``, or None.
    overlap
        Quality of the weights.
    """
    n, shape = values.shape[0], values.shape[1:]
    o = values.reshape(n, -1)
    mean = weights @ o
    deviation = o - mean
    result, jacobian, hessian = _derivatives(function, mean.reshape(shape))
    influence = (n * weights)[:, None] * deviation
    if jacobian is not None:
        influence = influence @ jacobian.T
    error, inefficiency = _standard_error(influence)

    gradients, errors, inefficiencies = [], [], []
    explicit = None if value_gradients is None else value_gradients.reshape(n, o.shape[1], -1)
    for columns in _chunks(energy_gradients.shape[1], n * max(1, o.shape[1], result.numel())):
        g = energy_gradients[:, columns]
        # d<O> - beta Cov(O, G), frame by frame.
        series = -beta * deviation[:, :, None] * (g - weights @ g)[:, None, :]
        if explicit is not None:
            series = series + explicit[:, :, columns]
        gradient = torch.einsum("f,fsp->sp", weights, series)
        psi = (n * weights)[:, None, None] * (series - gradient)
        if jacobian is not None and hessian is not None:
            psi = torch.einsum("ts,fsp->ftp", jacobian, psi) + torch.einsum(
                "tsu,fs,up->ftp", hessian, (n * weights)[:, None] * deviation, gradient
            )
            gradient = jacobian @ gradient
        se, ineff = _standard_error(psi.reshape(n, -1))
        gradients.append(gradient)
        errors.append(se.reshape(gradient.shape))
        inefficiencies.append(ineff.reshape(gradient.shape))

    def named(parts: list[Tensor]) -> dict[str, Tensor]:
        if not parts:
            return {}
        split = torch.split(torch.cat(parts, dim=1), [s.numel() for s in shapes.values()], dim=1)
        return {
            name: part.reshape((*result.shape, *shapes[name]))
            for name, part in zip(shapes, split, strict=True)
        }

    return Estimate(
        value=result,
        standard_error=error.reshape(result.shape),
        gradient=named(gradients),
        gradient_standard_error=named(errors),
        statistical_inefficiency=inefficiency.reshape(result.shape),
        gradient_inefficiency=named(inefficiencies),
        n_frames=n,
        effective_sample_size=overlap.effective_sample_size,
        entropy_sample_size=overlap.entropy_sample_size,
        max_weight=overlap.max_weight,
        pareto_k=overlap.pareto_k,
        method=_method(overlap),
        bias="consistent",
    )


def response(
    *, weights: Tensor, values: Tensor, conjugate: Tensor, beta: float, overlap: Overlap
) -> Estimate:
    """Build the estimate of ``-beta Cov(O, X)`` for O ``(F, *S)`` and X ``(F,)``."""
    inner = estimate(
        weights=weights,
        values=values,
        energy_gradients=conjugate[:, None],
        value_gradients=None,
        shapes={"x": torch.Size()},
        beta=beta,
        function=None,
        overlap=overlap,
    )
    return Estimate(
        value=inner.gradient["x"],
        standard_error=inner.gradient_standard_error["x"],
        statistical_inefficiency=inner.gradient_inefficiency["x"],
        n_frames=inner.n_frames,
        effective_sample_size=inner.effective_sample_size,
        entropy_sample_size=inner.entropy_sample_size,
        max_weight=inner.max_weight,
        pareto_k=inner.pareto_k,
        method=inner.method,
        bias=inner.bias,
    )


def _method(overlap: Overlap) -> str:
    uniform = math.isclose(overlap.max_weight * overlap.n_frames, 1.0, rel_tol=1e-12)
    return "covariance" if uniform else "reweighting"


def _chunks(n_columns: int, rows: int) -> Iterator[slice]:
    width = max(1, _CHUNK // rows)
    for start in range(0, n_columns, width):
        yield slice(start, start + width)


def _derivatives(
    function: Callable[[Tensor], Tensor] | None, mean: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value of shape T, Jacobian ``(T, S)`` and Hessian ``(T, S, S)`` of a function of averages."""
    if function is None:
        return mean, None, None
    result = function(mean)
    if not torch.is_tensor(result):
        raise InvalidInputError(
            f"function: returned {type(result).__name__}, wanted a tensor made from the average"
        )
    first = torch.func.jacrev(function)
    jacobian = first(mean).detach()
    hessian = torch.func.jacrev(first)(mean).detach()
    t, s = result.numel(), mean.numel()
    return result.detach(), jacobian.reshape(t, s), hessian.reshape(t, s, s)
