"""Which description of a lattice suits a potential: room for cutoffs, meshes along their axes."""

# ASE's functions have no annotations.
# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from ase.geometry import minkowski_reduce
from mdgraft import MDGraftWarning, Potential
from mdgraft.potentials.custom.external import CustomVolume
from mdgraft.potentials.external import ExternalTerm
from mdgraft.potentials.nonbonded import Method

from mdgraft_ase._cell import ReducedCell, reduced_cell

# Points of a mesh may be this much farther apart along one vector than along another.
_UNEVEN = 2.0
# Room that the given vectors leave, beside that of the best ones. A rhombic dodecahedron as OpenMM
# describes it has 0.87.
_ROOMY = 0.8
# What a sum on a mesh may err by, relative to forces, before somebody should know. OpenMM's
# default asks for 5e-4.
_COARSE = 5e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demands:
    """What a potential asks of box vectors.

    Attributes
    ----------
    cutoff
        Twice this must fit into every diagonal element [nm].
    points
        ``(terms, 3)`` mesh points, or wave vectors, of each Ewald sum along the vectors.
    fixed
        Whether other vectors of the same lattice would be another energy: it is written in
        elements of the box, or the host evaluates it.
    """

    cutoff: float
    points: np.ndarray
    fixed: bool

    @staticmethod
    def of(potential: Potential) -> Demands:
        """Those of a potential, as far as its terms tell."""
        periodic = [potential.term(n) for n in potential.term_names if potential.term(n).periodic]
        modules = [module for term in periodic for module in term.modules()]
        cutoffs = [
            getattr(holder, "cutoff", None)
            for module in modules
            for holder in (module, getattr(module, "settings", None))
        ]
        points = [
            settings.kmax if _is_plain_sum(settings) else settings.grid
            for _, settings in _ewald(potential)
        ]
        return Demands(
            cutoff=max((c for c in cutoffs if isinstance(c, float) and c < math.inf), default=0.0),
            points=np.array(points, dtype=float).reshape(-1, 3),
            fixed=any(isinstance(m, CustomVolume | ExternalTerm) for m in modules),
        )

    def fits(self, box: np.ndarray) -> bool:
        """Whether there is room for the cutoff."""
        return bool(box.diagonal().min() >= 2 * self.cutoff * (1 - 1e-9))

    def unevenness(self, box: np.ndarray) -> float:
        """Largest distance of mesh points along one vector beside that along another."""
        distances = _heights(box) / self.points
        return float((distances.max(axis=1) / distances.min(axis=1)).max(initial=1.0))


def described(cell: np.ndarray, demands: Demands) -> ReducedCell:
    """The lattice of a cell by vectors that suit a potential.

    The cell's own vectors, as long as they are about as short as any: the boxes that people use in
    OpenMM are. Otherwise those that leave most room, in the order that goes best with the meshes:
    nearest images are found within half of the diagonal elements, so that bonds need room as well
    as cutoffs.

    Parameters
    ----------
    cell
        ``(3, 3)`` [nm], vectors as rows.
    demands
        Of the potential.
    """
    first = reduced_cell(cell)
    suits = demands.fits(first.box) and demands.unevenness(first.box) <= _UNEVEN
    upright = not np.tril(first.box, -1).any()
    if demands.fixed or (suits and upright):
        return first
    _, short = minkowski_reduce(cell)
    found = [first]
    for order in itertools.permutations(range(3)):
        change = short[list(order)].astype(float)
        other = reduced_cell(change @ cell)
        found.append(dataclasses.replace(other, lattice=other.lattice @ change))
    most = max(candidate.box.diagonal().min() for candidate in found)
    if suits and first.box.diagonal().min() >= _ROOMY * most:
        return first

    def rank(candidate: ReducedCell) -> tuple[bool, bool, float, float]:
        box = candidate.box
        unevenness, room = demands.unevenness(box), box.diagonal().min()
        # Rounded, so that the given order wins where others are no better.
        return (
            not demands.fits(box),
            unevenness > _UNEVEN,
            -round(float(room), 6),
            round(unevenness, 6),
        )

    return min(found, key=rank)


def check_meshes(potential: Potential, box: np.ndarray) -> bool:
    """Warn if a mesh is too coarse along one vector of a box, as in a box of another shape.

    By the estimate that OpenMM chooses meshes by, (2 alpha L / (3 n))^5 for n points along a box
    of length L.

    Parameters
    ----------
    potential
        Its particle-mesh Ewald sums are looked at.
    box
        ``(3, 3)`` [nm].

    Returns
    -------
    bool
        Whether it warned.
    """
    for name, settings in _ewald(potential):
        if _is_plain_sum(settings):
            continue
        error = (2 * settings.alpha * _heights(box) / (3 * np.array(settings.grid))) ** 5
        direct = 0.5 * math.exp(-((settings.alpha * settings.cutoff) ** 2))
        uneven = error.max() > _UNEVEN**5 * error.min()
        if uneven and error.max() > max(_COARSE, 20 * direct):
            warnings.warn(
                MDGraftWarning(
                    f"atoms.cell: its heights {np.round(_heights(box), 3).tolist()} nm do not go "
                    f"with the mesh {tuple(settings.grid)} of {name}, chosen for another box: "
                    f"forces err by about {error.max():.2g}. Graft the system with this box as its "
                    "default"
                ),
                stacklevel=2,
            )
            return True
    return False


def _heights(box: np.ndarray) -> np.ndarray:
    """Distances between opposite faces."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.inv(box), axis=0))


def _ewald(potential: Potential) -> Iterator[tuple[str, Any]]:
    """Settings of the Ewald sums, by the terms' names."""
    for name in potential.term_names:
        for module in potential.term(name).modules():
            settings = getattr(module, "settings", None)
            if getattr(settings, "alpha", None) and getattr(settings, "grid", None):
                yield name, settings


def _is_plain_sum(settings: Any) -> bool:
    """Whether it is OpenMM's method Ewald, which has no mesh."""
    return getattr(settings, "method", None) is Method.EWALD
