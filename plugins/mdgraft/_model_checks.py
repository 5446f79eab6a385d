"""Whether an energy model obeys the physics that every potential of atoms must obey."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdgraft._differences import finite_difference
from mdgraft._errors import InvalidInputError
from mdgraft._model_subject import (
    Function,
    ModelCheck,
    ModelReport,
    Subject,
    against_difference,
    check,
    skipped,
)
from mdgraft._types import BoxLike, PositionsLike
from mdgraft.kernels.images import image_pairs
from mdgraft.neural import neural_potential
from mdgraft.potentials import Potential

_BOX_ROWS, _BOX_COLUMNS = (0, 1, 1, 2, 2, 2), (0, 0, 1, 0, 1, 2)


#: Names of all checks, in order.
CHECKS = (
    "translation",
    "rotation",
    "inversion",
    "permutation",
    "lattice",
    "forces",
    "net force",
    "torque",
    "hessian",
    "box derivative",
    "batch",
    "extensivity",
    "smoothness",
)


def check_model(
    model: Potential | nn.Module | Function,
    positions: PositionsLike,
    box: BoxLike = None,
    atomic_numbers: Sequence[int] | Tensor | None = None,
    *,
    pbc: bool | Sequence[bool] | None = None,
    cutoff: float | None = None,
    dtype: torch.dtype | None = torch.float64,
    rtol: float | None = None,
    difference_rtol: float | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> ModelReport:
    """Check that an energy model is invariant, conservative, smooth and extensive.

    Invariance of the energy, and covariance of forces, to translations, rotations, inversion,
    permutations of like atoms and, in a periodic system, translations of single particles by box
    vectors; forces, Hessian and box derivative against differences; no net force and torque; a
    batch against single frames; energies of two copies, far apart or as a supercell, against twice
    that of one; energies and forces just inside and just outside of the cutoff. What cannot be
    looked at is reported as skipped with the reason.

    Parameters
    ----------
    model
        A potential; or a model as `mdgraft.neural_potential` takes it, with ``atomic_numbers``; or
        a function of positions ``(N, 3)`` [nm] and a box ``(3, 3)`` [nm] or None, or of positions
        alone, that returns an energy [kJ/mol], or a tuple of energy and forces [kJ/mol/nm].
    positions
        ``(N, 3)`` [nm], away from places where the energy is not smooth.
    box
        ``(3, 3)`` [nm], or None.
    atomic_numbers
        ``(N,)``. Given with a potential or a function, they say which particles are alike.
    pbc
        Periodic directions; by default all of them if there is a box.
    cutoff
        [nm] where to look for jumps; by default the model's own.
    dtype
        Precision of the copy of the model that is checked; None to check the model as it is.
    rtol
        Of quantities that should be equal; by default 1e-9, and 1e-4 in single precision. Sums on
        a mesh, as in PME, are invariant only as far as the mesh is fine.
    difference_rtol
        Of derivatives against differences; by default 1e-6, and 1e-2 in single precision.
    skip
        Names of checks to leave out, or one name: those of `mdgraft.testing.CHECKS`.
    seed
        Of random directions, rotations and permutations.

    Returns
    -------
    ModelReport
        If nothing failed.

    Raises
    ------
    AssertionError
        If a check failed; the message has the numbers of all that did.
    InvalidInputError
        If the model or an argument makes no sense.
    """
    skip = {skip} if isinstance(skip, str) else set(skip)
    unknown = skip - set(CHECKS)
    if unknown:
        raise InvalidInputError(f"skip: no check {sorted(unknown)}; there are {list(CHECKS)}")
    subject = Subject(model, positions, box, atomic_numbers, pbc=pbc, dtype=dtype, seed=seed)
    single = subject.x.dtype == torch.float32
    subject.rtol = (1e-4 if single else 1e-9) if rtol is None else rtol
    if difference_rtol is None:
        difference_rtol = 1e-2 if single else 1e-6
    subject.difference_rtol = difference_rtol
    if single:
        # Wide enough that rounding of the energy is small against its change.
        subject.step, subject.levels = 1e-2, 4
    subject.cutoff = subject.cutoff if cutoff is None else float(cutoff)
    checks = []
    for name in CHECKS:
        if name in skip:
            checks.append(skipped(name, "as asked for"))
        else:
            checks.extend(_DO[name](subject))
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        raise AssertionError("the model fails:\n" + "\n".join(map(str, failed)))
    return ModelReport(checks=tuple(checks))


# Symmetries -----------------------------------------------------------------------------------


def _translation(s: Subject) -> Iterator[ModelCheck]:
    yield from s.compare("translation", "a translation", s.x + s.rand(3), s.h, s.forces0)


def _rotation(s: Subject) -> Iterator[ModelCheck]:
    if not s.any_cell:
        yield skipped("rotation", "the potential takes cells in reduced form alone")
        return
    q, r = torch.linalg.qr(s.rand(3, 3))
    q = q * r.diagonal().sign()
    q = q * torch.linalg.det(q).sign()
    h = None if s.h is None else s.h @ q
    yield from s.compare("rotation", "a rotation", s.x @ q, h, s.forces0 @ q)


def _inversion(s: Subject) -> Iterator[ModelCheck]:
    # A lattice is its own inverse.
    yield from s.compare("inversion", "an inversion", -s.x, s.h, -s.forces0)


def _permutation(s: Subject) -> Iterator[ModelCheck]:
    if s.numbers is None:
        yield skipped("permutation", "pass atomic_numbers to say which particles are alike")
        return
    order = torch.arange(len(s.x))
    for z in set(s.numbers.tolist()):
        alike = (s.numbers == z).nonzero().squeeze(-1)
        # All of them move on by one: no other permutation moves more.
        order[alike] = alike.roll(1)
    if bool((order == torch.arange(len(s.x))).all()):
        yield skipped("permutation", "no two atoms are of one element")
        return
    order = order.to(s.x.device)
    yield from s.compare("permutation", "a permutation", s.x[order], s.h, s.forces0[order])


def _lattice(s: Subject) -> Iterator[ModelCheck]:
    if not s.periodic or s.h is None:
        yield skipped("lattice", "not periodic")
        return
    steps = torch.randint(-2, 3, s.x.shape, generator=s.random).to(s.x)
    steps = steps * torch.tensor(s.pbc).to(s.x)
    moved = s.x + steps @ s.h
    yield from s.compare("lattice", "moving particles by box vectors", moved, s.h, s.forces0)


def _net_force(s: Subject) -> Iterator[ModelCheck]:
    net = s.forces0.sum(dim=0).norm()
    yield check("net force", net, s.rtol * s.force_scale, "sum of all forces")


def _torque(s: Subject) -> Iterator[ModelCheck]:
    if s.periodic:
        yield skipped("torque", "a periodic system has none that is conserved")
        return
    arms = s.x - s.x.mean(dim=0)
    torque = torch.linalg.cross(arms, s.forces0).sum(dim=0).norm()
    size = s.force_scale * max(float(arms.norm(dim=-1).max()), 1e-3)
    yield check("torque", torque, s.rtol * size, "sum of all torques")


# Derivatives ----------------------------------------------------------------------------------


def _forces(s: Subject) -> Iterator[ModelCheck]:
    for _ in range(2):
        along = s.rand(*s.x.shape)

        def energy(t: float, along: Tensor = along) -> float:
            return float(s.energy(s.x + t * along, s.h))

        truth = finite_difference(energy, step=s.step, levels=s.levels)
        work = -(s.forces0 * along).double()
        size = float(work.norm())
        yield against_difference(
            s,
            "forces",
            work.sum().cpu(),
            truth,
            size=size,
            noise=s.largest_energy,
            detail="along a random direction",
        )


def _hessian(s: Subject) -> Iterator[ModelCheck]:
    along = s.rand(*s.x.shape)
    moved = s.x.clone().requires_grad_(True)
    with torch.enable_grad():
        energy, forces = s.split(s.function(moved, s.h))
        if forces is not None or not energy.requires_grad:
            yield skipped("hessian", "the model returns forces itself, or has none")
            return
        (slope,) = torch.autograd.grad(
            energy, moved, create_graph=True, allow_unused=True, materialize_grads=True
        )
        product = torch.zeros_like(s.x)
        if slope.requires_grad:
            (product,) = torch.autograd.grad(
                (slope * along).sum(), moved, allow_unused=True, materialize_grads=True
            )

    def change(t: float) -> np.ndarray:
        return -s.forces(s.x + t * along, s.h).double().cpu().numpy()

    truth = finite_difference(change, step=s.step, levels=s.levels)
    found = product.detach().double().cpu().numpy()
    # A force is the less certain part of a change of forces.
    size = 1e-3 * s.force_scale
    yield against_difference(
        s,
        "hessian",
        found,
        truth,
        size=size,
        noise=s.largest_force,
        detail="times a random vector",
    )


def _box_derivative(s: Subject) -> Iterator[ModelCheck]:
    if not s.periodic or s.h is None:
        yield skipped("box derivative", "not periodic")
        return
    along = s.rand(3, 3)
    side = 0
    if not s.any_cell:
        # Growing diagonals and shrinking skews keep a reduced cell reduced.
        lower = torch.zeros_like(s.h)
        lower[_BOX_ROWS, _BOX_COLUMNS] = s.rand(6).abs()
        along, side = lower * torch.where(s.h > 0, -0.2, 0.2).fill_diagonal_(1.0), 1
    cell = s.h.clone().requires_grad_(True)
    with torch.enable_grad():
        energy, _ = s.split(s.function(s.x, cell))
        slope = torch.zeros_like(s.h)
        if energy.requires_grad:
            (slope,) = torch.autograd.grad(energy, cell, allow_unused=True, materialize_grads=True)
    h = s.h
    truth = finite_difference(
        lambda t: float(s.energy(s.x, h + t * along)), step=s.step, levels=s.levels, side=side
    )
    work = (slope * along).double()
    size = max(float(work.norm()), 1e-6 * s.energy_scale)
    yield against_difference(
        s,
        "box derivative",
        work.sum().cpu(),
        truth,
        size=size,
        noise=s.largest_energy,
        detail="along a random change of the box",
    )


# Batches and copies ---------------------------------------------------------------------------


def _batch(s: Subject) -> Iterator[ModelCheck]:
    if s.potential is None:
        yield skipped("batch", "a function takes one frame")
        return
    frames = torch.stack([s.x, s.x + 1e-2 * s.rand(*s.x.shape), 1.05 * s.x])
    cells = None if s.h is None else torch.stack([s.h, s.h, 1.05 * s.h])
    with torch.no_grad():
        together = s.potential(frames, cells)
    for i in range(3):
        alone = s.energy(frames[i], None if cells is None else cells[i])
        error = (together[i] - alone).abs()
        yield check("batch", error, s.allowed(alone), f"frame {i} of three")


def _extensivity(s: Subject) -> Iterator[ModelCheck]:
    term = s.neural_term
    if term is None or s.numbers is None or term._buffers["particles"] is not None:
        yield skipped("extensivity", "only a model of atoms can be given other numbers of them")
        return
    twice = neural_potential(term.model, torch.cat([s.numbers, s.numbers]), pbc=term.pbc)
    twice = twice.to(s.device)
    h = s.h
    if s.h is not None and any(s.pbc):
        axis = s.pbc.index(True)
        factors = s.h.new_ones(3, 1)
        factors[axis] = 2.0
        h = factors * s.h
        both, detail = torch.cat([s.x, s.x + s.h[axis]]), "a supercell of two cells"
    else:
        apart = float((s.x.max(dim=0).values - s.x.min(dim=0).values).norm()) + 3 * (s.cutoff or 1)
        both, detail = torch.cat([s.x, s.x + s.x.new_tensor([apart, 0, 0])]), "two copies far apart"
    with torch.no_grad():
        change = (twice(both, h) - 2 * s.energy0).abs()
    yield check("extensivity", change, 2 * s.allowed(), detail)


# The cutoff -----------------------------------------------------------------------------------


def _smoothness(s: Subject) -> Iterator[ModelCheck]:
    if s.cutoff is None:
        yield skipped("smoothness", "pass cutoff= to say where to look")
        return
    crossings = _crossings(s, s.cutoff)
    if not crossings:
        yield skipped("smoothness", "no pair can be moved to the cutoff")
    step = 1e-3 if s.x.dtype == torch.float32 else 1e-5
    for (i, j), moved, along in crossings:

        def jump(t: float, moved: Tensor = moved, along: Tensor = along) -> tuple[Tensor, Tensor]:
            inner, outer = moved - t * along, moved + t * along
            force, beyond = s.forces(inner, s.h), s.forces(outer, s.h)
            # What forces do over the step is no jump of the energy.
            work = -t * ((force + beyond) * along).sum()
            return s.energy(outer, s.h) - s.energy(inner, s.h) - work, beyond - force

        wide_force, half_force = jump(step)[1], jump(step / 2)[1]
        near, near_force = jump(step / 4)
        rtol = max(1e-6, s.rtol)
        allowed = s.allowed() + 0.1 * rtol * s.largest_force * s.cutoff
        detail = f"as particles {i} and {j} pass {s.cutoff:g} nm"
        yield check("smoothness", near.abs(), allowed, f"jump of the energy {detail}")
        # The part that shrinks neither with the step nor with its square.
        left = (8 * near_force - 6 * half_force + wide_force).abs().max() / 3
        allowed = 10 * rtol * s.largest_force
        yield check("smoothness", left, allowed, f"jump of forces {detail}")


def _crossings(s: Subject, cutoff: float) -> list[tuple[tuple[int, int], Tensor, Tensor]]:
    """Pairs that a small move brings to the cutoff: the pair, positions there, and the direction.

    One pair for each kind of pair, if elements are known, and the nearest ones.
    """
    reach = 1.5 * cutoff
    if not s.periodic:
        reach = max(reach, 2 * float((s.x - s.x.mean(dim=0)).norm(dim=-1).max()) + 1e-6)
    box = s.h.unsqueeze(0) if s.periodic and s.h is not None else None
    pbc = (s.pbc[0], s.pbc[1], s.pbc[2])
    pairs = image_pairs(s.x.unsqueeze(0), box, cutoff=reach, pbc=pbc)
    vectors = pairs.displacements(s.x.unsqueeze(0), box)
    distances = vectors.norm(dim=-1)
    found: dict[Any, tuple[tuple[int, int], Tensor, Tensor]] = {}
    for k in (distances - cutoff).abs().argsort().tolist():
        i, j = int(pairs.first[k]), int(pairs.second[k])
        if i == j or float(distances[k]) < 1e-6:
            continue
        kind: Any = len(found)
        if s.numbers is not None:
            kind = tuple(sorted((int(s.numbers[i]), int(s.numbers[j]))))
        if kind in found:
            continue
        along = torch.zeros_like(s.x)
        along[j] = vectors[k] / distances[k]
        found[kind] = (i, j), s.x + (cutoff - distances[k]) * along, along
        if len(found) == 4:
            break
    return list(found.values())


_DO: dict[str, Callable[[Subject], Iterator[ModelCheck]]] = {
    "translation": _translation,
    "rotation": _rotation,
    "inversion": _inversion,
    "permutation": _permutation,
    "lattice": _lattice,
    "forces": _forces,
    "net force": _net_force,
    "torque": _torque,
    "hessian": _hessian,
    "box derivative": _box_derivative,
    "batch": _batch,
    "extensivity": _extensivity,
    "smoothness": _smoothness,
}
