"""Virtual sites: particles whose positions are functions of other particles."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, MissingBoxError
from mdgraft.kernels.periodic import reciprocal
from mdgraft.potentials.geometry import direction, rescaled, vanishes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSite(abc.ABC):
    """How one virtual site follows from its parents.

    Attributes
    ----------
    parents
        Particle indices; they may be virtual sites themselves.
    """

    parents: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageSite(AbstractSite):
    """A weighted average of any number of particles, ``sum_p weights_p r_p``.

    Attributes
    ----------
    weights
        One for each parent.
    """

    weights: Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfPlaneSite(AbstractSite):
    """``r_1 + w_12 r_12 + w_13 r_13 + w_cross (r_12 x r_13)`` of three particles.

    Attributes
    ----------
    weight12, weight13
        Dimensionless.
    weight_cross
        [1/nm].
    """

    weight12: float
    weight13: float
    weight_cross: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalCoordinatesSite(AbstractSite):
    """A fixed place in the coordinate frame that any number of particles define.

    The frame's origin is ``sum_p origin_weights_p r_p``; its x axis lies along
    ``sum_p x_weights_p r_p``; its z axis along the vector product of that and
    ``sum_p y_weights_p r_p``. An axis without direction is left out.

    Attributes
    ----------
    origin_weights, x_weights, y_weights
        One for each parent.
    local_position
        Three coordinates [nm].
    """

    origin_weights: Sequence[float]
    x_weights: Sequence[float]
    y_weights: Sequence[float]
    local_position: Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetrySite(AbstractSite):
    """A rotated and shifted image of one particle, ``R r + v``.

    Attributes
    ----------
    rotation
        The rows of R.
    offset
        v [nm], or in units of the box vectors.
    fractional
        Whether R and v act on fractional coordinates, so that the site depends on the box.
    """

    rotation: Sequence[Sequence[float]]
    offset: Sequence[float]
    fractional: bool


class _AbstractGroup(nn.Module, abc.ABC):
    """Sites of one class, none of which depends on another one."""

    parents: Tensor

    def __init__(self, sites: Sequence[Any]) -> None:
        super().__init__()
        most = max(len(site.parents) for site in sites)
        # Shorter lists of parents are filled up with a parent of weight zero.
        rows = [[*site.parents, *[site.parents[0]] * (most - len(site.parents))] for site in sites]
        self.register_buffer("parents", torch.tensor(rows, dtype=torch.long))

    def _add_weights(self, name: str, rows: Sequence[Sequence[float]]) -> None:
        most = self.parents.shape[1]
        self._add_numbers(name, [[*row, *[0.0] * (most - len(row))] for row in rows])

    def _add_numbers(self, name: str, rows: Sequence[Any]) -> None:
        self.register_buffer(name, torch.tensor(rows, dtype=torch.float64))

    @abc.abstractmethod
    def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
        """Places of the sites ``(F, sites, 3)``."""


def _combined(positions: Tensor, parents: Tensor, weights: Tensor) -> Tensor:
    places = positions[:, parents]
    first = places[..., 0, :]
    # Relative to one parent, so that weights that add up to zero lose no digits.
    relative = (places - first.unsqueeze(-2)) * weights.unsqueeze(-1)
    combined: Tensor = relative.sum(dim=-2) + weights.sum(dim=-1, keepdim=True) * first
    return combined


class _Average(_AbstractGroup):
    weights: Tensor

    def __init__(self, sites: Sequence[AverageSite]) -> None:
        super().__init__(sites)
        self._add_weights("weights", [site.weights for site in sites])

    def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
        return _combined(positions, self.parents, self.weights)


class _OutOfPlane(_AbstractGroup):
    weights: Tensor

    def __init__(self, sites: Sequence[OutOfPlaneSite]) -> None:
        super().__init__(sites)
        self._add_numbers("weights", [[s.weight12, s.weight13, s.weight_cross] for s in sites])

    def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
        first, second, third = positions[:, self.parents].unbind(dim=-2)
        r12, r13 = second - first, third - first
        w12, w13, w_cross = self.weights.unsqueeze(-1).unbind(dim=-2)
        place: Tensor = first + w12 * r12 + w13 * r13 + w_cross * torch.linalg.cross(r12, r13)
        return place


class _LocalCoordinates(_AbstractGroup):
    origin_weights: Tensor
    x_weights: Tensor
    y_weights: Tensor
    local_position: Tensor

    def __init__(self, sites: Sequence[LocalCoordinatesSite]) -> None:
        super().__init__(sites)
        self._add_weights("origin_weights", [site.origin_weights for site in sites])
        self._add_weights("x_weights", [site.x_weights for site in sites])
        self._add_weights("y_weights", [site.y_weights for site in sites])
        self._add_numbers("local_position", [list(site.local_position) for site in sites])

    def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
        origin = _combined(positions, self.parents, self.origin_weights)
        along_x = rescaled(_combined(positions, self.parents, self.x_weights))
        along_y = rescaled(_combined(positions, self.parents, self.y_weights))
        cross = torch.linalg.cross(along_x, along_y)
        x = direction(along_x)
        z = direction(torch.where(vanishes(cross).unsqueeze(-1), 0.0, cross))
        y = torch.linalg.cross(z, x)
        place = self.local_position.unsqueeze(-1) * torch.stack([x, y, z], dim=-2)
        return origin + place.sum(dim=-2)


class _Symmetry(_AbstractGroup):
    rotation: Tensor
    offset: Tensor

    def __init__(self, sites: Sequence[SymmetrySite]) -> None:
        super().__init__(sites)
        self._add_numbers("rotation", [[list(row) for row in site.rotation] for site in sites])
        self._add_numbers("offset", [list(site.offset) for site in sites])

    def _image(self, places: Tensor) -> Tensor:
        return (self.rotation @ places.unsqueeze(-1)).squeeze(-1) + self.offset

    def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
        return self._image(positions[:, self.parents[:, 0]])


class _FractionalSymmetry(_Symmetry):
    def forward(self, positions: Tensor, box: Tensor | None) -> Tensor:
        assert box is not None
        places = positions[:, self.parents[:, 0]]
        return self._image(places @ reciprocal(box)) @ box


def _group_of(site: AbstractSite) -> type[_AbstractGroup]:
    match site:
        case AverageSite():
            return _Average
        case OutOfPlaneSite():
            return _OutOfPlane
        case LocalCoordinatesSite():
            return _LocalCoordinates
        case SymmetrySite(fractional=True):
            return _FractionalSymmetry
        case SymmetrySite():
            return _Symmetry
        case _:
            raise InvalidInputError(
                f"sites: no rule for {type(site).__name__}; wanted an AverageSite, "
                "OutOfPlaneSite, LocalCoordinatesSite or SymmetrySite"
            )


class VirtualSites(nn.Module):
    """Places virtual sites by their parents.

    Weights and geometries are buffers. The output is differentiable to every order in the
    positions of the parents and in the box; it does not depend on the sites' own input rows.

    Parameters
    ----------
    sites
        The definition of each virtual site by its particle index.
    n_particles
        Number of particles N, virtual sites included.

    Raises
    ------
    InvalidInputError
        For an index outside of the system, the wrong number of parents or weights, or definitions
        that are circular.
    """

    #: Whether a site depends on the box.
    periodic: bool
    #: Particle indices of the sites, ascending.
    indices: tuple[int, ...]

    def __init__(self, sites: Mapping[int, AbstractSite], *, n_particles: int) -> None:
        super().__init__()
        for index, site in sites.items():
            _check(index, site, n_particles)
        self.n_particles = n_particles
        self.indices = tuple(sorted(sites))
        self.periodic = any(_group_of(site) is _FractionalSymmetry for site in sites.values())
        self._levels = nn.ModuleList()
        for n, level in enumerate(_by_dependency(sites)):
            grouped: dict[type[_AbstractGroup], list[int]] = {}
            for index in level:
                grouped.setdefault(_group_of(sites[index]), []).append(index)
            self._levels.append(
                nn.ModuleList(group([sites[i] for i in m]) for group, m in grouped.items())
            )
            # Row N + s of the particles followed by the new sites replaces the row of site s.
            members = [i for m in grouped.values() for i in m]
            rows = torch.arange(n_particles)
            rows[members] = n_particles + torch.arange(len(members))
            self.register_buffer(f"_rows_{n}", rows)

    def forward(self, positions: Tensor, box: Tensor | None = None) -> Tensor:
        """Recompute the rows of all sites.

        Parameters
        ----------
        positions
            ``(F, N, 3)`` [nm].
        box
            ``(F, 3, 3)`` box vectors as rows [nm]; needed when `periodic`.

        Returns
        -------
        Tensor
            ``(F, N, 3)`` [nm]; a new tensor.

        Raises
        ------
        InvalidInputError
            For a wrong shape.
        MissingBoxError
            If a site depends on the box and none is given.
        """
        if positions.ndim != 3 or positions.shape[-2:] != (self.n_particles, 3):
            raise InvalidInputError(
                f"positions: got shape {tuple(positions.shape)}, "
                f"wanted (frames, {self.n_particles}, 3)"
            )
        if self.periodic and box is None:
            raise MissingBoxError(
                "box: got None, but a virtual site is defined in fractional coordinates; "
                "pass box vectors of shape (frames, 3, 3) in nm"
            )
        for n, level in enumerate(self._levels):
            assert isinstance(level, nn.ModuleList)
            placed = [group(positions, box) for group in level]
            rows = self.get_buffer(f"_rows_{n}")
            positions = torch.cat([positions, *placed], dim=1)[:, rows]
        return positions


def _check(index: int, site: AbstractSite, n_particles: int) -> None:
    for particle in (index, *site.parents):
        if not 0 <= particle < n_particles:
            raise InvalidInputError(
                f"sites: virtual site {index} names particle {particle}, "
                f"but the system has {n_particles} particles"
            )
    lengths = {
        name: len(getattr(site, name))
        for name in ("weights", "origin_weights", "x_weights", "y_weights")
        if hasattr(site, name)
    }
    if isinstance(site, OutOfPlaneSite | SymmetrySite):
        wanted = 3 if isinstance(site, OutOfPlaneSite) else 1
        lengths["parents"] = len(site.parents)
    else:
        wanted = len(site.parents)
    wrong = {name: length for name, length in lengths.items() if length != wanted}
    if wrong or not site.parents:
        raise InvalidInputError(
            f"sites: virtual site {index} ({type(site).__name__}) has {len(site.parents)} parents "
            f"and needs {max(wanted, 1)} of each; got {lengths}"
        )


def _by_dependency(sites: Mapping[int, AbstractSite]) -> list[list[int]]:
    """Sites in levels, each of which depends only on levels before it."""
    levels: list[list[int]] = []
    waiting = dict(sites)
    while waiting:
        ready = [i for i, site in waiting.items() if not any(p in waiting for p in site.parents)]
        if not ready:
            raise InvalidInputError(
                f"sites: the definitions of virtual sites {sorted(waiting)[:10]} are circular; "
                "every chain of parents must end in ordinary particles"
            )
        for i in ready:
            del waiting[i]
        levels.append(ready)
    return levels
