"""Comparing a potential with the host that it was grafted from, term by term."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mdgraft._differences import Difference, finite_difference
from mdgraft._units import plain
from mdgraft.potentials import Potential

AGREES, DIFFERS, UNRESOLVED, SKIPPED = "agrees", "differs", "unresolved", "skipped"

#: Called with what is being done, how many steps are done, and how many there are.
Progress: TypeAlias = Callable[[str, int, int], None]

# Derivatives of these need not exist at zero, where geometric means have a vertical tangent.
_SINGULAR_AT_ZERO = ("sigma", "epsilon")
_LENGTH = 0.01  # [nm], turns the sum of force magnitudes into an energy scale
_LEAST = 1e-6  # [kJ/mol] per parameter's own magnitude; what is smaller counts as zero
_BOX_ENTRIES = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostFunctions:
    """What a host answers about the system that a potential was grafted from.

    Attributes
    ----------
    energies
        Energies [kJ/mol] of the terms named, from positions ``(N, 3)`` [nm] and a box ``(3, 3)``
        [nm] or None. NaN for a box that the host refuses.
    forces
        Forces ``(N, 3)`` [kJ/mol/nm] of the terms named, from the same.
    parameter_energies
        Energies [kJ/mol] of the terms named, at the positions and box of the check, after the
        parameters of the potential were written into the host. NaN where the host refuses them.
        None if the host cannot take over parameters.
    precision
        Relative precision of terms that the host computes coarsely, by name: nothing finer is
        asked of them.
    """

    energies: Callable[[np.ndarray, np.ndarray | None, Sequence[str]], Mapping[str, float]]
    forces: Callable[[np.ndarray, np.ndarray | None, Sequence[str]], Mapping[str, np.ndarray]]
    parameter_energies: Callable[[Potential, Sequence[str]], Mapping[str, float]] | None = None
    precision: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Relative differences that pass.

    Attributes
    ----------
    energy
        Of a term's energy, relative to its magnitude or, if larger, to 0.01 nm times the sum of
        its force magnitudes.
    forces
        Of the root mean square over particles, relative to that of the host or 1 kJ/mol/nm.
    box, parameters
        Of derivatives whose truth is a finite difference, relative to their magnitude.
    """

    energy: float = 1e-9
    forces: float = 1e-9
    box: float = 1e-6
    parameters: float = 1e-6

    def at_least(self, precision: Mapping[str, float], terms: Sequence[str]) -> Tolerances:
        """The same, but nowhere below the precision with which a host computes the terms."""
        least = max((precision.get(name, 0.0) for name in terms), default=0.0)
        changed = {f.name: max(getattr(self, f.name), least) for f in dataclasses.fields(self)}
        return Tolerances(**changed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantity of one term, by the host and by the graft.

    Attributes
    ----------
    term
        Name of the term; ``total`` for the sum of all.
    quantity
        ``"energy"`` [kJ/mol], ``"forces"`` [kJ/mol/nm], ``"box"`` [kJ/mol/nm] or
        ``"parameter"`` [kJ/mol for a change by the parameter's own magnitude].
    detail
        Which parameter and direction; which entries are left out.
    host, graft
        The two values; root mean squares for forces and the box derivative.
    difference
        Absolute difference; the largest component for forces and the box derivative.
    relative
        Difference relative to the scale that `Tolerances` states.
    tolerance
        The largest relative difference that passes.
    uncertainty
        Relative error of the host's own value, when that is a finite difference.
    status
        ``"agrees"``, ``"differs"``, ``"unresolved"`` when the difference is above the tolerance
        but within the uncertainty, or ``"skipped"`` where a derivative does not exist.
    """

    term: str
    quantity: str
    detail: str
    host: float
    graft: float
    difference: float
    relative: float
    tolerance: float
    uncertainty: float
    status: str


def compare_with_host(
    potential: Potential,
    positions: np.ndarray,
    box: np.ndarray | None,
    host: HostFunctions,
    *,
    comparable: np.ndarray | None = None,
    gradients: bool = False,
    tolerances: Tolerances | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Compare energies, forces, box derivatives and, on request, parameter gradients.

    Parameters
    ----------
    potential
        The graft, in double precision.
    positions
        ``(N, 3)`` [nm].
    box
        ``(3, 3)`` [nm]; None for an open system.
    host
        The host's answers.
    comparable
        ``(N,)`` booleans: particles whose forces are compared. All but virtual sites, whose
        forces belong to their parents.
    gradients
        Also compare the derivative with respect to each parameter family, along a random
        direction and for single entries.
    tolerances
        What passes.
    seed
        Of the random directions and entries.
    progress
        Told about long work.

    Returns
    -------
    list of Comparison
    """
    judge = tolerances or Tolerances()
    terms = list(potential.term_names)
    n_families = len(list(_families(potential))) if gradients else 0
    total_steps = 2 + n_families
    tell = progress or (lambda message, done, total: None)

    tell("energies and forces", 0, total_steps)
    x = torch.tensor(positions, dtype=torch.float64, device=potential.device, requires_grad=True)
    cell = None
    if box is not None:
        cell = torch.tensor(box, dtype=torch.float64, device=potential.device, requires_grad=True)
    energies = potential.energy_by_term(x, cell)
    keep = np.ones(len(positions), bool) if comparable is None else comparable
    rows = _energies_and_forces(energies, x, host, positions, box, keep, judge)

    tell("box derivatives", 1, total_steps)
    # Sites may be placed by the box, and then every term depends on it.
    everywhere = bool(getattr(getattr(potential, "sites", None), "periodic", False))
    periodic = [name for name in terms if everywhere or potential.term(name).periodic]
    if cell is not None and box is not None and periodic:
        gradient = {name: _numpy(_gradient(energies[name], cell)) for name in periodic}
        rows += _box(gradient, host, positions, box, judge)

    if gradients and host.parameter_energies is not None and dict(potential.named_parameters()):
        rng = np.random.default_rng(seed)
        total = torch.stack([e.sum() for e in energies.values()]).sum()
        magnitude = {name: abs(float(energy.detach())) for name, energy in energies.items()}
        families = dict(_families(potential))
        slopes = torch.autograd.grad(
            total, [p for p, _ in families.values()], allow_unused=True, materialize_grads=True
        )
        for done, (name, slope) in enumerate(zip(families, slopes, strict=True)):
            tell(name, 2 + done, total_steps)
            rows += _parameter(
                potential, name, families[name][1], slope, host, magnitude, judge, rng
            )
    tell("done", total_steps, total_steps)
    return rows


def _energies_and_forces(
    energies: Mapping[str, Tensor],
    x: Tensor,
    host: HostFunctions,
    positions: np.ndarray,
    box: np.ndarray | None,
    keep: np.ndarray,
    judge: Tolerances,
) -> list[Comparison]:
    names = list(energies)
    theirs = host.energies(positions, box, names)
    forces = host.forces(positions, box, names)
    ours = {name: -_numpy(_gradient(energy, x)) for name, energy in energies.items()}
    parts = [
        (name, theirs[name], float(energies[name].detach()), forces[name], ours[name])
        for name in names
    ]
    zeros = np.zeros_like(positions)
    parts.append(
        (
            "total",
            sum(p[1] for p in parts),
            sum(p[2] for p in parts),
            sum((p[3] for p in parts), zeros),
            sum((p[4] for p in parts), zeros),
        )
    )
    rows: list[Comparison] = []
    scales: list[float] = []
    for name, e_host, e_graft, f_host, f_graft in parts:
        own = judge.at_least(host.precision, names if name == "total" else [name])
        f_host, f_graft = f_host[keep], f_graft[keep]
        # A term at rest is measured against what it would be a little away from there.
        scale = max(abs(e_host), _LENGTH * float(np.linalg.norm(f_host, axis=1).sum()), 1e-3)
        scale = sum(scales) if name == "total" and scales else scale
        scales.append(scale)
        rows.append(_exact(name, "energy", "", e_host, e_graft, scale, own.energy))
        spread = _rms(f_graft - f_host)
        size = max(_rms(f_host), 1.0)
        rows.append(
            Comparison(
                term=name,
                quantity="forces",
                detail="",
                host=_rms(f_host),
                graft=_rms(f_graft),
                difference=float(np.abs(f_graft - f_host).max(initial=0.0)),
                relative=spread / size,
                tolerance=own.forces,
                uncertainty=0.0,
                status=AGREES if spread <= own.forces * size else DIFFERS,
            )
        )
    return rows


def _box(
    gradient: Mapping[str, np.ndarray],
    host: HostFunctions,
    positions: np.ndarray,
    box: np.ndarray,
    judge: Tolerances,
) -> list[Comparison]:
    """Compare dE/dbox at fixed positions for the six entries that a reduced box has."""
    rows = _box_by_steps(gradient, host, positions, box, judge, step=1e-3)
    wrong = {row.term: gradient[row.term] for row in rows if row.status == DIFFERS}
    if not wrong:
        return rows
    # Energies jump where pairs cross a plain cutoff; steps that see no jump decide.
    again = _box_by_steps(wrong, host, positions, box, judge, step=1e-6)
    right = {row.term: row for row in again if row.status == AGREES}
    return [right.get(row.term, row) for row in rows]


def _box_by_steps(
    gradient: Mapping[str, np.ndarray],
    host: HostFunctions,
    positions: np.ndarray,
    box: np.ndarray,
    judge: Tolerances,
    *,
    step: float,
) -> list[Comparison]:
    """Compare with differences by steps of at most this size."""
    names = list(gradient)
    analytic = np.array([[gradient[n][i, j] for n in names] for i, j in _BOX_ENTRIES])
    size = np.sqrt((analytic**2).mean(axis=0))

    def along(i: int, j: int) -> Callable[[float], np.ndarray]:
        def energies(t: float) -> np.ndarray:
            moved = box.copy()
            moved[i, j] += t
            found = host.energies(positions, moved, names)
            return np.array([found[n] for n in names])

        return energies

    steps = [
        _towards_more(
            along(i, j), step=step, first=1 if i == j else -1, atol=0.05 * judge.box * size
        )
        for i, j in _BOX_ENTRIES
    ]
    rows = []
    for column, name in enumerate(names):
        own = judge.at_least(host.precision, [name])
        # A host may refuse some boxes to some terms, such as skewed ones to plain Ewald sums.
        answered = np.array([np.isfinite(s.error[column]) for s in steps])
        if not answered.any():
            rows.append(_skipped(name, "box", "the host refuses every other box", own.box))
            continue
        truth = np.array([s.value[column] for s in steps])[answered]
        error = float(np.linalg.norm(np.array([s.error[column] for s in steps])[answered]))
        ours = analytic[answered, column]
        difference = np.abs(truth - ours)
        refused = [
            f"{'xyz'[i]}{'xyz'[j]}"
            for (i, j), a in zip(_BOX_ENTRIES, answered, strict=True)
            if not a
        ]
        rows.append(
            _judged(
                name,
                "box",
                f"not {', '.join(refused)}, which the host refuses" if refused else "",
                _rms(truth),
                _rms(ours),
                float(difference.max()),
                float(np.linalg.norm(difference)),
                error,
                max(float(np.linalg.norm(truth)), float(np.linalg.norm(ours))),
                own.box,
            )
        )
    return rows


def _parameter(
    potential: Potential,
    name: str,
    terms: Sequence[str],
    slope: Tensor,
    host: HostFunctions,
    magnitude: Mapping[str, float],
    judge: Tolerances,
    rng: np.random.Generator,
) -> list[Comparison]:
    """Compare one parameter family along a random direction and for single entries."""
    write = host.parameter_energies
    assert write is not None
    judge = judge.at_least(host.precision, terms)
    moved = copy.deepcopy(potential)
    parameter = dict(moved.named_parameters())[name]
    base = parameter.detach().clone()
    value, g = _numpy(base).reshape(-1), _numpy(slope).reshape(-1)
    scale = _scales(value)
    free = np.ones(len(value), bool)
    if name.endswith(_SINGULAR_AT_ZERO):
        free = value != 0
    owner = terms[0] if len(terms) == 1 else "total"
    if not free.any():
        return [
            _skipped(owner, "parameter", f"{name}, all zero: no derivative there", judge.parameters)
        ]
    energy_scale = max((magnitude[t] for t in terms), default=0.0)

    def along(direction: np.ndarray) -> Callable[[float], float]:
        step = torch.from_numpy(direction).reshape(base.shape).to(base)

        def energy(t: float) -> float:
            with torch.no_grad():
                parameter.copy_(base + t * step)
            return sum(write(moved, terms).values())

        return energy

    directions = {}
    if free.sum() > 1:
        random = rng.uniform(0.5, 1.0, len(value)) * rng.choice((-1.0, 1.0), len(value))
        directions["random direction"] = random * scale * free
    for entry in _entries(g * scale, value, free, rng):
        unit = np.zeros(len(value))
        unit[entry] = scale[entry]
        where = ",".join(str(int(k)) for k in np.unravel_index(entry, base.shape))
        directions[f"entry {where}" if base.ndim else "value"] = unit
    rows = []
    for label, direction in directions.items():
        ours = float(g @ direction)
        size = float(np.linalg.norm(g * direction))
        # What is far below the rounding of the energy itself counts as zero.
        least = max(1e-6 * energy_scale, _LEAST)
        found = finite_difference(along(direction), atol=0.05 * judge.parameters * max(size, least))
        truth = float(found.value)
        difference = abs(truth - ours)
        rows.append(
            _judged(
                owner,
                "parameter",
                f"{name}, {label}",
                truth,
                ours,
                difference,
                difference,
                float(found.error),
                max(size, abs(truth) if math.isfinite(truth) else 0.0, least),
                judge.parameters,
            )
        )
    return rows


def _families(potential: Potential) -> Iterator[tuple[str, tuple[Tensor, list[str]]]]:
    """Parameters that are not empty, with the terms that they can reach."""
    for name, parameter in potential.named_parameters():
        if parameter.numel() and parameter.requires_grad:
            owner, names = name.partition(".")[0], potential.term_names
            borrowers = [n for n in names if owner in potential.term(n).borrows]
            terms = [owner, *borrowers] if owner in names else list(names)
            yield name, (parameter, terms)


def _scales(value: np.ndarray) -> np.ndarray:
    """By how much each entry may change: its magnitude, or what is usual in its family."""
    magnitude = np.abs(value)
    usual = float(np.median(magnitude[magnitude > 0])) if (magnitude > 0).any() else 0.1
    return np.where(magnitude > 0, magnitude, usual)


def _entries(
    weight: np.ndarray, value: np.ndarray, free: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """The entry that matters most, and one random entry each with a value and without."""
    chosen = [int(np.argmax(np.where(free, np.abs(weight), -1.0)))]
    for group in (free & (value != 0), free & (value == 0)):
        candidates = np.setdiff1d(group.nonzero()[0], chosen)
        if len(candidates):
            chosen.append(int(rng.choice(candidates)))
    return chosen


def _towards_more(
    function: Callable[[float], np.ndarray], *, step: float, first: int, atol: np.ndarray
) -> Difference:
    """Central difference, or one-sided where the host refuses one side of an admissible box."""
    probe = {side: bool(np.isfinite(function(side * step)).any()) for side in (1, -1)}
    side = 0
    if not all(probe.values()):
        side = next((s for s in (first, -first) if probe[s]), 0)
    return finite_difference(function, step=step, side=side, atol=atol)


def _exact(
    term: str, quantity: str, detail: str, host: float, graft: float, scale: float, tol: float
) -> Comparison:
    difference = abs(graft - host)
    return Comparison(
        term=term,
        quantity=quantity,
        detail=detail,
        host=host,
        graft=graft,
        difference=difference,
        relative=difference / scale,
        tolerance=tol,
        uncertainty=0.0,
        # A NaN on either side must not pass.
        status=AGREES if difference <= tol * scale else DIFFERS,
    )


def _judged(
    term: str,
    quantity: str,
    detail: str,
    host: float,
    graft: float,
    largest: float,
    difference: float,
    error: float,
    scale: float,
    tol: float,
) -> Comparison:
    if difference <= tol * scale:
        status = AGREES
    elif not math.isfinite(error) or difference <= tol * scale + 10 * error:
        status = UNRESOLVED if math.isfinite(graft) else DIFFERS
    else:
        status = DIFFERS
    divisor = scale or 1.0
    return Comparison(
        term=term,
        quantity=quantity,
        detail=detail,
        host=host,
        graft=graft,
        difference=largest,
        relative=difference / divisor,
        tolerance=tol,
        uncertainty=error / divisor,
        status=status,
    )


def _skipped(term: str, quantity: str, detail: str, tol: float) -> Comparison:
    return Comparison(
        term=term,
        quantity=quantity,
        detail=detail,
        host=math.nan,
        graft=math.nan,
        difference=math.nan,
        relative=math.nan,
        tolerance=tol,
        uncertainty=math.nan,
        status=SKIPPED,
    )


def _gradient(energy: Tensor, wanted: Tensor) -> Tensor:
    if not energy.requires_grad:
        return torch.zeros_like(wanted)
    (gradient,) = torch.autograd.grad(
        energy.sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(plain(tensor.detach().cpu()), dtype=np.float64)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0
