"""The derivative of a trajectory's end in everything that it began with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import systems
import torch
from engine import Engine
from grafted import Graft
from timing import Result, Settings, alternate, described

_MASS, _STEP = 39.9, 0.001


def verlet(settings: Settings) -> Iterator[Result]:
    """Velocity Verlet of 512 Lennard-Jones atoms and its adjoint, beside OpenMM without one."""
    n_steps = 50 if settings.quick else 1000
    case = systems.lennard_jones(8)
    engine = Engine(case, "CPU", settings.threads)
    graft = Graft(engine, case, settings)
    kicks = np.random.default_rng(3).normal(size=case.positions.shape) * 0.2
    velocities = torch.tensor(kicks, dtype=graft.dtype)

    def prepare(count: int) -> None:
        graft.place(case.positions)
        engine.context.setPositions(case.positions)
        engine.context.setVelocities(kicks)

    def theirs() -> None:
        engine.context.getIntegrator().step(n_steps)
        engine.context.getState(positions=True)

    def ours() -> None:
        _adjoint(graft, velocities, n_steps)

    found = alternate(prepare, {"theirs": theirs, "ours": ours}, min(settings.repeats, 3))
    yield Result(
        row="verlet",
        work=f"{n_steps} steps, d(end)/d(start, all parameters)",
        beside=f"OpenMM CPU: {n_steps} steps",
        atoms=case.n_atoms,
        ours=found["ours"],
        theirs=found["theirs"],
        **described(settings),
    )


def _adjoint(graft: Graft, velocities: torch.Tensor, n_steps: int) -> torch.Tensor:
    """Derivative of the sum of squared final positions in the first ones and in parameters.

    Leapfrog, v += f(x) dt/m and x += v dt, backwards: an adjoint of the velocity is multiplied by
    the derivative of the force, which is a Hessian-vector product.
    """
    potential, box = graft.potential, graft.box.detach()
    parameters = list(potential.parameters())
    x, v, path = graft.positions.detach(), velocities, []
    for _ in range(n_steps):
        path.append(x)
        y = x.requires_grad_()
        (slope,) = torch.autograd.grad(potential(y, box), y)
        v = v - slope * (_STEP / _MASS)
        x = x.detach() + _STEP * v
    of_x, of_v = 2 * x, torch.zeros_like(x)
    total = [torch.zeros_like(p) for p in parameters]
    for x in reversed(path):
        of_v = of_v + _STEP * of_x
        y = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(potential(y, box), y, create_graph=True)
        change, *more = torch.autograd.grad(
            slope, [y, *parameters], -of_v * (_STEP / _MASS), allow_unused=True
        )
        of_x = of_x + change
        total = [t if m is None else t + m for t, m in zip(total, more, strict=True)]
    return of_x


def lists(settings: Settings) -> Iterator[Result]:
    """Lists of all pairs within 1.0 nm in the protein box, from nothing."""
    from mdgraft.kernels.fused.clusters import Exclusions, tile_list
    from mdgraft.kernels.fused.half_list import half_list

    case = systems.protein(settings.quick, settings.output, settings.protein_file)
    nothing = Exclusions.of_pairs(np.empty((0, 2), dtype=np.int64), case.n_atoms)
    positions, box = case.positions, case.box
    assert box is not None
    sides = {
        "tiles for compiled loops": lambda: tile_list(positions, box, 1.0, nothing, 16),
        "half list": lambda: half_list(positions, box, 1.0, n_threads=settings.threads),
    }
    try:
        import vesin

        def other() -> None:
            search = vesin.NeighborList(cutoff=1.0, full_list=False, n_threads=settings.threads)
            search.compute(points=positions, box=box, periodic=True, quantities="ij")

        sides["half list by vesin"] = other
    except ImportError:
        pass
    found = alternate(lambda count: None, sides, settings.repeats)
    for name, seconds in found.items():
        yield Result(
            row="lists", work=name, atoms=case.n_atoms, ours=seconds, **described(settings)
        )
