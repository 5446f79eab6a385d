"""What pairs beyond the cutoff contribute if they are spread evenly.

The correction is ``4 pi N / ((N + 1) V)`` times the sum over pairs of particles, each one with
itself included, of ``int_rc^inf e(r) r^2 dr``, to which a switching function adds what it takes
away within the cutoff. Particles with the same parameters share their integrals.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.observe import observe
from mdgraft.potentials import pair_forms

#: Energies of pairs at distances ``(points, 1)`` from the parameters of particles 1 and 2,
#: ``(pairs,)`` each by name.
PairEnergy = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


# Arrays, since a tensor made inside a torch.func transform must not outlive it.
@functools.lru_cache(maxsize=16)
def _gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre rule between 0 and 1 of panels with 32 points each."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    panels = points // 32
    shift = np.arange(panels)[:, None]
    x = (shift + 0.5 * (nodes + 1)) / panels
    return x.ravel(), np.tile(0.5 * weights / panels, panels)


def tail_integral(
    energy: Callable[[Tensor], Tensor],
    cutoff: float,
    switching_distance: Tensor | None,
    points: int,
    like: Tensor,
) -> Tensor:
    """Integrate ``int_rc^inf e r^2 dr + int_rs^rc (1 - S) e r^2 dr``.

    Parameters
    ----------
    energy
        Maps distances ``(points, 1)`` to energies ``(points, pairs)``.
    cutoff, switching_distance
        [nm]; the latter None without a switching function.
    points
        Number of points of each integral, a multiple of 32.
    like
        Gives device and dtype.

    Returns
    -------
    Tensor
        ``(pairs,)``.
    """
    x, weight = (
        torch.as_tensor(a, dtype=like.dtype, device=like.device)[:, None] for a in _gauss(points)
    )
    # r = rc / x turns powers of 1/r into polynomials.
    total = (weight * cutoff**3 / x**4 * energy(cutoff / x)).sum(dim=0)
    if switching_distance is not None:
        r = switching_distance + x * (cutoff - switching_distance)
        taken = 1 - pair_forms.switch(r, switching_distance, cutoff)
        inner = (weight * taken * r * r * energy(r)).sum(dim=0)
        total = total + (cutoff - switching_distance) * inner
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCounts:
    """How often particles of each kind interact.

    Attributes
    ----------
    kind
        ``(N,)`` int64: particles of one kind are in the same interaction groups.
    weights
        ``(kinds, kinds)``: number of interactions of a pair of distinct particles.
    itself
        Whether each particle also counts as a pair with itself, as it does without groups.
    """

    kind: Tensor
    weights: Tensor
    itself: bool


def correction(
    pair_energy: PairEnergy,
    parameters: Mapping[str, Tensor],
    counts: PairCounts,
    *,
    bent: Sequence[str],
    cutoff: float,
    switching_distance: Tensor | None,
    points: int,
) -> Tensor:
    """Product of energy and volume [kJ/mol nm^3], with exact first and second derivatives.

    Parameters
    ----------
    pair_energy
        Of any pair.
    parameters
        Float64 ``(N,)`` by name. Particles with equal ones form a class; memory grows with the
        square of the number of classes times ``points``.
    counts
        Which pairs count.
    bent
        Names of the parameters whose second derivatives are wanted.
    cutoff, switching_distance, points
        See `tail_integral`.

    Notes
    -----
    A class is represented by the mean of its members, which is exact to the first order because
    their derivatives are equal. The second order adds half the covariance of the members times
    the second derivative of one member's energy; the covariance is zero but its second
    derivative is not. Derivatives of the third order in one particle's own parameters are those
    of the means.
    """
    labels, members = _classes(parameters, counts.kind)
    n_particles, n_classes = labels.shape[0], members.shape[0]
    size = torch.bincount(labels, minlength=n_classes).double()

    def mean(value: Tensor) -> Tensor:
        # The value is that of one member, so that indices into tables stay integers.
        excess = value - value.detach()
        return (
            value.detach()[members] + size.new_zeros(n_classes).index_add(0, labels, excess) / size
        )

    first, second = (torch.as_tensor(a, device=labels.device) for a in np.triu_indices(n_classes))
    same = first == second
    kind = counts.kind[members]
    weight = counts.weights.to(size)[kind[first], kind[second]]
    own = 1.0 if counts.itself else 0.0
    # Pairs of distinct members in a class, and each with itself.
    number = torch.where(
        same,
        weight * 0.5 * size[first] * (size[first] - 1) + own * size[first],
        weight * size[first] * size[second],
    )

    def integral(
        one: Mapping[str, Tensor], two: Mapping[str, Tensor], switching: Tensor | None
    ) -> Tensor:
        return tail_integral(lambda r: pair_energy(r, one, two), cutoff, switching, points, size)

    classes = {name: mean(value) for name, value in parameters.items()}
    total = (number * integral(_at(classes, first), _at(classes, second), switching_distance)).sum()
    if bent and n_classes < n_particles:
        fixed = {name: value.detach() for name, value in classes.items()}
        switching = None if switching_distance is None else switching_distance.detach()

        def displaced(by: Tensor) -> Tensor:
            """Energy of one displaced member of each class."""
            moved = fixed | {name: fixed[name] + by[:, k] for k, name in enumerate(bent)}
            a, b = _at(fixed, first), _at(fixed, second)
            share = weight * torch.where(same, 0.5, 1.0)
            energy = share * size[second] * integral(_at(moved, first), b, switching)
            energy = energy + share * size[first] * integral(a, _at(moved, second), switching)
            diagonal = torch.arange(n_classes, device=labels.device)
            alone = own - 0.5 * counts.weights.to(size)[kind, kind]
            here = _at(moved, diagonal)
            return energy.sum() + (alone * integral(here, here, switching)).sum()

        zero = size.new_zeros(n_classes, len(bent))
        slope = torch.func.grad(displaced)
        curvature = torch.stack(
            [
                torch.func.jvp(slope, (zero,), (_unit(zero, k),))[1].detach()
                for k in range(len(bent))
            ],
            dim=-1,
        )
        deviation = torch.stack([parameters[name] - classes[name][labels] for name in bent], dim=-1)
        slopes = (curvature[labels] @ deviation.unsqueeze(-1)).squeeze(-1)
        total = total + 0.5 * (deviation * slopes).sum()
    result: Tensor = 4 * math.pi * n_particles / (n_particles + 1) * total
    return result


def _at(values: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {name: value[index] for name, value in values.items()}


def _unit(like: Tensor, k: int) -> Tensor:
    return torch.ones_like(like) * (torch.arange(like.shape[1], device=like.device) == k)


def _classes(parameters: Mapping[str, Tensor], kind: Tensor) -> tuple[Tensor, Tensor]:
    """Class of each particle, and one member of each class.

    Classes are in the order in which their parameters first appear, as OpenMM numbers them.
    """
    n_particles = kind.shape[0]

    def build(*columns: Tensor) -> Tensor:
        # The last column stands in where there are no parameters.
        rows = np.concatenate(
            [c.cpu().double().numpy() for c in (kind[None], *columns, torch.zeros_like(kind[None]))]
        ).T
        _, first, inverse = np.unique(rows[:, 1:], axis=0, return_index=True, return_inverse=True)
        appearance = first[inverse.ravel()]
        _, members, labels = np.unique(
            np.stack([appearance, rows[:, 0]]), axis=1, return_index=True, return_inverse=True
        )
        packed = torch.from_numpy(np.concatenate([labels.ravel(), members]).astype(np.int64))
        return packed.to(kind.device)

    # One partition serves a whole batch: it separates what differs in any member of it.
    packed = observe(build, lambda found, _: found, *(v[None] for v in parameters.values()))
    return packed[:n_particles], packed[n_particles:]
