"""Whether energies of frames are the function of parameters that statistics take them for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.frames import Frames
from mdgraft.potentials import Potential

if TYPE_CHECKING:
    from mdgraft.ensembles.sufficient_statistics import SufficientStatistics

#: Frames on which the form is compared with the potential.
_CHECKED = 4
#: Allowed difference, as a fraction of the change of the energy and, for rounding, of its terms.
_TOLERANCE, _ROUNDING = 1e-9, 1e-12


def move(model: Potential, names: Sequence[str], parameters: Tensor) -> None:
    """Give the named parameters these values ``(P,)``."""
    named = dict(model.named_parameters())
    sizes = [named[name].numel() for name in names]
    with torch.no_grad():
        for name, part in zip(names, torch.split(parameters, sizes), strict=True):
            named[name].copy_(part.reshape(named[name].shape))


def scale_of(statistics: SufficientStatistics) -> Tensor:
    """How large each parameter is, ``(P,)``: where it is zero, as its neighbours or one."""
    parts = []
    sizes = [shape.numel() for shape in statistics.shapes]
    for part in torch.split(statistics.point, sizes):
        largest = part.abs().max() if part.numel() else part.new_zeros(())
        size = torch.where(largest > 0, largest, 1.0)
        parts.append(torch.where(part == 0, size, part.abs()))
    return torch.cat(parts)


def verify(statistics: SufficientStatistics, model: Potential, frames: Frames) -> None:
    """Raise unless the form agrees with the potential where parameters have changed."""
    index = torch.linspace(0, len(frames) - 1, min(_CHECKED, len(frames))).long()
    some, few = frames[index], statistics[index]
    generator = torch.Generator().manual_seed(0)
    scale = scale_of(statistics)
    owner = torch.cat(
        [torch.full((shape.numel(),), k) for k, shape in enumerate(statistics.shapes)]
    )

    def agree(*names: int) -> bool:
        moving = torch.isin(owner, torch.tensor(names)).to(scale.device)
        for sign in (1.0, -1.0):
            # Between 10 and 30 %, away from zero and towards it.
            factor = 0.1 + 0.2 * torch.rand(len(owner), generator=generator, dtype=torch.float64)
            # What is zero may have to stay positive.
            direction = torch.where(statistics.point == 0, 1.0, sign * statistics.point.sign())
            step = direction * factor.to(scale.device) * scale
            at = statistics.point + torch.where(moving, step, 0.0)
            move(model, statistics.names, at)
            with torch.no_grad():
                terms = torch.stack(list(model.energy_by_term(some.positions, some.box).values()))
            change = terms.sum(dim=0) - few.generating_energies
            error = few.energies_at(at) - few.generating_energies - change
            rounding = _ROUNDING * float(terms.abs().sum(dim=0).max())
            # Written so that NaN disagrees.
            if not float(error.abs().max()) <= _TOLERANCE * float(change.abs().max()) + rounding:
                return False
        return True

    everything = range(len(statistics.names))
    wrong = [k for k in everything if not agree(k)]
    if wrong:
        raise InvalidInputError(
            f"names: the energy is neither linear nor quadratic in "
            f"{[statistics.names[k] for k in wrong]}; leave them out, or evaluate the potential "
            "instead (mdgraft.Ensemble). Only sigma and epsilon of a nonbonded term that is "
            "evaluated natively have a form of their own"
        )
    if len(everything) == 1 or agree(*everything):
        return
    groups: list[tuple[int, ...]] = [p for p in itertools.combinations(everything, 2)]
    groups = [pair for pair in groups if not agree(*pair)] or [tuple(everything)]
    products = [tuple(statistics.names[k] for k in group) for group in groups]
    raise InvalidInputError(
        f"names: the energy holds products of higher than second order of {products}; collect "
        "statistics of some of them alone, or evaluate the potential instead (mdgraft.Ensemble)"
    )
