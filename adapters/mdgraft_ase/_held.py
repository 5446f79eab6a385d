"""What constraints of Atoms hold fixed, for whoever moves particles by other means than ASE's."""

from __future__ import annotations

import itertools
from typing import Any

import ase
from ase.constraints import (
    ExternalForce,
    FixAtoms,
    FixBondLengths,
    FixInternals,
    FixLinearTriatomic,
    Hookean,
    MirrorForce,
    MirrorTorque,
)
from mdgraft.potentials.held import Held

_NM = 0.1
#: They change forces, not what positions there are.
_FREE = (ExternalForce, Hookean, MirrorForce, MirrorTorque)


def held_by(atoms: ase.Atoms) -> Held | None:
    """Constrained distances and fixed atoms of Atoms; None where there are none.

    What is neither is described by more than it holds, so that nothing that it forbids is let
    pass: atoms of one angle, dihedral or combination of bonds by all distances among them, and
    those of other constraints by staying where they are.
    """
    lengths: dict[tuple[int, int], float] = {}
    pinned: set[int] = set()
    structure: Any = atoms
    n = len(atoms)

    def hold(i: int, j: int, length: float | None = None, mic: bool = False) -> None:
        pair = (int(i) % n, int(j) % n)
        found = structure.get_distance(*pair, mic=mic) if length is None else length
        lengths[min(pair), max(pair)] = _NM * float(found)

    constraint: Any
    for constraint in atoms.constraints:
        if isinstance(constraint, _FREE):
            continue
        if isinstance(constraint, FixBondLengths):
            given = constraint.bondlengths
            for k, (i, j) in enumerate(constraint.pairs):
                hold(i, j, None if given is None else given[k], mic=True)
        elif isinstance(constraint, FixLinearTriatomic):
            # Rigid molecules, which moves of whole ones keep.
            for triple in constraint.triples:
                for i, j in itertools.combinations(triple, 2):
                    hold(i, j, mic=True)
        elif isinstance(constraint, FixInternals):
            for length, (i, j) in constraint.bonds:
                hold(i, j, length, mic=constraint.mic)
            bends = [indices for _, indices in (*constraint.angles, *constraint.dihedrals)]
            combined = [
                [i for term in terms for i in term[:2]] for _, terms in constraint.bondcombos
            ]
            for indices in (*bends, *combined):
                for i, j in itertools.combinations(sorted({int(i) for i in indices}), 2):
                    hold(i, j, mic=constraint.mic)
        else:
            named = constraint.get_indices() if hasattr(constraint, "get_indices") else ()
            # What names no atom may hold all of them, as FixedMode does.
            every = () if isinstance(constraint, FixAtoms) else range(n)
            pinned |= {int(i) % n for i in named} or set(every)
    return Held.of(list(lengths), list(lengths.values()), pinned)
