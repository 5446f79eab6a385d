"""Sums of r^-12 and r^-6 over pairs of Lennard-Jones types, frame by frame.

At fixed positions a Lennard-Jones energy is linear in ``4 eps sigma^12`` and ``4 eps sigma^6`` of
each pair of types, whatever the cutoff, the switching function and the dispersion correction. The
sums that multiply them make it a function of the types' parameters alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.ensembles.per_frame import forward_jacobian, per_frame_gradients
from mdgraft.frames import Frames
from mdgraft.potentials import Potential
from mdgraft.potentials.geometry import displacement
from mdgraft.potentials.nonbonded import Method, Nonbonded, NonbondedSettings
from mdgraft.potentials.pair_forms import root_epsilon

#: Sigmas [nm] that leave little but attraction, and little but repulsion.
_SIGMAS = (0.05, 1.0)
#: Weight of all other types beside one: small, since it is subtracted again, but not zero, where
#: the square root of epsilon has no derivative.
_FAINT = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LennardJonesSums:
    """Lennard-Jones energies of F frames as a function of P parameters.

    ``E = sum_m 4 eps_m (sigma_m^12 s12_m - sigma_m^6 s6_m)``, where m counts M pairs of types and
    their parameters follow from those of T types, which are ``constant + slope . parameters``.

    Attributes
    ----------
    sigma, epsilon
        ``(T,)`` constants [nm], [kJ/mol].
    sigma_slope, epsilon_slope
        ``(T, P)``.
    first, second
        ``(M,)`` types of each pair.
    mixed
        Whether the Lorentz-Berthelot rules combine the types of a pair; if not, ``first`` alone
        counts.
    s12, s6
        ``(F, M)`` [nm^-12], [nm^-6].
    """

    sigma: Tensor
    epsilon: Tensor
    sigma_slope: Tensor
    epsilon_slope: Tensor
    first: Tensor
    second: Tensor
    mixed: bool
    s12: Tensor
    s6: Tensor

    def energies(self, parameters: Tensor) -> Tensor:
        """Energies ``(F,)`` [kJ/mol] at parameters ``(P,)``."""
        repulsion, attraction = self._coefficients(parameters)
        energies: Tensor = self.s12 @ repulsion - self.s6 @ attraction
        return energies

    def gradients(self, parameters: Tensor) -> Tensor:
        """Derivatives ``(F, P)`` of the energies."""
        repulsion, attraction = torch.func.jacrev(self._coefficients)(parameters)
        slopes: Tensor = self.s12 @ repulsion - self.s6 @ attraction
        return slopes

    def _coefficients(self, parameters: Tensor) -> Tensor:
        """``4 eps sigma^12`` and ``4 eps sigma^6`` of each pair, ``(2, M)``."""
        sigma = self.sigma + self.sigma_slope @ parameters
        epsilon = self.epsilon + self.epsilon_slope @ parameters
        a, b = self.first, self.second
        if self.mixed:
            root = root_epsilon(epsilon)
            s, e = 0.5 * (sigma[a] + sigma[b]), root[a] * root[b]
        else:
            s, e = sigma[a], epsilon[a]
        x = (s * s) ** 3
        return torch.stack([4 * e * x * x, 4 * e * x])

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> LennardJonesSums:
        """Select frames."""
        return dataclasses.replace(self, s12=self.s12[index], s6=self.s6[index])


def lennard_jones_parameters(potential: Potential) -> set[str]:
    """Names ``<term>.<parameter>`` that `lennard_jones_sums` accounts for."""
    names = ("sigma", "epsilon", "exception_sigma", "exception_epsilon")
    return {f"{term}.{name}" for term, _ in _terms(potential) for name in names}


def lennard_jones_sums(
    potential: Potential, frames: Frames, names: Sequence[str], *, batch_size: int | None = None
) -> list[LennardJonesSums]:
    """Sums for every nonbonded term whose sigma or epsilon depend on the named parameters.

    Pairs of types that do not depend on them are left out. The term itself is differentiated, a
    few times for each type that does, so that all its options count.

    Parameters
    ----------
    potential
        The potential, in double precision.
    frames
        F frames.
    names
        Names of parameters; P counts their scalars, in this order, each flattened.
    batch_size
        Frames that are evaluated at a time.

    Raises
    ------
    InvalidInputError
        If Lennard-Jones interactions have a reciprocal-space sum, or if parameter offsets change
        sigma or epsilon.
    """
    found = []
    for term_name, term in _terms(potential):
        types = _types(potential, f"{term_name}.", names, frames)
        if types is not None:
            _check(term_name, term, "particle_offset")
            if term.settings.method is Method.LJPME:
                raise InvalidInputError(
                    f"names: sigma and epsilon of {term_name!r} also count in the reciprocal-space "
                    "sum of LJPME, which has no such form; evaluate the potential instead "
                    "(mdgraft.Ensemble)"
                )
            if term.settings.include_direct:
                found.append(_of_particles(potential, term, frames, types, batch_size))
        types = _types(potential, f"{term_name}.exception_", names, frames)
        if types is not None and term.settings.include_direct:
            _check(term_name, term, "exception_offset")
            found.append(_of_exceptions(potential, term, frames, types))
    return found


def _terms(potential: Potential) -> Iterator[tuple[str, Nonbonded]]:
    for name in potential.term_names:
        term = potential.term(name)
        if isinstance(term, Nonbonded):
            yield name, term


def _check(name: str, term: Nonbonded, kind: str) -> None:
    """Raise if parameter offsets change sigma or epsilon."""
    for quantity in ("sigma", "epsilon"):
        scale = term.parameter_values().get(f"{kind}_{quantity}_scale")
        if scale is not None and bool((scale != 0).any()):
            raise InvalidInputError(
                f"names: {quantity} of {name!r} has parameter offsets, which have no such form; "
                "add them to the parameters themselves, or evaluate the potential instead "
                "(mdgraft.Ensemble)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Types:
    """Rows that differ among n pairs of sigma and epsilon, as functions of P parameters.

    ``constants`` is ``(T, 2)``, ``slopes`` ``(T, 2, P)``, both for sigma and epsilon; ``kinds``
    ``(n,)`` counts the rows, -1 for those that never interact.
    """

    constants: Tensor
    slopes: Tensor
    kinds: Tensor

    @property
    def varying(self) -> Tensor:
        """Types that depend on the parameters."""
        return (self.slopes != 0).flatten(1).any(dim=1).nonzero().squeeze(-1)


def _types(
    potential: Potential, prefix: str, names: Sequence[str], frames: Frames
) -> _Types | None:
    """The types of particles or exceptions; None if none depends on the parameters."""
    keys = [f"{prefix}sigma", f"{prefix}epsilon"]

    def quantities(_: Frames) -> tuple[Tensor, ...]:
        values = potential.values()
        return (torch.stack([values[key] for key in keys], dim=-1)[None],)

    (slopes,) = (part[0] for part in forward_jacobian(potential, quantities, frames[:1], names))
    named = dict(potential.named_parameters())
    point = torch.cat([named[name].detach().reshape(-1) for name in names])
    (values,) = (part[0].detach() for part in quantities(frames))
    constants = values - slopes @ point
    # A multiple of a parameter has no constant, up to rounding.
    constants = torch.where(constants.abs() <= 1e-13 * values.abs(), 0.0, constants)
    n_scalars = len(point)
    rows, kinds = torch.unique(
        torch.cat([constants, slopes.flatten(1)], dim=1), dim=0, return_inverse=True
    )
    silent = (rows[:, 1] == 0) & (rows[:, 2 + n_scalars :] == 0).all(dim=1)
    place = torch.cumsum((~silent).long(), dim=0) - 1
    rows, place = rows[~silent], torch.where(silent, -1, place)
    types = _Types(
        constants=rows[:, :2],
        slopes=rows[:, 2:].reshape(-1, 2, n_scalars),
        kinds=place[kinds],
    )
    return types if len(types.varying) else None


def _sums(
    types: _Types, first: Tensor, second: Tensor, s12: Tensor, s6: Tensor, *, mixed: bool
) -> LennardJonesSums:
    return LennardJonesSums(
        sigma=types.constants[:, 0],
        epsilon=types.constants[:, 1],
        sigma_slope=types.slopes[:, 0],
        epsilon_slope=types.slopes[:, 1],
        first=first,
        second=second,
        mixed=mixed,
        s12=s12,
        s6=s6,
    )


def _of_particles(
    potential: Potential, term: Nonbonded, frames: Frames, types: _Types, batch_size: int | None
) -> LennardJonesSums:
    """With one sigma for all, E = w . L w, where w are the roots of the types' epsilon.

    Two sigmas part the powers in L, and its rows are slopes at suitable w.
    """
    varying, n_types = types.varying.tolist(), len(types.constants)
    probe = _uncharged(potential, term)
    members = (types.kinds == torch.arange(n_types, device=types.kinds.device)[:, None]).unbind()
    for t, mask in enumerate(members):
        probe.tie(f"type_{t}", {"lj.epsilon": mask}, value=1.0)
    tied = [f"tied.type_{t}" for t in range(n_types)]

    def slopes(weights: Tensor) -> Tensor:
        """``2 L w``, ``(F, T)``."""
        with torch.no_grad():
            for name, weight in zip(tied, weights, strict=True):
                probe.get_parameter(name).copy_(weight**2)
        # d/dw = 2 w d/d epsilon.
        return 2 * weights * per_frame_gradients(probe, frames, tied, batch_size=batch_size)

    every = torch.ones(n_types, dtype=torch.float64, device=types.constants.device)
    parts = []
    for sigma in _SIGMAS:
        with torch.no_grad():
            probe.get_parameter("lj.sigma").fill_(sigma)
        total = slopes(every)
        if n_types == 1:
            rows = [total]
        else:
            rows = []
            for a in varying:
                weights = _FAINT * every
                weights[a] += 1.0
                rows.append(slopes(weights) - _FAINT * total)
        parts.append(torch.stack(rows, dim=1) / (8 * sigma**6))
    # E / 4 sigma^6 = sigma^6 s12 - s6, for each entry of L.
    x, y = (sigma**6 for sigma in _SIGMAS)
    s12 = (parts[1] - parts[0]) / (y - x)
    s6 = x * s12 - parts[0]
    pairs = [
        (row, b, a)
        for row, a in enumerate(varying)
        for b in range(n_types)
        if b >= a or b not in varying
    ]
    row, second, first = torch.tensor(pairs, device=types.kinds.device).unbind(-1)
    # Both orders of a pair are in L.
    count = torch.where(first == second, 1.0, 2.0)
    s12, s6 = count * s12[:, row, second], count * s6[:, row, second]
    return _sums(types, first, second, s12, s6, mixed=True)


def _uncharged(potential: Potential, term: Nonbonded) -> Potential:
    """The Lennard-Jones interactions of a term's particles, without its exceptions' own."""
    settings: NonbondedSettings = term.settings
    if settings.method.periodic:
        settings = dataclasses.replace(settings, method=Method.CUTOFF_PERIODIC)
    values = {name: value.detach() for name, value in term.parameter_values().items()}
    nothing, excluded = (
        torch.zeros_like(values["sigma"]),
        torch.zeros_like(values["exception_sigma"]),
    )
    lj = Nonbonded(
        charge=nothing,
        sigma=nothing.clone(),
        epsilon=nothing.clone(),
        exceptions=term.exceptions,
        exception_charge_product=excluded,
        exception_sigma=excluded + 1.0,
        exception_epsilon=excluded.clone(),
        settings=settings,
        switching_distance=values.get("switching_distance"),
        reaction_field_dielectric=nothing.new_ones(()),
    )
    sites = potential._modules["sites"]
    return Potential({"lj": lj}, n_particles=potential.n_particles, sites=sites)


def _of_exceptions(
    potential: Potential, term: Nonbonded, frames: Frames, types: _Types
) -> LennardJonesSums:
    varying = types.varying
    chosen = torch.isin(types.kinds, varying).nonzero().squeeze(-1)
    i, j = term.exceptions[chosen].unbind(-1)
    sites = potential._modules["sites"]
    parts = []
    for batch in frames.batches(max(1, 2**20 // max(3 * frames.n_particles, len(chosen)))):
        x = batch.positions if sites is None else sites(batch.positions, batch.box)
        cell = batch.box if term.settings.exceptions_periodic else None
        inverse = displacement(x, cell, i, j).square().sum(dim=-1) ** -3
        sums = inverse.new_zeros(2, len(batch), len(types.constants))
        parts.append(
            sums.index_add(2, types.kinds[chosen], torch.stack([inverse * inverse, inverse]))
        )
    s12, s6 = torch.cat(parts, dim=1)[:, :, varying].detach()
    return _sums(types, varying, varying, s12, s6, mixed=False)
