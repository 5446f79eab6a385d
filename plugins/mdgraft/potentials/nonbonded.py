"""Lennard-Jones and Coulomb interactions in the six methods of OpenMM's NonbondedForce."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import CHARGE, CHARGE_SQUARED, COULOMB, DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.kernels.device.recording import side_by_side
from mdgraft.kernels.ewald import ewald_reciprocal
from mdgraft.kernels.mesh import mesh_coulomb, mesh_dispersion
from mdgraft.kernels.periodic import volume
from mdgraft.kernels.switch import compiled_kernels
from mdgraft.potentials import pair_forms
from mdgraft.potentials.direct_space import DirectSpace
from mdgraft.potentials.dispersion_tail import DispersionTail
from mdgraft.potentials.nonbonded_exceptions import NonbondedExceptions
from mdgraft.potentials.term import AbstractTerm


class Method(enum.Enum):
    """How interactions beyond the cutoff are treated."""

    NO_CUTOFF = "NoCutoff"
    CUTOFF_NON_PERIODIC = "CutoffNonPeriodic"
    CUTOFF_PERIODIC = "CutoffPeriodic"
    EWALD = "Ewald"
    PME = "PME"
    LJPME = "LJPME"

    @property
    def periodic(self) -> bool:
        """Whether a box is needed."""
        return self not in (Method.NO_CUTOFF, Method.CUTOFF_NON_PERIODIC)

    @property
    def ewald(self) -> bool:
        """Whether Coulomb interactions are summed in reciprocal space."""
        return self in (Method.EWALD, Method.PME, Method.LJPME)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonbondedSettings:
    """Constants of a nonbonded term.

    Attributes
    ----------
    method
        Treatment of long-range interactions.
    cutoff
        [nm]; unused without a cutoff.
    alpha, kmax, grid
        Ewald splitting parameter [1/nm], number of wave vectors (Ewald), grid (PME, LJPME).
    dispersion_alpha, dispersion_grid
        The same for the dispersion mesh of LJPME.
    dispersion_correction
        Whether the long-range tail of the Lennard-Jones interaction is added.
    exceptions_periodic
        Whether exceptions act between nearest periodic images.
    include_direct
        False leaves only the reciprocal-space sum.
    """

    method: Method
    cutoff: float = math.inf
    alpha: float = 0.0
    kmax: tuple[int, int, int] = (1, 1, 1)
    grid: tuple[int, int, int] = (6, 6, 6)
    dispersion_alpha: float = 0.0
    dispersion_grid: tuple[int, int, int] = (6, 6, 6)
    dispersion_correction: bool = False
    exceptions_periodic: bool = False
    include_direct: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offsets:
    """Parameter offsets: entry ``target`` grows by ``global_value * scale`` in three quantities.

    Attributes
    ----------
    target
        ``(n,)`` index of the particle or exception.
    parameter
        ``(n,)`` index into the term's list of global parameters.
    scales
        ``(n, 3)`` for charge (or charge product), sigma, epsilon.
    active
        ``(n,)`` False for an offset that a later one with the same target and parameter replaces.
    """

    target: Tensor
    parameter: Tensor
    scales: Tensor
    active: Tensor


@dataclasses.dataclass(frozen=True)
class _Made:
    """What was made for a list of exceptions."""

    exceptions: Tensor
    version: int
    pairs: DirectSpace
    others: NonbondedExceptions


_PARTICLE = ("charge", "sigma", "epsilon")
_EXCEPTION = ("exception_charge_product", "exception_sigma", "exception_epsilon")
# The quantities that each kind of offset changes.
_OFFSETS = {
    "particle_offset": ("charge", "sigma", "epsilon"),
    "exception_offset": ("charge_product", "sigma", "epsilon"),
}


class Nonbonded(AbstractTerm):
    """Lennard-Jones and Coulomb interactions between all pairs, with exceptions.

    Lorentz-Berthelot combination for pairs; exceptions carry parameters of their own. Parameters
    grow with global parameters through offsets. Excluded pairs are exceptions whose charge product
    and epsilon are zero; their gradient is the true one, so freeze ``exception_*`` unless they are
    meant to change.

    Parameters
    ----------
    charge, sigma, epsilon
        ``(N,)`` [e], [nm], [kJ/mol].
    exceptions
        ``(exceptions, 2)`` particle indices.
    exception_charge_product, exception_sigma, exception_epsilon
        ``(exceptions,)`` [e^2], [nm], [kJ/mol].
    settings
        Method and its constants.
    switching_distance
        ``()`` [nm], or None without a switching function.
    reaction_field_dielectric
        ``()``, used by the cutoff methods.
    global_names, global_defaults
        Names and declared defaults ``(globals,)`` of the global parameters that offsets refer to.
        As in OpenMM the dispersion correction sees the declared defaults, not present values.
    particle_offsets, exception_offsets
        Parameter offsets, or None.
    """

    replays = True

    exceptions: Tensor
    global_defaults: Tensor

    def __init__(
        self,
        charge: Tensor,
        sigma: Tensor,
        epsilon: Tensor,
        *,
        exceptions: Tensor,
        exception_charge_product: Tensor,
        exception_sigma: Tensor,
        exception_epsilon: Tensor,
        settings: NonbondedSettings,
        switching_distance: Tensor | None = None,
        reaction_field_dielectric: Tensor | None = None,
        global_names: tuple[str, ...] = (),
        global_defaults: Tensor | None = None,
        particle_offsets: Offsets | None = None,
        exception_offsets: Offsets | None = None,
    ) -> None:
        super().__init__(periodic=settings.method.periodic)
        self.settings = settings
        self.global_names = global_names
        self.register_buffer("exceptions", exceptions)
        defaults = charge.new_zeros(0) if global_defaults is None else global_defaults
        self.register_buffer("global_defaults", defaults)
        for name, value, unit in zip(
            (*_PARTICLE, *_EXCEPTION),
            (charge, sigma, epsilon, exception_charge_product, exception_sigma, exception_epsilon),
            (CHARGE, NANOMETER, ENERGY, CHARGE_SQUARED, NANOMETER, ENERGY),
            strict=True,
        ):
            self.add_parameter(name, value, unit)
        if switching_distance is not None:
            self.add_parameter("switching_distance", switching_distance, NANOMETER)
        if settings.method in (Method.CUTOFF_NON_PERIODIC, Method.CUTOFF_PERIODIC):
            if reaction_field_dielectric is None:
                raise InvalidInputError(
                    "reaction_field_dielectric: got None, but the cutoff methods need a number"
                )
            self.add_parameter(
                "reaction_field_dielectric", reaction_field_dielectric, DIMENSIONLESS
            )
        switched = switching_distance is not None
        # LJPME does not switch.
        self._switched = switched and settings.method is not Method.LJPME
        self._shared: tuple[str, ...] = ("switching_distance",) if self._switched else ()
        self._shared += ("reaction_field_dielectric",)
        self._tail: DispersionTail | None = None
        if settings.dispersion_correction and settings.method is not Method.LJPME:
            self._tail = DispersionTail(settings.cutoff)
        self._made: _Made | None = None
        self._n = charge.shape[0]
        self._add_offsets("particle_offset", particle_offsets)
        self._add_offsets("exception_offset", exception_offsets)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    def _sums(self) -> _Made:
        """Sums over pairs and exceptions, made anew when the exceptions have changed."""
        exceptions = self.exceptions
        version = 0 if exceptions.is_inference() else exceptions._version
        made = self._made
        if made is None or made.exceptions is not exceptions or made.version != version:
            made = _Made(
                exceptions=exceptions,
                version=version,
                pairs=DirectSpace(self.settings, exceptions, self._n, switched=self._switched),
                others=NonbondedExceptions(self.settings, exceptions),
            )
            self._made = made
        return made

    def _add_offsets(self, kind: str, offsets: Offsets | None) -> None:
        if offsets is None:
            return
        names = _OFFSETS[kind]
        for field in ("target", "parameter", "active"):
            self.register_buffer(f"{kind}_{field}", getattr(offsets, field))
        units = (CHARGE if names[0] == "charge" else CHARGE_SQUARED, NANOMETER, ENERGY)
        for name, scale, unit in zip(names, offsets.scales.unbind(-1), units, strict=True):
            self.add_parameter(f"{kind}_{name}_scale", scale.clone(), unit)

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        # In plain torch one list of pairs would have to serve all frames.
        return self.settings.method is not Method.EWALD and compiled_kernels(self.global_defaults)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        settings = self.settings
        present = self.global_defaults
        if self.global_names:
            present = torch.stack([global_values[name] for name in self.global_names])
        particle = [values[name] for name in _PARTICLE]
        charge, sigma, epsilon = self._offset("particle_offset", particle, values, present)
        sums = self._sums()
        parts: list[Callable[[], Tensor]] = []
        own: list[Tensor] = []
        if settings.include_direct:
            shared = [values[name] for name in self._shared if name in values]
            own = [values[name] for name in _EXCEPTION]
            own = self._offset("exception_offset", own, values, present)
            parts += [
                lambda: sums.pairs.energy(positions, box, charge, sigma, epsilon, shared),
                lambda: sums.others.interactions(positions, box, *own),
            ]
            if self._tail is not None:
                parts.append(lambda: self._correction(box, particle, values))
        else:
            # What only counts in direct space has zero derivatives, not missing ones.
            parts.append(lambda: _nothing(positions, values))
        if settings.method.ewald:
            assert box is not None
            parts.append(lambda: self._reciprocal(positions, box, charge, sigma, epsilon))
            if settings.include_direct:
                parts.append(lambda: -self._excluded(positions, box, charge, sigma, epsilon))
        read = (positions, box, charge, sigma, epsilon, present, *own, *values.values())
        found = side_by_side(positions, parts, (t for t in read if t is not None))
        return functools.reduce(torch.add, found)

    def _correction(
        self, box: Tensor | None, particle: list[Tensor], values: Mapping[str, Tensor]
    ) -> Tensor:
        """The long-range correction."""
        assert self._tail is not None
        assert box is not None
        # Every offset counts here, at the declared defaults.
        _, sigma, epsilon = self._offset(
            "particle_offset", particle, values, self.global_defaults, replaced=True
        )
        tail: Tensor = self._tail(sigma, epsilon, values.get("switching_distance"))
        return tail / volume(box)

    def _excluded(
        self, positions: Tensor, box: Tensor, charge: Tensor, sigma: Tensor, epsilon: Tensor
    ) -> Tensor:
        """What the reciprocal sum holds of pairs that do not interact."""
        c6 = None
        if self.settings.method is Method.LJPME:
            c6 = 2 * pair_forms.root_epsilon(epsilon) * sigma**3
        return self._sums().others.excluded(positions, box, charge, c6)

    def _offset(
        self,
        kind: str,
        base: list[Tensor],
        values: Mapping[str, Tensor],
        present: Tensor,
        *,
        replaced: bool = False,
    ) -> list[Tensor]:
        """Add the offsets to charge (product), sigma and epsilon."""
        target = self._buffers.get(f"{kind}_target")
        if target is None:
            return base
        parameter, active = self._buffers[f"{kind}_parameter"], self._buffers[f"{kind}_active"]
        assert parameter is not None and active is not None
        factor = present[parameter]
        if not replaced:
            factor = torch.where(active, factor, 0.0)
        scales = [values[f"{kind}_{name}_scale"] for name in _OFFSETS[kind]]
        return [
            quantity.index_add(0, target, factor * scale)
            for quantity, scale in zip(base, scales, strict=True)
        ]

    def _reciprocal(
        self, positions: Tensor, box: Tensor, charge: Tensor, sigma: Tensor, epsilon: Tensor
    ) -> Tensor:
        """Reciprocal-space sums with self-interaction and neutralising background."""
        settings = self.settings
        alpha = settings.alpha
        own = -COULOMB * alpha / math.sqrt(math.pi) * (charge * charge).sum()
        background = -0.5 * math.pi * COULOMB / alpha**2 * charge.sum() ** 2 / volume(box)
        energy = own + background
        if settings.method is Method.EWALD:
            return energy + ewald_reciprocal(
                positions, charge, box, alpha=alpha, kmax=settings.kmax
            )
        energy = energy + mesh_coulomb(positions, charge, box, alpha=alpha, grid=settings.grid)
        if settings.method is Method.LJPME:
            c6 = 2 * pair_forms.root_epsilon(epsilon) * sigma**3
            beta = settings.dispersion_alpha
            mesh = mesh_dispersion(positions, c6, box, alpha=beta, grid=settings.dispersion_grid)
            energy = energy + mesh + beta**6 / 12 * (c6 * c6).sum()
        return energy


def _nothing(positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    energy = 0.0 * positions.sum(dim=(-2, -1))
    for value in values.values():
        energy = energy + 0.0 * value.sum()
    return energy
