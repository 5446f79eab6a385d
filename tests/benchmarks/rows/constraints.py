"""Constraints: what their derivatives cost beside the projections themselves."""

from __future__ import annotations

from collections.abc import Iterator

import mdgraft_openmm
import numpy as np
import openmm
import torch
from mdgraft.constraints import ConstraintSet
from timing import Moves, Result, Settings, alternate, described

_MASSES = (15.99943, 1.007947, 1.007947)
_PAIRS = ((0, 1, 0.09572), (0, 2, 0.09572), (1, 2, 0.15139))


def constraints(settings: Settings) -> Iterator[Result]:
    """A box of 10,000 rigid waters: SHAKE and RATTLE, forward, backward, and OpenMM's SETTLE."""
    n_molecules = 1000 if settings.quick else 10_000
    dtype = getattr(torch, settings.dtype)
    system = _water(n_molecules)
    model = mdgraft_openmm.constraints(system, dtype=dtype).requires_grad_()
    old = model.double().project_positions(_places(n_molecules)).detach()
    model = model.to(dtype)
    moves = Moves(old.numpy(), "step")
    integrator = openmm.VerletIntegrator(0.001)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(system, integrator, platform, {"Threads": str(settings.threads)})
    kinds = (("positions", context.applyConstraints), ("velocities", None))
    for kind, by_host in kinds:
        state: dict[str, torch.Tensor] = {}

        def prepare(count: int, state: dict[str, torch.Tensor] = state) -> None:
            trial = moves(count)
            context.setPositions(trial)
            state["trial"] = torch.tensor(trial, dtype=dtype, requires_grad=True)
            state["reference"] = old.to(dtype).requires_grad_()
            state["seed"] = torch.randn_like(state["reference"])

        def forward(kind: str = kind, state: dict[str, torch.Tensor] = state) -> None:
            state["found"] = _project(model, kind, state["trial"], state["reference"])

        def backward(state: dict[str, torch.Tensor] = state) -> None:
            torch.autograd.grad(
                state["found"],
                (state["trial"], state["reference"], model.masses),
                state["seed"],
            )

        sides = {"forward": forward, "backward": backward}
        if by_host is not None:
            sides["openmm"] = lambda apply=by_host: apply(1e-6)
        found = alternate(prepare, sides, settings.repeats)
        common = described(settings, row="constraints", atoms=3 * n_molecules, moves="step")
        yield Result(
            work=f"{kind}: backward (x, reference, masses)",
            beside="mdgraft: forward",
            ours=found["backward"],
            theirs=found["forward"],
            target=2.0,
            **common,
        )
        if by_host is not None:
            yield Result(
                work=f"{kind}: forward",
                beside="OpenMM CPU: applyConstraints",
                ours=found["forward"],
                theirs=found["openmm"],
                **common,
            )


def _project(
    model: ConstraintSet, kind: str, trial: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    if kind == "positions":
        return model.project_positions(trial, reference)
    return model.project_velocities(trial, reference)


def _water(n_molecules: int) -> openmm.System:
    system = openmm.System()
    for first in range(0, 3 * n_molecules, 3):
        for mass in _MASSES:
            system.addParticle(mass)
        for i, j, length in _PAIRS:
            system.addConstraint(first + i, first + j, length)
    return system


def _places(n_molecules: int) -> np.ndarray:
    """Molecules on a grid, each turned at random."""
    random = np.random.default_rng(1)
    side = int(np.ceil(n_molecules ** (1 / 3)))
    grid = 0.31 * np.stack(np.unravel_index(np.arange(n_molecules), (side,) * 3), axis=-1)
    shape = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]])
    turns = np.linalg.qr(random.normal(size=(n_molecules, 3, 3)))[0]
    return (grid[:, None] + shape @ turns).reshape(-1, 3)
