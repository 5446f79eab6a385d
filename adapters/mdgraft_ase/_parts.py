"""Calculators that are sums of others, opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.mixing import LinearCombinationCalculator, SumCalculator
from ase.calculators.qmmm import SimpleQMMM
from mdgraft.potentials import AbstractTerm, is_reserved
from mdgraft.potentials.atomistic.subset import Subset
from mdgraft.potentials.atomistic.weighted import Weighted

from mdgraft_ase._units import ANGSTROM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A calculator whose energy is one summand.

    Attributes
    ----------
    calculator
        No sum itself.
    atoms
        What it is evaluated for.
    weight
        That it has in a linear combination; None where there is none.
    particles
        Indices of its atoms among all; None for all.
    factor
        Plus or minus one by which it enters.
    centre
        ``(3,)`` [Angstrom] where its atoms are moved; None leaves them where they are.
    """

    calculator: Any
    atoms: ase.Atoms
    weight: float | None = None
    particles: np.ndarray | None = None
    factor: float = 1.0
    centre: np.ndarray | None = None

    def wrapped(self, term: AbstractTerm) -> AbstractTerm:
        """The term of this calculator as it enters the sum."""
        if self.particles is not None:
            centre = None if self.centre is None else torch.as_tensor(self.centre * ANGSTROM)
            particles = torch.as_tensor(self.particles)
            term = Subset(term, particles, factor=self.factor, centre=centre)
        if self.weight is not None:
            term = Weighted(term, torch.tensor(self.weight, dtype=torch.float64))
        return term


def parts(calculator: Any, atoms: ase.Atoms) -> dict[str, Part]:
    """The summands of a calculator by the names of their terms; itself if it is no sum.

    Sums within sums are opened. A term is named after its calculator's class, or after its package
    if the class is just called Calculator; when a name repeats, later ones get ``_1``, ``_2``.
    """
    named: dict[str, Part] = {}
    for part in _opened(Part(calculator=calculator, atoms=atoms)):
        base = _name(part.calculator)
        name, repeat = base, 0
        while name in named or is_reserved(name):
            repeat += 1
            name = f"{base}_{repeat}"
        named[name] = part
    return named


def _name(calculator: Any) -> str:
    cls = type(calculator)
    return cls.__module__.partition(".")[0] if cls.__name__ == "Calculator" else cls.__name__


def is_mixture(calculator: Any) -> bool:
    """Whether a calculator is nothing but a weighted sum of others."""
    return isinstance(calculator, LinearCombinationCalculator) and _unchanged(
        calculator, LinearCombinationCalculator
    )


def sums(calculator: Any) -> Iterator[Any]:
    """A calculator, if it is a sum that is opened, and the sums within it."""
    if is_mixture(calculator):
        yield calculator
        inner = calculator.mixer.calcs
    elif _is_subtractive(calculator):
        yield calculator
        inner = [calculator.qmcalc, calculator.mmcalc1, calculator.mmcalc2]
    else:
        return
    for part in inner:
        yield from sums(part)


def _is_subtractive(calculator: Any) -> bool:
    return type(calculator) is SimpleQMMM and _unchanged(calculator, SimpleQMMM)


def _unchanged(calculator: Any, cls: Any) -> bool:
    return type(calculator).calculate is cls.calculate and "calculate" not in vars(calculator)


def _opened(part: Part) -> Iterator[Part]:
    calculator = part.calculator
    if is_mixture(calculator):
        mixer = calculator.mixer
        fixed = isinstance(calculator, SumCalculator) and all(w == 1.0 for w in mixer.weights)
        for inner, own in zip(mixer.calcs, mixer.weights, strict=True):
            weight = float(own) * (1.0 if part.weight is None else part.weight)
            weighted = dataclasses.replace(
                part, calculator=inner, weight=part.weight if fixed else weight
            )
            yield from _opened(weighted)
    elif _is_subtractive(calculator):
        yield from _subtractive(part)
    else:
        yield part


def _subtractive(part: Part) -> Iterator[Part]:
    """``E_MM(all) - E_MM(QM) + E_QM(QM)``."""
    calculator, atoms = part.calculator, part.atoms
    inner = atoms.copy()  # type: ignore[no-untyped-call]
    inner.set_constraint()
    inner = inner[calculator.selection]
    inner.pbc = False
    centre = None
    if calculator.vacuum:
        inner.center(vacuum=calculator.vacuum)
        centre = inner.positions.mean(axis=0)
    place = np.arange(len(atoms))[calculator.selection]
    particles = place if part.particles is None else part.particles[place]
    for own, factor in ((calculator.qmcalc, 1.0), (calculator.mmcalc1, -1.0)):
        yield from _opened(
            dataclasses.replace(
                part,
                calculator=own,
                atoms=inner,
                particles=particles,
                factor=part.factor * factor,
                centre=centre,
            )
        )
    yield from _opened(dataclasses.replace(part, calculator=calculator.mmcalc2))
