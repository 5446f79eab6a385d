"""Permanent multipoles and induced dipoles of AMOEBA."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import CHARGE, COULOMB, DIMENSIONLESS
from mdgraft.kernels.implicit import linear_solve, response_form
from mdgraft.kernels.multipole_pme import MultipoleMesh
from mdgraft.kernels.pairs import Pairs, all_pairs, neighbor_pairs
from mdgraft.kernels.periodic import volume
from mdgraft.potentials.amoeba.frames import LocalAxes, local_frames
from mdgraft.potentials.amoeba.generalized_kirkwood import (
    ReactionField,
    Solvation,
    cavity_energy,
    effective_radii,
)
from mdgraft.potentials.amoeba.interactions import (
    Moments,
    Radial,
    both_ways,
    coulomb_radial,
    dipole_field,
    ewald_radial,
    multipole_energy,
    multipole_field,
)
from mdgraft.potentials.term import AbstractTerm

_FAILURE = (
    "polarizability: the induced dipoles have no stable solution (a polarization catastrophe); "
    "polarizable sites are too close, or their Thole factors too weak"
)


class Polarization(enum.Enum):
    """How induced dipoles act on one another."""

    DIRECT = "direct"
    MUTUAL = "mutual"
    EXTRAPOLATED = "extrapolated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipoleSettings:
    """Constants of a multipole term.

    Attributes
    ----------
    polarization
        How induced dipoles act on one another.
    extrapolation
        Coefficients of the sums of perturbation theory up to each order, for ``EXTRAPOLATED``.
    cutoff
        [nm] of the sum in direct space; infinite without Ewald sums.
    alpha, grid
        Ewald splitting parameter [1/nm] and mesh; None without Ewald sums.
    """

    polarization: Polarization
    extrapolation: tuple[float, ...] = ()
    cutoff: float = math.inf
    alpha: float | None = None
    grid: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class ScaledPairs:
    """Pairs whose interactions are scaled; all others count in full.

    Attributes
    ----------
    keys
        ``(pairs,)`` sorted, ``lower * N + upper``.
    scale
        ``(pairs, 3)`` of permanent multipoles with one another, and of the fields that induce the
        dipoles "d" and "p".
    """

    keys: Tensor
    scale: Tensor


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """What pairs contribute, in one evaluation."""

    positions: Tensor
    box: Tensor | None
    pairs: Pairs
    vectors: Tensor
    energy: Radial
    fields: tuple[Radial, Radial]
    mutual: Radial
    mesh: MultipoleMesh | None
    #: Factors of induced dipoles in their reaction field, of pairs and of each site with itself.
    reaction: tuple[Radial, Radial] | None = None


class Multipoles(AbstractTerm):
    r"""Charges, dipoles and quadrupoles in local frames, and the dipoles that they induce.

    U = sum_pairs m M_i T M_j - sum_i (mu_d . E_p + mu_p . E_d) / 4, with mu = alpha (E + T mu) for
    each of two fields E, which leave out the neighbours of a site in different ways. Fields and
    mutual induction are damped at short distance by Thole's functions of (r / (a_i a_j))^3.

    Mutual induced dipoles are solved once, by conjugate gradients, and differentiated implicitly:
    derivatives of the energy are exact to the second order. Extrapolated ones are differentiated
    as they are computed.

    Parameters
    ----------
    charge
        ``(N,)`` [e].
    dipole, quadrupole
        ``(N, 3)`` [e nm] and ``(N, 3, 3)`` [e nm^2] in the frames of the particles. Quadrupoles
        must be traceless and symmetric; what is below their diagonals does not count.
    thole, damping_factor
        ``(N,)``, dimensionless and [nm^(1/2)].
    polarizability
        ``(N,)`` [nm^3].
    axes
        Local frames.
    scaled
        Pairs that do not count in full.
    settings
        Polarization and its constants.
    solvent
        Name of the term that holds the parameters of an implicit solvent, and its constants; None
        in vacuum and with Ewald sums.

    References
    ----------
    P. Ren and J. W. Ponder, J. Phys. Chem. B 107, 5933 (2003); Ewald sums: C. Sagui, L. G. Pedersen
    and T. A. Darden, J. Chem. Phys. 120, 73 (2004); extrapolation: A. C. Simmonett et al., J. Chem.
    Phys. 145, 164101 (2016).
    """

    kind: Tensor
    keys: Tensor
    scale: Tensor

    def __init__(
        self,
        charge: Tensor,
        dipole: Tensor,
        quadrupole: Tensor,
        thole: Tensor,
        damping_factor: Tensor,
        polarizability: Tensor,
        *,
        axes: LocalAxes,
        scaled: ScaledPairs,
        settings: MultipoleSettings,
        solvent: tuple[str, Solvation] | None = None,
    ) -> None:
        super().__init__(periodic=settings.grid is not None)
        self.settings = settings
        self.solvent = solvent
        if solvent is not None:
            self.borrows = (solvent[0],)
        for field in dataclasses.fields(axes):
            self.register_buffer(f"axis_{field.name}", getattr(axes, field.name))
        self.register_buffer("keys", scaled.keys)
        self.register_buffer("scale", scaled.scale)
        self.add_parameter("charge", charge, CHARGE)
        self.add_parameter("dipole", dipole, f"{CHARGE}*nanometer")
        self.add_parameter("quadrupole", quadrupole, f"{CHARGE}*nanometer**2")
        self.add_parameter("thole", thole, DIMENSIONLESS)
        self.add_parameter("damping_factor", damping_factor, "nanometer**(1/2)")
        self.add_parameter("polarizability", polarizability, "nanometer**3")

    @property
    def axes(self) -> LocalAxes:
        """Local frames."""
        return LocalAxes(*(getattr(self, f"axis_{f.name}") for f in dataclasses.fields(LocalAxes)))

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)``."""
        at = self._geometry(positions, box, values)
        whole, traceless = self._moments(positions, values)
        energy = self._permanent(at, whole, traceless)
        # What solves for the dipoles, and what they act on: OpenMM takes the trace differently.
        inducing, acting = self._fields(at, whole, whole), self._fields(at, whole, traceless)
        response = values["polarizability"][:, None] / COULOMB
        if self.solvent is not None:
            # OpenMM adds what the solvent changes to the energy in vacuum, but takes the trace in
            # these two differently: a trifle, whose derivative in a quadrupole is not.
            energy = energy + self._solvated(at, inducing, whole, response, values)
            acting = acting[0] - inducing[0], acting[1] - inducing[1]
        return energy + self._polarization(at, inducing, acting, response)

    # Pairs ---------------------------------------------------------------------------------------

    def _geometry(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]
    ) -> _Geometry:
        settings, n = self.settings, positions.shape[1]
        nothing = torch.empty(0, dtype=torch.long, device=positions.device)
        if settings.grid is None:
            pairs, box = all_pairs(n, nothing), None
        else:
            pairs = neighbor_pairs(positions, box, cutoff=settings.cutoff, excluded=nothing)
        vectors = pairs.displacements(positions, box)
        r_squared = vectors.square().sum(dim=-1)
        counts = r_squared <= settings.cutoff**2
        r_squared = torch.where(counts, r_squared, 1.0)
        bare = coulomb_radial(r_squared, 5)
        mesh = None
        if settings.grid is None:
            base = bare
        else:
            assert settings.alpha is not None and box is not None
            base = ewald_radial(r_squared, 5, settings.alpha)
            mesh = MultipoleMesh(positions, box, alpha=settings.alpha, grid=settings.grid)

        def radial(first: int, factors: tuple[Tensor | float, ...]) -> Radial:
            """Screened factors, where ``factors`` of the bare ones remain."""
            terms = zip(base[first:], bare[first:], factors, strict=False)
            return tuple(
                torch.where(counts, COULOMB * (b + (factor - 1) * c), 0.0) for b, c, factor in terms
            )

        damping = _thole(r_squared, pairs, values["thole"], values["damping_factor"])
        m, d, p = self._scale(pairs).to(positions.dtype).unbind(dim=-1)
        return _Geometry(
            positions,
            box,
            pairs,
            vectors,
            radial(0, (m,) * 5),
            (radial(1, tuple(d * x for x in damping)), radial(1, tuple(p * x for x in damping))),
            radial(1, damping[:2]),
            mesh,
        )

    def _scale(self, pairs: Pairs) -> Tensor:
        """Scale factors of each pair ``(pairs, 3)``."""
        n = self.axes.kind.shape[0]
        ones = self.scale.new_ones(pairs.first.shape[0], 3)
        if not self.keys.numel():
            return ones
        key = torch.minimum(pairs.first, pairs.second) * n + torch.maximum(
            pairs.first, pairs.second
        )
        place = torch.searchsorted(self.keys, key).clamp(max=self.keys.numel() - 1)
        return torch.where((self.keys[place] == key)[:, None], self.scale[place], ones)

    # Implicit solvent ---------------------------------------------------------------------------

    def _solvated(
        self,
        at: _Geometry,
        fields: tuple[Tensor, Tensor],
        moments: Moments,
        response: Tensor,
        values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of the reaction field, and of dipoles that are induced in its presence."""
        assert self.solvent is not None
        name, solvation = self.solvent
        outer = self.inner_values(name, values)
        born = effective_radii(at.positions, at.pairs, outer, solvation)
        i, j = at.pairs.first, at.pairs.second
        r_squared = at.vectors.square().sum(dim=-1)
        dielectric = outer["solvent_dielectric"]
        products = at.pairs.at(born, i) * at.pairs.at(born, j)
        pairs = ReactionField.of(r_squared, products, dielectric)
        own = ReactionField.of(torch.zeros_like(born), born * born, dielectric)

        first, second = moments.at(at.pairs, i), moments.at(at.pairs, j)
        both = pairs.energy(first, second, at.vectors) + pairs.energy(second, first, -at.vectors)
        energy = at.pairs.sum(0.5 * both, at.positions.shape[0])
        nowhere = torch.zeros_like(at.positions)
        energy = energy + 0.5 * own.energy(moments, moments, nowhere).sum(dim=-1)
        if solvation.cavity:
            energy = energy + cavity_energy(outer, born)
        field = own.field(moments, nowhere) + both_ways(
            at.pairs,
            pairs.field(second, -at.vectors),
            pairs.field(first, at.vectors),
            at.positions,
        )
        inside = dataclasses.replace(at, reaction=(pairs.of_dipoles(), own.of_dipoles()))
        total = fields[0] + field, fields[1] + field
        return energy + self._polarization(inside, total, total, response)

    # Permanent multipoles ------------------------------------------------------------------------

    def _moments(self, positions: Tensor, values: Mapping[str, Tensor]) -> tuple[Moments, Moments]:
        """Multipoles in the frame of the coordinates; as they are, and with the trace removed.

        The trace is taken from xx and yy: zz, xx - yy and what is off the diagonal stay. What zz
        stands for needs the axis z only, so that it is whole in linear molecules as well.
        """
        frames = local_frames(positions, self.axes)
        turned = frames.transpose(-1, -2)
        dipole = torch.einsum("fnka,nk->fna", frames, values["dipole"])
        given = values["quadrupole"]
        upper = torch.triu(given)
        whole = upper + torch.triu(given, 1).transpose(-1, -2)
        trace = torch.diagonal(given, dim1=-2, dim2=-1).sum(dim=-1)
        zz = given[..., 2, 2]
        removed = torch.zeros_like(given) + torch.diag_embed(
            0.5 * torch.stack([trace - zz, trace - zz, 2 * zz], dim=-1)
        )
        z = frames[..., 2, :]
        around = 1.5 * z.unsqueeze(-1) * z.unsqueeze(-2) - 0.5 * torch.eye(3).to(z)
        charge = values["charge"]
        return (
            Moments(charge, dipole, turned @ whole @ frames),
            Moments(
                charge,
                dipole,
                turned @ (whole - removed) @ frames + zz[..., None, None] * around,
            ),
        )

    def _permanent(self, at: _Geometry, whole: Moments, traceless: Moments) -> Tensor:
        pairs, n_frames = at.pairs, at.positions.shape[0]
        first, second = traceless.at(pairs, pairs.first), traceless.at(pairs, pairs.second)
        energies = multipole_energy(first, second, at.vectors, at.energy)
        energy = pairs.sum(energies, n_frames)
        if at.mesh is None:
            return energy
        alpha = self.settings.alpha
        assert alpha is not None and at.box is not None
        spectrum = at.mesh.spread(whole.charge, whole.dipole, whole.quadrupole)
        energy = energy + 0.5 * at.mesh.energy(spectrum, spectrum)
        squared = (
            whole.charge.square().sum()
            + 2 / 3 * alpha**2 * whole.dipole.square().sum(dim=(-2, -1))
            + 8 / 5 * alpha**4 * traceless.quadrupole.square().sum(dim=(-3, -2, -1))
        )
        energy = energy - COULOMB * alpha / math.sqrt(math.pi) * squared
        background = 0.5 * math.pi * COULOMB / alpha**2 * whole.charge.sum() ** 2
        return energy - background / volume(at.box)

    def _fields(self, at: _Geometry, smooth: Moments, close: Moments) -> tuple[Tensor, Tensor]:
        """Fields "d" and "p" of the permanent multipoles ``(frames, N, 3)`` [kJ/mol/nm/e].

        ``smooth`` ones are on the mesh, ``close`` ones in pairs.
        """
        first, second = close.at(at.pairs, at.pairs.first), close.at(at.pairs, at.pairs.second)
        long_range: Tensor | float = 0.0
        if at.mesh is not None:
            spectrum = at.mesh.spread(smooth.charge, smooth.dipole, smooth.quadrupole)
            long_range = at.mesh.field(spectrum) + self._own(smooth.dipole)
        found = [
            long_range
            + both_ways(
                at.pairs,
                multipole_field(second, -at.vectors, k),
                multipole_field(first, at.vectors, k),
                at.positions,
            )
            for k in at.fields
        ]
        return found[0], found[1]

    def _own(self, dipole: Tensor) -> Tensor:
        """Field that takes back what a dipole on the mesh does to itself."""
        assert self.settings.alpha is not None
        return 4 / 3 * COULOMB * self.settings.alpha**3 / math.sqrt(math.pi) * dipole

    # Induced dipoles -----------------------------------------------------------------------------

    def _interaction(self, at: _Geometry, dipole: Tensor) -> Tensor:
        """Field of induced dipoles at the sites of the others."""
        pairs = at.pairs
        first, second = pairs.at(dipole, pairs.first), pairs.at(dipole, pairs.second)
        field = both_ways(
            pairs,
            dipole_field(second, at.vectors, at.mutual),
            dipole_field(first, at.vectors, at.mutual),
            at.positions,
        )
        if at.mesh is not None:
            field = field + at.mesh.field(at.mesh.spread(None, dipole)) + self._own(dipole)
        if at.reaction is not None:
            between, own = at.reaction
            field = field - own[0][..., None] * dipole
            field = field + both_ways(
                pairs,
                dipole_field(second, at.vectors, between),
                dipole_field(first, at.vectors, between),
                at.positions,
            )
        return field

    def _polarization(
        self,
        at: _Geometry,
        inducing: tuple[Tensor, Tensor],
        acting: tuple[Tensor, Tensor],
        response: Tensor,
    ) -> Tensor:
        if self.settings.polarization is Polarization.MUTUAL:
            return self._mutual(at, inducing, acting, response)
        energy = at.positions.new_zeros(at.positions.shape[0])
        for field, other in zip(inducing, reversed(acting), strict=True):
            dipole = response * field
            if self.settings.polarization is Polarization.EXTRAPOLATED:
                dipole = self._extrapolated(at, dipole, response)
            energy = energy - 0.25 * (dipole * other).sum(dim=(-2, -1))
        return energy

    def _extrapolated(self, at: _Geometry, dipole: Tensor, response: Tensor) -> Tensor:
        """Combination of the orders of perturbation theory, from the dipoles of order zero."""
        coefficients = self.settings.extrapolation
        total = torch.zeros_like(dipole)
        for order in range(len(coefficients)):
            if order:
                dipole = response * self._interaction(at, dipole)
            total = total + sum(coefficients[order:]) * dipole
        return total

    def _mutual(
        self,
        at: _Geometry,
        inducing: tuple[Tensor, Tensor],
        acting: tuple[Tensor, Tensor],
        response: Tensor,
    ) -> Tensor:
        r"""Energy that is stationary in the local fields m = E + T a m, so that they need no graph.

        For each pair of fields, E and E', -(m.aE' + n.aE - n.am + an.Tam)/4 with n for E'.
        """
        tensors, operator = self._operator(at, response)
        root, frozen = tensors[0], _frozen(at)

        def relaxed(field: Tensor, reference: Tensor) -> Tensor:
            solution = linear_solve(
                operator,
                root * field,
                *tensors,
                failure=_FAILURE,
                reference=root * reference,
            )
            return field + self._interaction(frozen, root * solution)

        energy = at.positions.new_zeros(at.positions.shape[0])
        with torch.no_grad():
            plain = [field.detach() for field in (*inducing, *acting)]
            local = [relaxed(field, field) for field in plain[:2]]
            # They differ by rounding, unless quadrupoles have a trace.
            dual = [local[k] + relaxed(plain[2 + k] - plain[k], plain[k]) for k in range(2)]
        for k in range(2):
            m, n = local[k].detach(), dual[1 - k].detach()
            field, other = inducing[k], acting[1 - k]
            from_m, from_n = (self._interaction(at, response * x) for x in (m, n))
            work = response * (m * other + n * (field - m + from_m))
            energy = energy - 0.25 * work.sum(dim=(-2, -1))
            first, second = (
                root * residual for residual in (other + from_n - n, field + from_m - m)
            )
            form = response_form(operator, first, second, *tensors, failure=_FAILURE)
            energy = energy - 0.25 * form
        return energy

    def _operator(self, at: _Geometry, response: Tensor) -> tuple[tuple[Tensor, ...], _Induction]:
        """``1 - a^(1/2) T a^(1/2)``, and the constant tensors that it depends on."""
        pairs = at.pairs
        frame = () if pairs.frame is None else (pairs.frame,)
        box = () if at.box is None else (at.box,)
        root = torch.sqrt(response.detach())
        tensors = (root, at.positions, at.vectors, *at.mutual, pairs.first, pairs.second)
        reaction = () if at.reaction is None else (*at.reaction[0], *at.reaction[1])
        detached = tuple(tensor.detach() for tensor in (*tensors, *frame, *box, *reaction))
        return detached, _Induction(self, bool(frame), bool(box))


@dataclasses.dataclass(frozen=True)
class _Induction:
    """The operator of mutual induction for `linear_solve`."""

    term: Multipoles
    by_frame: bool
    has_box: bool

    def __call__(self, *tensors: Tensor) -> _Induced:
        root, positions, vectors, k3, k5, first, second, *rest = tensors
        frame = rest.pop(0) if self.by_frame else None
        box = rest.pop(0) if self.has_box else None
        pairs = Pairs(first=first, second=second, frame=frame)
        settings, mesh = self.term.settings, None
        if settings.grid is not None:
            assert settings.alpha is not None and box is not None
            mesh = MultipoleMesh(positions, box, alpha=settings.alpha, grid=settings.grid)
        reaction = ((rest[0], rest[1]), (rest[2], rest[3])) if rest else None
        at = _Geometry(positions, box, pairs, vectors, (), ((), ()), (k3, k5), mesh, reaction)
        return _Induced(self.term, at, root)


@dataclasses.dataclass(frozen=True)
class _Induced:
    term: Multipoles
    at: _Geometry
    root: Tensor

    def __call__(self, vector: Tensor) -> Tensor:
        return vector - self.root * self.term._interaction(self.at, self.root * vector)


def _frozen(at: _Geometry) -> _Geometry:
    """The same for induced dipoles, without derivatives."""
    return dataclasses.replace(
        at,
        positions=at.positions.detach(),
        vectors=at.vectors.detach(),
        mutual=tuple(k.detach() for k in at.mutual),
        reaction=None
        if at.reaction is None
        else (
            tuple(k.detach() for k in at.reaction[0]),
            tuple(k.detach() for k in at.reaction[1]),
        ),
    )


def _thole(r_squared: Tensor, pairs: Pairs, thole: Tensor, damping_factor: Tensor) -> Radial:
    """Damping of the radial factors of 1/r^3, 1/r^5 and 1/r^7 (Ren and Ponder (2003), eq. 5)."""
    i, j = pairs.first, pairs.second
    size = damping_factor[i] * damping_factor[j]
    bare = size == 0
    ratio = torch.sqrt(r_squared) / torch.where(bare, 1.0, size)
    x = torch.minimum(thole[i], thole[j]) * ratio**3
    rest = torch.exp(-x)
    factors = (-torch.expm1(-x), 1 - (1 + x) * rest, 1 - (1 + x + 0.6 * x * x) * rest)
    return tuple(torch.where(bare, 1.0, factor) for factor in factors)
