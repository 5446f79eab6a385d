"""Energies of stored frames as a function of few parameters, without the frames."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.ensembles._form import move, scale_of, verify
from mdgraft.ensembles.ensemble import _BATCH_PARTICLES, _check_state, _detached, _temperature
from mdgraft.ensembles.lennard_jones_sums import (
    LennardJonesSums,
    lennard_jones_parameters,
    lennard_jones_sums,
)
from mdgraft.ensembles.per_frame import per_frame_gradients
from mdgraft.frames import Frames
from mdgraft.potentials import Potential

#: Numbers that the second derivatives of all frames may take: 1 GiB.
_NUMBERS = 2**27


@dataclasses.dataclass(frozen=True, kw_only=True)
class SufficientStatistics:
    """What F frames say about their energies as a function of P parameters.

    With fixed positions many force fields are a constant plus, in the parameters,

    - a polynomial of degree two: charges, force constants, amplitudes of torsions, parameters of
      exceptions such as their charge products, global factors;
    - Lennard-Jones energies of pairs of types, linear in ``4 eps sigma^12`` and ``4 eps sigma^6``
      whatever the values of sigma and epsilon.

    Their coefficients are collected once from the potential. After that `energies` takes a time
    that depends on F and P alone, not on the size of the system, and has derivatives of every
    order in the parameters. It is exact, and `collect` compares it with the potential.

    All other parameters of the potential are constants: after changing them collect again. A
    parameter in which a force field is piecewise, such as the edge of a flat bottom, may look
    like a polynomial on the few frames and values that are compared.

    Attributes
    ----------
    names
        Names of parameters; P counts their scalars, in this order, each flattened.
    shapes
        Their shapes.
    point
        ``(P,)`` values at which the statistics were collected.
    generating_energies
        ``(F,)`` [kJ/mol] energies there.
    polynomial
        ``(Q,)`` which parameters the polynomial depends on.
    slopes
        ``(F, Q)`` its first derivatives at ``point`` [kJ/mol per unit of the parameter].
    curvatures
        ``(F, Q, Q)`` its second derivatives.
    sums
        Lennard-Jones energies.

    Examples
    --------
    An average at other parameters, its reweighted gradient, and a judgement of the weights::

        statistics = SufficientStatistics.collect(potential, frames, ["tied.q", "tied.sigma"])
        values = {name: potential.get_parameter(name) for name in statistics.names}
        log_weights = statistics.log_weights(values, temperature=298.15)
        Covariance().require(Covariance().overlap(log_weights))
        average = log_weights.softmax(dim=0) @ observable(frames)
        average.backward()

    It is what `Ensemble.average` finds, for an observable that does not depend on the parameters;
    `energies` itself is one that does.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    point: Tensor
    generating_energies: Tensor
    polynomial: Tensor
    slopes: Tensor
    curvatures: Tensor
    sums: tuple[LennardJonesSums, ...]

    @staticmethod
    def collect(
        potential: Potential,
        frames: Frames,
        names: Sequence[str],
        *,
        batch_size: int | None = None,
    ) -> SufficientStatistics:
        """Collect the statistics of frames at the potential's present parameters.

        It takes about P evaluations of all frames' energies and gradients.

        Parameters
        ----------
        potential
            The potential, in double precision; it is not changed.
        frames
            F frames.
        names
            Names of parameters, typically tied ones.
        batch_size
            Frames that are evaluated at a time.

        Raises
        ------
        InvalidInputError
            For an unknown name, single precision, too many parameters, or if the energy is not of
            this form; the parameters in which it is not are named.
        """
        _check_input(potential, frames, names)
        # A copy, whose parameters can be moved about.
        model, frames = copy.deepcopy(potential), _detached(frames, potential).to(torch.float64)
        named = dict(model.named_parameters())
        shapes = tuple(named[name].shape for name in names)
        point = torch.cat([named[name].detach().reshape(-1) for name in names])
        empty = SufficientStatistics(
            names=tuple(names),
            shapes=shapes,
            point=point,
            generating_energies=_energies(model, frames, batch_size),
            polynomial=torch.empty(0, dtype=torch.long, device=point.device),
            slopes=point.new_zeros(len(frames), 0),
            curvatures=point.new_zeros(len(frames), 0, 0),
            sums=tuple(lennard_jones_sums(model, frames, names, batch_size=batch_size)),
        )
        statistics = empty._with_polynomial(model, frames, batch_size)
        verify(statistics, model, frames)
        return statistics

    # Use --------------------------------------------------------------------------------------

    def energies(self, values: Mapping[str, Any]) -> Tensor:
        """Energies of the frames, with a graph.

        Parameters
        ----------
        values
            Values of parameters by name, each of its parameter's shape; those that are left out
            keep the value they were collected at.

        Returns
        -------
        Tensor
            float64 ``(F,)`` [kJ/mol].

        Raises
        ------
        InvalidInputError
            For an unknown name or a wrong shape.
        """
        return self.energies_at(self._parameters(values))

    def gradients(self, values: Mapping[str, Any]) -> Tensor:
        """Derivatives ``(F, P)`` of the energies; arguments as in `energies`."""
        return self._gradients_at(self._parameters(values))

    def log_weights(self, values: Mapping[str, Any], *, temperature: Any) -> Tensor:
        """Unnormalised log weights ``(F,)`` relative to where the statistics were collected.

        Parameters
        ----------
        values
            As in `energies`.
        temperature
            [K], a number or a quantity.
        """
        beta = 1.0 / (BOLTZMANN * _temperature(temperature))
        return -beta * (self.energies(values) - self.generating_energies)

    def __len__(self) -> int:
        return len(self.generating_energies)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> SufficientStatistics:
        """Select frames; an integer must be wrapped in a list or slice."""
        if isinstance(index, int):
            raise InvalidInputError(
                f"index: got {index}, wanted a slice or a list such as [{index}]"
            )
        return dataclasses.replace(
            self,
            generating_energies=self.generating_energies[index],
            slopes=self.slopes[index],
            curvatures=self.curvatures[index],
            sums=tuple(sums[index] for sums in self.sums),
        )

    def _parameters(self, values: Mapping[str, Any]) -> Tensor:
        """Flat parameters ``(P,)``."""
        unknown = [name for name in values if name not in self.names]
        if unknown:
            raise InvalidInputError(
                f"values: no statistics of {unknown}; there are those of {list(self.names)}"
            )
        sizes = [shape.numel() for shape in self.shapes]
        parts = []
        for name, shape, old in zip(
            self.names, self.shapes, torch.split(self.point, sizes), strict=True
        ):
            value = torch.as_tensor(values.get(name, old.reshape(shape)))
            if value.shape != shape:
                raise InvalidInputError(
                    f"values[{name!r}]: got shape {tuple(value.shape)}, wanted {tuple(shape)}"
                )
            parts.append(value.to(self.point).reshape(-1))
        return torch.cat(parts)

    def energies_at(self, parameters: Tensor) -> Tensor:
        """Energies ``(F,)`` at all parameters ``(P,)``, in the order of `names`."""
        change = (parameters - self.point)[self.polynomial]
        energies = self.generating_energies + self.slopes @ change
        energies = energies + 0.5 * (self.curvatures @ change) @ change
        for sums in self.sums:
            energies = energies + (sums.energies(parameters) - sums.energies(self.point))
        return energies

    def _gradients_at(self, parameters: Tensor) -> Tensor:
        change = (parameters - self.point)[self.polynomial]
        slopes = self.slopes + self.curvatures @ change
        whole = slopes.new_zeros(len(self), len(self.point))
        whole = whole.index_add(1, self.polynomial, slopes)
        for sums in self.sums:
            whole = whole + sums.gradients(parameters)
        return whole

    # Collection -------------------------------------------------------------------------------

    def _with_polynomial(
        self, model: Potential, frames: Frames, batch_size: int | None
    ) -> SufficientStatistics:
        """Add what the Lennard-Jones sums, which are there already, leave to a polynomial."""
        names = _polynomial_names(model, self.names)
        if not names:
            return self
        sizes = [shape.numel() for shape in self.shapes]
        chosen = torch.tensor([name in names for name in self.names], device=self.point.device)
        columns = chosen.repeat_interleave(torch.tensor(sizes, device=self.point.device))
        columns = columns.nonzero().squeeze(-1)

        def slopes(at: Tensor) -> Tensor:
            move(model, self.names, at)
            whole = per_frame_gradients(model, frames, names, batch_size=batch_size)
            return whole - self._gradients_at(at)[:, columns]

        here = slopes(self.point)
        rows = []
        for column in columns.tolist():
            # Slopes of a quadratic are linear: differences at a large step are exact.
            step = 0.5 * float(scale_of(self)[column])
            there = self.point.clone()
            there[column] += step
            rows.append((slopes(there) - here) / (there - self.point)[column])
        curvatures = torch.stack(rows, dim=1)
        return dataclasses.replace(
            self,
            polynomial=columns,
            slopes=here,
            curvatures=0.5 * (curvatures + curvatures.mT),
        )


def _check_input(potential: Potential, frames: Frames, names: Sequence[str]) -> None:
    pressure = 0.0 if isinstance(frames, Frames) and frames.sampled == "NPT" else None
    _check_state(potential, frames, pressure)
    named = dict(potential.named_parameters())
    unknown = [name for name in names if name not in named]
    if isinstance(names, str) or unknown or not names or len(set(names)) != len(names):
        raise InvalidInputError(f"names: got {names!r}, wanted some of {sorted(named)}, each once")
    if potential.dtype != torch.float64:
        raise InvalidInputError(
            f"potential: computes in {potential.dtype}, too coarse for differences of energies; "
            "use potential.double()"
        )
    n_scalars = sum(named[name].numel() for name in names)
    if len(frames) * n_scalars**2 > _NUMBERS:
        raise InvalidInputError(
            f"names: hold {n_scalars} numbers, whose second derivatives in {len(frames)} frames "
            "would take too much memory; tie entries that change together (Potential.tie)"
        )


def _energies(model: Potential, frames: Frames, batch_size: int | None) -> Tensor:
    size = batch_size or max(1, _BATCH_PARTICLES // max(1, frames.n_particles))
    with torch.no_grad():
        energies = [model(batch.positions, batch.box) for batch in frames.batches(size)]
    return torch.cat(energies)


def _polynomial_names(model: Potential, names: Sequence[str]) -> list[str]:
    """Names of parameters that do not count in Lennard-Jones sums alone."""
    accounted = lennard_jones_parameters(model)
    ties: Any = model._modules["tied"]
    members = {f"tied.{label}": set(entries) for label, entries in ties.members().items()}
    return [name for name in names if not members.get(name, {name}) <= accounted]
