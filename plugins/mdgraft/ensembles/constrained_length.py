"""Derivatives of averages and free energies in constrained lengths.

Positions follow ``delta(c(x) - d) det(Z)^(1/2) exp(-beta U)``. A displacement w_b that changes
distance b at unit rate and no other one turns the derivative of an integral over the constrained
surface into averages over it (the co-area formula):

    d<O>/dd_b = <w_b . grad O> - beta Cov(O, G_b)
    G_b = w_b . grad U - kT (1/2 w_b . grad ln det Z + div w_b)

Only for rigid molecules are the last two terms constant; for others they can decide the sign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError, WrongEnsembleError
from mdgraft._types import Observable
from mdgraft.constraints import ConstraintSet, length_response, metric_response
from mdgraft.ensembles import _influence
from mdgraft.ensembles.ensemble import Ensemble, _observe
from mdgraft.estimate import Estimate
from mdgraft.frames import Frames

#: Largest relative error of a length in frames that count as constrained.
_CONSTRAINED = 1e-3


def length_derivative(
    ensemble: Ensemble,
    constraints: ConstraintSet,
    observable: Observable,
    directions: Mapping[str, Tensor] | None = None,
    *,
    function: Callable[[Tensor], Tensor] | None = None,
) -> Estimate:
    """Average of an observable, and its derivatives in constrained lengths.

    Forces at the frames and one linear solve for each cluster give the derivatives in all lengths
    at once. The potential must be the one that acts in the constrained system, with a `Fixman`
    term if that was sampled too.

    Parameters
    ----------
    ensemble
        Frames that were sampled with the constraints.
    constraints
        The constraints, with C lengths.
    observable
        Maps F frames to ``(F, *S)``; must be differentiable in positions. It sees virtual sites
        that are placed anew.
    directions
        For each name how lengths change with a quantity of any shape, ``(*shape, C)`` derivatives
        ``dd_b/dtheta``. By default each length on its own, named ``lengths``.
    function
        Applied to the average, as in `Ensemble.estimate`.

    Returns
    -------
    Estimate
        Its gradient has shapes ``(*S, *shape)``, at fixed parameters of the potential
        [unit of the observable / nm].

    Raises
    ------
    WrongEnsembleError
        If the frames do not meet the constraints.
    UnsupportedDerivativeError
        If the observable depends on positions without a graph.
    InsufficientOverlapError
        If the parameters have moved too far from those that generated the frames.
    InvalidInputError
        For a wrong shape, or an observable or energy that is not finite.
    """
    shapes, jacobian = _checked(ensemble, constraints, directions)
    energies, values, conjugates, slopes = [], [], [], []
    for batch in ensemble.frames.batches(ensemble.batch_size):
        value, slope = _observed(observable, batch, constraints)
        energy, conjugate = _conjugate(ensemble, constraints, batch)
        energies.append(energy)
        conjugates.append(_along(conjugate, jacobian))
        values.append(value)
        slopes.append(_along(slope, jacobian))
    log_weights = ensemble._log_weights(torch.cat(energies))
    overlap = ensemble.gradient.overlap(log_weights)
    ensemble.gradient.require(overlap)
    found = torch.cat(values)
    return _influence.estimate(
        weights=log_weights.softmax(dim=0),
        values=found,
        energy_gradients=torch.cat(conjugates),
        value_gradients=torch.cat(slopes).reshape(*found.shape, -1),
        shapes=shapes,
        beta=ensemble.beta,
        function=function,
        overlap=overlap,
    )


def length_mean_force(
    ensemble: Ensemble,
    constraints: ConstraintSet,
    directions: Mapping[str, Tensor] | None = None,
) -> dict[str, Estimate]:
    """Derivatives ``dA/dd_b = <G_b>`` of the free energy in constrained lengths [kJ/mol/nm].

    A is that of the rigid system, ``-kT ln`` of the integral of the distribution above. Arguments
    and errors as in `length_derivative`; one estimate for each name, of its shape.
    """
    shapes, jacobian = _checked(ensemble, constraints, directions)
    parts = [
        _conjugate(ensemble, constraints, batch)
        for batch in ensemble.frames.batches(ensemble.batch_size)
    ]
    log_weights = ensemble._log_weights(torch.cat([energy for energy, _ in parts]))
    overlap = ensemble.gradient.overlap(log_weights)
    ensemble.gradient.require(overlap)
    forces = torch.cat([_along(conjugate, jacobian) for _, conjugate in parts])
    columns = torch.split(forces, [shape.numel() for shape in shapes.values()], dim=1)
    return {
        name: _influence.estimate(
            weights=log_weights.softmax(dim=0),
            values=own.reshape(len(own), *shape),
            energy_gradients=own.new_zeros(len(own), 0),
            value_gradients=None,
            shapes={},
            beta=ensemble.beta,
            function=None,
            overlap=overlap,
        )
        for (name, shape), own in zip(shapes.items(), columns, strict=True)
    }


def _checked(
    ensemble: Ensemble, constraints: ConstraintSet, directions: Mapping[str, Tensor] | None
) -> tuple[dict[str, torch.Size], Tensor | None]:
    """Shapes by name, and ``(P, C)`` directions; None stands for the identity."""
    n = constraints.n_constraints
    if constraints.n_particles != ensemble.frames.n_particles:
        raise InvalidInputError(
            f"constraints: have {constraints.n_particles} particles, the frames "
            f"{ensemble.frames.n_particles}; both must describe the same system"
        )
    with torch.no_grad():
        for batch in ensemble.frames.batches(ensemble.batch_size):
            residuals = constraints.residuals(batch.positions, box=batch.box).abs()
            if residuals.numel() and float(residuals.max()) > _CONSTRAINED:
                raise WrongEnsembleError(
                    f"frames: a constrained length is off by {float(residuals.max()):.1e} of "
                    "itself, so that they were not sampled with these constraints; pass the "
                    "constraints and lengths of the sampled system"
                )
    if directions is None:
        return {"lengths": torch.Size([n])}, None
    rows = []
    shapes = {}
    for name, direction in directions.items():
        tensor = torch.as_tensor(direction).to(ensemble.frames.positions.device, torch.float64)
        if tensor.ndim < 1 or tensor.shape[-1] != n or not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(
                f"directions[{name!r}]: got shape {tuple(tensor.shape)}, wanted finite numbers "
                f"(..., {n}), one for each constraint"
            )
        shapes[name] = tensor.shape[:-1]
        rows.append(tensor.detach().reshape(-1, n))
    return shapes, torch.cat(rows) if rows else torch.zeros(0, n, dtype=torch.float64)


def _along(derivatives: Tensor, jacobian: Tensor | None) -> Tensor:
    """Derivatives in lengths ``(..., C)`` as those in other quantities ``(..., P)``."""
    return derivatives if jacobian is None else derivatives @ jacobian.T


def _conjugate(
    ensemble: Ensemble, constraints: ConstraintSet, batch: Frames
) -> tuple[Tensor, Tensor]:
    """Energies ``(F,)`` and G ``(F, C)`` of a batch."""
    with torch.no_grad():
        energy = ensemble._energy(batch)
        forces = ensemble.potential.forces(batch.positions, batch.box)
        x, box = _of(constraints, batch.positions), _of(constraints, batch.box)
        assert x is not None
        work = length_response(constraints, x, -forces[:, None].to(x.dtype), box).squeeze(1)
        metric = metric_response(constraints, x, box)
        return energy, work.double() - metric.double() / ensemble.beta


def _observed(
    observable: Observable, batch: Frames, constraints: ConstraintSet
) -> tuple[Tensor, Tensor]:
    """Values ``(F, *S)``, and ``w_b . grad O`` as ``(F, S, C)``."""

    def value_of(positions: Tensor) -> Tensor:
        placed = positions
        if constraints.sites is not None:
            box = _of(constraints, batch.box)
            placed = constraints.sites(positions.to(constraints.dtype), box).to(positions.dtype)
        return _observe(observable, dataclasses.replace(batch, positions=placed))

    with torch.enable_grad():
        x = batch.positions.detach().requires_grad_()
        value = value_of(x)
        gradients = []
        for component in value.reshape(len(batch), -1).unbind(dim=1):
            slope = None
            if component.requires_grad:
                (slope,) = torch.autograd.grad(
                    component.sum(), x, retain_graph=True, allow_unused=True
                )
            gradients.append(torch.zeros_like(x) if slope is None else slope)
    if not value.requires_grad:
        _check_constant(value_of, batch.positions, value)
    stacked = (
        torch.stack(gradients, dim=1) if gradients else x.new_zeros(len(batch), 0, *x.shape[1:])
    )
    with torch.no_grad():
        plain = _of(constraints, batch.positions)
        assert plain is not None
        box = _of(constraints, batch.box)
        slopes = length_response(constraints, plain, stacked.to(plain.dtype), box)
    return value.detach(), slopes.double()


def _check_constant(value_of: Callable[[Tensor], Tensor], positions: Tensor, value: Tensor) -> None:
    """Raise if a value without a graph changes with positions all the same."""
    with torch.no_grad():
        random = torch.Generator().manual_seed(0)
        shift = torch.randn(positions.shape, generator=random, dtype=torch.float64)
        moved = value_of(positions + 0.02 * shift.to(positions))
    if not torch.equal(moved, value):
        raise UnsupportedDerivativeError(
            "observable: depends on positions but has no derivative by them, as counts and "
            "histograms have none; use a smooth form, such as kernels in place of bins"
        )


def _of(constraints: ConstraintSet, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach().to(constraints.masses.device, constraints.dtype)
