"""Response properties from fluctuations at constant temperature and pressure.

Averages of products of fluctuations, so that their gradients hold third cumulants. Energies and
volumes are taken relative to their means over the frames, which changes no result but keeps the
digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import WrongEnsembleError
from mdgraft._units import BAR_NM3
from mdgraft.ensembles.ensemble import Ensemble
from mdgraft.ensembles.observables import Enthalpy, PotentialEnergy, Volume
from mdgraft.estimate import Estimate
from mdgraft.frames import Frames


def heat_capacity(ensemble: Ensemble, parameters: Sequence[str] | None = None) -> Estimate:
    """Configurational heat capacity of the box [kJ/mol/K].

    ``(<H^2> - <H>^2) / kT^2`` with ``H = U + P V`` at constant pressure, and ``H = U`` at constant
    volume. Kinetic energy adds k/2 for each degree of freedom.

    Parameters
    ----------
    ensemble
        The ensemble.
    parameters
        As in `Ensemble.estimate`.
    """
    if ensemble.pressure is None:
        energy: PotentialEnergy | Enthalpy = PotentialEnergy(ensemble.potential)
    else:
        energy = Enthalpy(ensemble.potential, ensemble.pressure)
    origin = _mean(ensemble, energy)
    factor = ensemble.beta / ensemble.temperature

    def moments(frames: Frames) -> Tensor:
        h = energy(frames).double() - origin
        return torch.stack([h, h * h], dim=-1)

    def capacity(average: Tensor) -> Tensor:
        return factor * (average[1] - average[0] ** 2)

    return ensemble.estimate(moments, parameters, function=capacity)


def isothermal_compressibility(
    ensemble: Ensemble, parameters: Sequence[str] | None = None
) -> Estimate:
    """Isothermal compressibility ``(<V^2> - <V>^2) / (kT <V>)`` [1/bar].

    Arguments as in `heat_capacity`; raises `WrongEnsembleError` without a pressure.
    """
    _require_pressure(ensemble)
    volume = Volume()
    origin = _mean(ensemble, volume)

    def moments(frames: Frames) -> Tensor:
        v = volume(frames).double() - origin
        return torch.stack([v, v * v], dim=-1)

    def compressibility(average: Tensor) -> Tensor:
        variance = average[1] - average[0] ** 2
        return ensemble.beta * BAR_NM3 * variance / (origin + average[0])

    return ensemble.estimate(moments, parameters, function=compressibility)


def thermal_expansion(ensemble: Ensemble, parameters: Sequence[str] | None = None) -> Estimate:
    """Isobaric thermal expansion ``(<H V> - <H><V>) / (kT^2 <V>)`` [1/K].

    Arguments as in `heat_capacity`; raises `WrongEnsembleError` without a pressure.
    """
    pressure = _require_pressure(ensemble)
    volume, enthalpy = Volume(), Enthalpy(ensemble.potential, pressure)
    v_0, h_0 = _mean(ensemble, volume), _mean(ensemble, enthalpy)
    factor = ensemble.beta / ensemble.temperature

    def moments(frames: Frames) -> Tensor:
        v, h = volume(frames).double() - v_0, enthalpy(frames).double() - h_0
        return torch.stack([h, v, h * v], dim=-1)

    def expansion(average: Tensor) -> Tensor:
        return factor * (average[2] - average[0] * average[1]) / (v_0 + average[1])

    return ensemble.estimate(moments, parameters, function=expansion)


def _mean(ensemble: Ensemble, observable: PotentialEnergy | Enthalpy | Volume) -> Tensor:
    """A constant near the average."""
    with torch.no_grad():
        batches = ensemble.frames.batches(ensemble.batch_size)
        return torch.cat([observable(batch).double() for batch in batches]).mean()


def _require_pressure(ensemble: Ensemble) -> float:
    if ensemble.pressure is None:
        raise WrongEnsembleError(
            "pressure: is None, but volume fluctuations are needed; sample at constant pressure "
            "and pass pressure= in bar"
        )
    return ensemble.pressure
