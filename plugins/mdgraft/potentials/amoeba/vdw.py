"""Van der Waals interactions of AMOEBA: buffered 14-7 or Lennard-Jones between reduced sites."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mdgraft._units import DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.kernels.observe import observe
from mdgraft.kernels.pairs import all_pairs, exclusion_keys, neighbor_pairs
from mdgraft.kernels.periodic import volume
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.pair_forms import root_epsilon
from mdgraft.potentials.term import AbstractTerm

#: Interactions are tapered from this fraction of the cutoff on.
TAPER = 0.9
#: Buffering constants of the 14-7 potential.
DELTA, GAMMA = 0.07, 0.12
#: Global parameter that scales alchemical interactions.
LAMBDA = "AmoebaVdwLambda"


class Alchemical(enum.Enum):
    """Which interactions the global parameter scales."""

    NONE = "None"
    #: Between alchemical and other particles.
    DECOUPLE = "Decouple"
    #: All that an alchemical particle takes part in.
    ANNIHILATE = "Annihilate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmoebaVdwSettings:
    """Constants of an AMOEBA van der Waals term.

    Attributes
    ----------
    cutoff
        [nm] with periodic boundary conditions, or None for all pairs of an open system.
    lennard_jones
        Lennard-Jones instead of buffered 14-7.
    sigma_rule
        ``ARITHMETIC``, ``GEOMETRIC`` or ``CUBIC-MEAN``.
    epsilon_rule
        ``ARITHMETIC``, ``GEOMETRIC``, ``HARMONIC``, ``W-H`` or ``HHG``.
    alchemical
        What the global parameter scales.
    softcore_power
        Its exponent.
    dispersion_correction
        Whether the tail beyond the cutoff is added.
    """

    cutoff: float | None
    lennard_jones: bool = False
    sigma_rule: str = "CUBIC-MEAN"
    epsilon_rule: str = "HHG"
    alchemical: Alchemical = Alchemical.NONE
    softcore_power: int = 5
    dispersion_correction: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleTypes:
    """Parameters by type instead of by particle.

    Attributes
    ----------
    index
        ``(N,)`` type of each particle.
    sigma, epsilon
        ``(types,)`` [nm], [kJ/mol].
    pairs
        ``(pairs, 2)`` types whose parameters do not follow from the combining rules; the last entry
        of two types counts.
    pair_sigma, pair_epsilon
        ``(pairs,)`` [nm], [kJ/mol].
    """

    index: Tensor
    sigma: Tensor
    epsilon: Tensor
    pairs: Tensor
    pair_sigma: Tensor
    pair_epsilon: Tensor


class AmoebaVdw(AbstractTerm):
    r"""Van der Waals interactions between sites on the lines from parents to particles.

    With rho = r/sigma_ij, buffered 14-7:
    E = s_i s_j epsilon_ij (1.07/(rho + 0.07))^7 (1.12/(rho^7 + 0.12) - 2), or Lennard-Jones.
    Sites are at x_parent + reduction (x - x_parent); a reduction of zero leaves the site on its
    particle. sigma_ij is twice a mean of radii, as for AMOEBA's minimum distances. With a cutoff,
    energies of pairs of *particles* within it are tapered by the fifth-order polynomial from 0.9
    cutoff on, in the distance of the sites.

    Alchemical pairs have epsilon_ij lambda^n, and both denominators of the 14-7 potential, taken
    to the seventh power, grow by alpha (1 - lambda)^2.

    The dispersion correction integrates what cutoff and taper remove by the midpoint rule to 20 nm,
    with OpenMM's nodes. Its derivatives in sigma are exact to the second order, and those beyond
    are incomplete.

    Parameters
    ----------
    parents
        ``(N,)`` parent of each particle, which may be itself.
    sigma, epsilon
        ``(N,)`` [nm], [kJ/mol], or None with types.
    reduction_factor, scale_factor
        ``(N,)``; the interactions of a particle are multiplied by its scale factor.
    settings
        Method and its constants.
    exclusions
        ``(exclusions, 2)`` pairs that do not interact.
    alchemical
        ``(N,)`` booleans.
    softcore_alpha
        ``()``, or None without alchemical interactions.
    types
        Parameters by type, or None.

    References
    ----------
    T. A. Halgren, J. Am. Chem. Soc. 114, 7827 (1992); P. Ren and J. W. Ponder, J. Phys. Chem. B
    107, 5933 (2003); D. Jiao et al., Proc. Natl. Acad. Sci. 105, 6290 (2008), eq. 2.
    """

    parents: Tensor
    excluded: Tensor
    alchemical: Tensor
    type_index: Tensor
    type_pairs: Tensor
    tail_pairs: Tensor
    tail_counts: Tensor

    def __init__(
        self,
        parents: Tensor,
        sigma: Tensor | None,
        epsilon: Tensor | None,
        *,
        reduction_factor: Tensor,
        scale_factor: Tensor,
        settings: AmoebaVdwSettings,
        exclusions: Tensor,
        alchemical: Tensor,
        softcore_alpha: Tensor | None = None,
        types: ParticleTypes | None = None,
    ) -> None:
        super().__init__(periodic=settings.cutoff is not None)
        self.settings = settings
        self.register_buffer("parents", parents)
        self.register_buffer("excluded", exclusion_keys(exclusions, parents.shape[0]))
        self.register_buffer("alchemical", alchemical)
        self.add_parameter("reduction_factor", reduction_factor, DIMENSIONLESS)
        self.add_parameter("scale_factor", scale_factor, DIMENSIONLESS)
        self.by_type = types is not None
        if types is not None:
            self.register_buffer("type_index", types.index)
            self.register_buffer("type_pairs", types.pairs)
            # Force fields list many types that a system has no particle of.
            present, count = torch.unique(types.index, return_counts=True)
            one, two = torch.triu_indices(len(present), len(present))
            twice = count[one] * count[two] * torch.where(one == two, 1, 2)
            pairs = torch.stack([present[one], present[two]], dim=-1)
            self.register_buffer("tail_pairs", pairs, persistent=False)
            self.register_buffer("tail_counts", twice, persistent=False)
            self.add_parameter("type_sigma", types.sigma, NANOMETER)
            self.add_parameter("type_epsilon", types.epsilon, ENERGY)
            self.add_parameter("type_pair_sigma", types.pair_sigma, NANOMETER)
            self.add_parameter("type_pair_epsilon", types.pair_epsilon, ENERGY)
        else:
            assert sigma is not None and epsilon is not None
            self.add_parameter("sigma", sigma, NANOMETER)
            self.add_parameter("epsilon", epsilon, ENERGY)
        if settings.alchemical is not Alchemical.NONE:
            assert softcore_alpha is not None
            self.add_parameter("softcore_alpha", softcore_alpha, DIMENSIONLESS)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        settings = self.settings
        cell = None if settings.cutoff is None else box
        if settings.cutoff is None:
            pairs = all_pairs(positions.shape[1], self.excluded)
        else:
            pairs = neighbor_pairs(positions, cell, cutoff=settings.cutoff, excluded=self.excluded)
        i, j = pairs.first, pairs.second
        r = safe_norm(pairs.displacements(self._sites(positions, values), cell))

        if self.by_type:
            sigma_table, epsilon_table = self._type_table(values)
            sigma = sigma_table[self.type_index[i], self.type_index[j]]
            epsilon = epsilon_table[self.type_index[i], self.type_index[j]]
        else:
            one, two = ((values["sigma"][k], values["epsilon"][k]) for k in (i, j))
            sigma, epsilon = self._combine(*one, *two)
        scale = values["scale_factor"]
        epsilon = epsilon * scale[i] * scale[j]
        epsilon, softcore = self._alchemy(epsilon, i, j, values, global_values)
        if settings.lennard_jones:
            energy = _lennard_jones(r, sigma, epsilon)
        else:
            energy = _buffered(r, sigma, epsilon, softcore)
        if settings.cutoff is not None:
            energy = energy * _taper(r, settings.cutoff)
            # Which pairs count depends on the particles, not on the sites.
            vectors = pairs.displacements(positions, cell)
            within = (vectors * vectors).sum(dim=-1) <= settings.cutoff**2
            energy = torch.where(within, energy, 0.0)
        total = pairs.sum(energy, positions.shape[0])
        if LAMBDA in global_values:
            # OpenMM declares it in any case; its derivative is zero, not missing.
            total = total + 0.0 * global_values[LAMBDA]
        if settings.cutoff is not None and settings.dispersion_correction:
            assert box is not None
            total = total + self._tail(values) / volume(box)
        return total

    def _sites(self, positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        parent = positions[:, self.parents]
        reduction = values["reduction_factor"].unsqueeze(-1)
        return torch.where(reduction == 0, positions, parent + reduction * (positions - parent))

    def _alchemy(
        self,
        epsilon: Tensor,
        i: Tensor,
        j: Tensor,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor | float]:
        """Scaled well depths, and what buffers the potential."""
        method = self.settings.alchemical
        if method is Alchemical.NONE:
            return epsilon, 0.0
        one, two = self.alchemical[i], self.alchemical[j]
        scaled = one != two if method is Alchemical.DECOUPLE else one | two
        coupling = global_values[LAMBDA]
        factor = coupling**self.settings.softcore_power
        softcore = values["softcore_alpha"] * (1 - coupling) ** 2
        return torch.where(scaled, factor, 1.0) * epsilon, torch.where(scaled, softcore, 0.0)

    def _combine(
        self, sigma: Tensor, epsilon: Tensor, other_sigma: Tensor, other_epsilon: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the combining rules."""
        rules = self.settings
        return (
            _SIGMA_RULES[rules.sigma_rule](sigma, other_sigma),
            _EPSILON_RULES[rules.epsilon_rule](sigma, epsilon, other_sigma, other_epsilon),
        )

    def _type_table(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sigma and epsilon ``(types, types)``."""
        sigma, epsilon = values["type_sigma"], values["type_epsilon"]
        tables = self._combine(sigma[:, None], epsilon[:, None], sigma, epsilon)
        if not len(self.type_pairs):
            return tables
        one, two = self.type_pairs.unbind(-1)
        number = torch.arange(len(one), device=one.device)
        which = torch.full((len(sigma), len(sigma)), -1, device=one.device)
        for flat in (one * len(sigma) + two, two * len(sigma) + one):
            which = which.reshape(-1).scatter_reduce(0, flat, number, "amax").reshape(which.shape)
        overridden = [values["type_pair_sigma"], values["type_pair_epsilon"]]
        first, second = (
            torch.where(which < 0, table, pair[which.clamp(min=0)])
            for table, pair in zip(tables, overridden, strict=True)
        )
        return first, second

    def _tail(self, values: Mapping[str, Tensor]) -> Tensor:
        """Dispersion correction times the volume ``()`` [kJ/mol nm^3]."""
        if self.by_type:
            one, two = self.tail_pairs.unbind(-1)
            sigma, epsilon = (table[one, two] for table in self._type_table(values))
            energy = epsilon * self._expand(sigma, self._integrals(sigma))
            return 2 * math.pi * (self.tail_counts * energy).sum()
        # Particles with equal parameters share their integrals, as the class they form.
        sigma, epsilon = values["sigma"], values["epsilon"]
        member = observe(_classes, lambda result, _: result, sigma[None], epsilon[None]).to(sigma)
        count = member.sum(dim=0)
        mean = (member.T @ sigma / count, member.T @ epsilon / count)
        fixed = (mean[0].detach(), mean[1].detach())
        integrals = self._integrals(self._combine(fixed[0][:, None], fixed[1][:, None], *fixed)[0])

        def energies(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], h: Tensor) -> Tensor:
            s, e = self._combine(one[0][:, None], one[1][:, None], *two)
            return e * self._expand(s, h)

        # The sum over all pairs of particles, of which the first term has the mixed second
        # derivatives and the third those of one particle; the second takes out what both have.
        classes = count * energies(mean, mean, integrals)
        blurred = count * energies(mean, fixed, integrals)
        single = count * energies((sigma, epsilon), fixed, member @ integrals)
        total = (count[:, None] * (classes - 2 * blurred)).sum() + 2 * single.sum()
        return 2 * math.pi * total

    def _expand(self, sigma: Tensor, integrals: Tensor) -> Tensor:
        """The integral as a function of sigma, with its first two derivatives."""
        step = sigma - sigma.detach()
        return integrals[0] + step * (integrals[1] + 0.5 * step * integrals[2])

    def _integrals(self, sigma: Tensor) -> Tensor:
        """Integrals over r^2 of the potential that is cut off, per epsilon: ``(3, *sigma.shape)``.

        The value and two derivatives in sigma.
        """
        assert self.settings.cutoff is not None
        r, weights = (torch.as_tensor(a).to(sigma) for a in _nodes(self.settings.cutoff))
        shape, flat = sigma.shape, sigma.detach().flatten()
        form = _lennard_jones_jet if self.settings.lennard_jones else _buffered_jet
        parts: tuple[Tensor, ...] = torch.tensor_split(flat, -(-len(flat) // 256) or 1)
        chunks = [form(part[:, None], r) @ weights for part in parts]
        return torch.cat(chunks, dim=-1).reshape(3, *shape)


def _cubic_mean(a: Tensor, b: Tensor) -> Tensor:
    total = a * a + b * b
    zero = total == 0
    return torch.where(zero, 0.0, 2 * (a**3 + b**3) / torch.where(zero, 1.0, total))


def _harmonic(a: Tensor, b: Tensor) -> Tensor:
    zero = a + b == 0
    return torch.where(zero, 0.0, 2 * a * b / torch.where(zero, 1.0, a + b))


def _halgren(a: Tensor, b: Tensor) -> Tensor:
    total = root_epsilon(a) + root_epsilon(b)
    zero = total == 0
    return torch.where(zero, 0.0, 4 * a * b / torch.where(zero, 1.0, total) ** 2)


def _waldman_hagler(s: Tensor, a: Tensor, t: Tensor, b: Tensor) -> Tensor:
    total = s**6 + t**6
    zero = total == 0
    ratio = 2 * s**3 * t**3 / torch.where(zero, 1.0, total)
    return torch.where(zero, 0.0, root_epsilon(a * b) * ratio)


_SIGMA_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ARITHMETIC": lambda a, b: a + b,
    "GEOMETRIC": lambda a, b: 2 * root_epsilon(a * b),
    "CUBIC-MEAN": _cubic_mean,
}
_EPSILON_RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ARITHMETIC": lambda s, a, t, b: 0.5 * (a + b),
    "GEOMETRIC": lambda s, a, t, b: root_epsilon(a * b),
    "HARMONIC": lambda s, a, t, b: _harmonic(a, b),
    "W-H": _waldman_hagler,
    "HHG": lambda s, a, t, b: _halgren(a, b),
}
#: Names of the combining rules.
SIGMA_RULES, EPSILON_RULES = tuple(_SIGMA_RULES), tuple(_EPSILON_RULES)


def _lennard_jones(r: Tensor, sigma: Tensor, epsilon: Tensor) -> Tensor:
    x = (sigma / r) ** 6
    return 4 * epsilon * x * (x - 1)


def _buffered(r: Tensor, sigma: Tensor, epsilon: Tensor, softcore: Tensor | float) -> Tensor:
    rho = r / sigma
    first = (1 + DELTA) ** 7 / (softcore + (rho + DELTA) ** 7)
    return epsilon * first * ((1 + GAMMA) / (softcore + rho**7 + GAMMA) - 2)


def _taper(r: Tensor, cutoff: float) -> Tensor:
    """S = 1 - 10 t^3 + 15 t^4 - 6 t^5, not clamped for sites that are farther than particles."""
    t = ((r - TAPER * cutoff) / ((1 - TAPER) * cutoff)).clamp(min=0)
    return 1 - t * t * t * (10 - t * (15 - 6 * t))


def _lennard_jones_jet(sigma: Tensor, r: Tensor) -> Tensor:
    """Potential per epsilon and its derivatives in sigma ``(3, sigma, r)``."""
    y, z = (sigma / r) ** 4 / r**2, (sigma / r) ** 10 / r**2
    s2 = sigma * sigma
    terms = [z * s2 - y * s2, (12 * z - 6 * y) * sigma, 132 * z - 30 * y]
    return 4 * torch.stack(terms)


def _buffered_jet(sigma: Tensor, r: Tensor) -> Tensor:
    """Potential per epsilon and its derivatives in sigma ``(3, sigma, r)``."""
    near = r + DELTA * sigma
    a = ((1 + DELTA) * sigma / near) ** 7
    slope = r / (sigma * near)
    a1 = 7 * a * slope
    a2 = a * (49 * slope**2 + 7 * ((DELTA / near) ** 2 - sigma**-2))
    y = (sigma / r) ** 7
    y1, y2 = 7 * y / sigma, 42 * y / sigma**2
    bottom = 1 + GAMMA * y
    b = (1 + GAMMA) * y / bottom - 2
    b1 = (1 + GAMMA) * y1 / bottom**2
    b2 = (1 + GAMMA) * (y2 / bottom**2 - 2 * GAMMA * y1**2 / bottom**3)
    return torch.stack([a * b, a1 * b + a * b1, a2 * b + 2 * a1 * b1 + a * b2])


# Arrays, since a tensor made inside a torch.func transform must not outlive it.
@functools.lru_cache(maxsize=16)
def _nodes(cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints up to 20 nm, and weights: step, r^2 and what the taper removes."""
    start, end = TAPER * cutoff, 20.0
    n = int(200 * (end - start))
    width = (end - start) / n
    r = start - 0.5 * width + np.arange(1, n + 1) * width
    t = np.clip((r - start) / (cutoff - start), 0.0, 1.0)
    removed = t**3 * (10 - t * (15 - 6 * t))
    return r, width * r * r * removed


def _classes(sigma: Tensor, epsilon: Tensor) -> Tensor:
    """Which particles have the same parameters in every row: ``(N, classes)`` of 0 and 1."""
    _, label = torch.unique(torch.cat([sigma, epsilon]), dim=1, return_inverse=True)
    n = int(label.max()) + 1 if label.numel() else 0
    return torch.nn.functional.one_hot(label, n)
