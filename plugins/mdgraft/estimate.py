"""A number that knows how it was obtained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError

#: How far an estimate can be trusted as the number of samples grows. ``"exact"``: no statistical
#: or systematic error; ``"consistent"``: its bias vanishes as 1/N, faster than its standard error;
#: ``"approximate"``: a controlled approximation remains; ``"biased"``: the bias is unknown.
BiasClass: TypeAlias = Literal["exact", "consistent", "approximate", "biased"]

_BIAS_CLASSES = ("exact", "consistent", "approximate", "biased")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimated average, its gradient, and what is known about their errors.

    Standard errors account for the correlation of successive frames and are calibrated so that
    ``value +- 1.96 * standard_error`` covers the truth in about 95 % of repeated simulations; for
    few effective samples they are therefore wider than the standard deviation of the estimator.
    Tensors carry no graph.

    Attributes
    ----------
    value
        The estimate, of any shape S.
    standard_error
        Its standard error, shape S.
    gradient
        The derivative with respect to each parameter by name, each of shape
        ``(*S, *parameter.shape)``; empty when none was asked for.
    gradient_standard_error
        The standard errors of `gradient`, same names and shapes.
    n_frames
        Number of frames N.
    effective_sample_size
        Kish's ``1 / sum w^2``, between 1 and N; N when all weights are equal. It counts the loss
        through the weights only: divide by `statistical_inefficiency` for that by correlation.
    entropy_sample_size
        ``exp(-sum w ln w)``, between 1 and N, never below Kish's.
    max_weight
        The largest normalised weight; ``1 / N`` when all are equal.
    pareto_k
        Shape of the generalised Pareto distribution fitted to the upper tail of the weights
        (Vehtari et al., 2024); above 0.7 averages over them cannot be trusted. None when the
        weights are uniform or the tail is too short for a fit.
    statistical_inefficiency
        Number of frames that weigh as much as one independent one, shape S: that of the
        influence series of the value.
    gradient_inefficiency
        The same for each entry of `gradient`.
    method
        How the numbers were obtained, such as ``"covariance"`` or ``"reweighting"``.
    bias
        ``"exact"``, ``"consistent"``, ``"approximate"`` or ``"biased"``.

    Raises
    ------
    InvalidInputError
        If shapes or names disagree, or the bias class is unknown.
    """

    value: Tensor
    standard_error: Tensor
    gradient: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    gradient_standard_error: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    n_frames: int
    effective_sample_size: float
    entropy_sample_size: float
    max_weight: float
    pareto_k: float | None = None
    statistical_inefficiency: Tensor
    gradient_inefficiency: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    method: str
    bias: BiasClass

    def __post_init__(self) -> None:
        if self.bias not in _BIAS_CLASSES:
            raise InvalidInputError(f"bias: got {self.bias!r}, wanted one of {_BIAS_CLASSES}")
        if self.standard_error.shape != self.value.shape:
            raise InvalidInputError(
                f"standard_error: got shape {tuple(self.standard_error.shape)}, "
                f"wanted that of the value, {tuple(self.value.shape)}"
            )
        if self.gradient.keys() != self.gradient_standard_error.keys():
            raise InvalidInputError(
                f"gradient_standard_error: names {sorted(self.gradient_standard_error)} differ "
                f"from those of the gradient, {sorted(self.gradient)}"
            )
        for name, gradient in self.gradient.items():
            error = self.gradient_standard_error[name]
            if error.shape != gradient.shape:
                raise InvalidInputError(
                    f"gradient_standard_error[{name!r}]: got shape {tuple(error.shape)}, "
                    f"wanted that of the gradient, {tuple(gradient.shape)}"
                )
            if gradient.shape[: self.value.ndim] != self.value.shape:
                raise InvalidInputError(
                    f"gradient[{name!r}]: got shape {tuple(gradient.shape)}, wanted one that "
                    f"starts with that of the value, {tuple(self.value.shape)}"
                )

    def confidence_interval(self, z: float = 1.96) -> tuple[Tensor, Tensor]:
        """Lower and upper end of ``value -+ z * standard_error``, each of the value's shape."""
        return self.value - z * self.standard_error, self.value + z * self.standard_error

    def summary(self) -> str:
        """Several lines for people: values, gradients with errors, sample sizes, method."""
        lines = ["value     " + _listed(self.value, self.standard_error)]
        lines += [
            f"d/d {name}  " + _listed(self.gradient[name], self.gradient_standard_error[name])
            for name in self.gradient
        ]
        g = self.statistical_inefficiency
        worst = f"{g.max().item():.3g}" if g.numel() else "-"
        tail = "-" if self.pareto_k is None else f"{self.pareto_k:.2f}"
        lines.append(
            f"{self.n_frames} frames; effective sample size {self.effective_sample_size:.4g} "
            f"(Kish), {self.entropy_sample_size:.4g} (entropy); largest weight "
            f"{self.max_weight:.3g}; Pareto k {tail}; statistical inefficiency {worst}"
        )
        lines.append(f"method: {self.method}; bias: {self.bias}")
        return "\n".join(lines)

    __str__ = summary


def _listed(values: Tensor, errors: Tensor, limit: int = 6) -> str:
    """``1.234 +- 0.005, ...`` for the first few entries."""
    flat, error = values.detach().reshape(-1), errors.detach().reshape(-1)
    shown = [_with_error(v, e) for v, e in zip(flat[:limit].tolist(), error.tolist(), strict=False)]
    rest = f", ... ({flat.numel()} entries)" if flat.numel() > limit else ""
    return ", ".join(shown) + rest


def _with_error(value: float, error: float) -> str:
    """Show two digits of the error, and the value to the same place."""
    if not 0.0 < error < float("inf"):
        return f"{value:.6g} +- {error:.2g}"
    digits = int(torch.tensor(error, dtype=torch.float64).log10().floor())
    if -5 < digits < 6:
        places = max(0, 1 - digits)
        return f"{value:.{places}f} +- {error:.{places}f}"
    shown = f"{value:.6g}"
    return f"{shown} +- {error:.2g}"
