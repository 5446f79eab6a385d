"""Many configurations of a small molecule: per-frame gradients of every parameter."""

from __future__ import annotations

from collections.abc import Iterator

import mdgraft
import systems
import torch
from engine import Engine, disagreement
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.frames import Frames
from timing import Moves, Result, Settings, alternate, described


def alanine_frames(settings: Settings) -> Iterator[Result]:
    """Alanine dipeptide in vacuum and in OBC2, beside the fastest loop over a Context."""
    for solvent in ("vacuum", "obc2"):
        yield from _alanine(solvent, settings)


def _alanine(solvent: str, settings: Settings) -> Iterator[Result]:
    n_frames = 50 if settings.quick else 1000
    case = systems.alanine(solvent)
    engines = {
        "Reference": Engine(case, "Reference"),
        "CPU": Engine(case, "CPU", settings.threads),
    }
    dtype = getattr(torch, settings.dtype)
    potential = mdgraft.graft(case.system, dtype=dtype)
    names = [name for name, _ in potential.named_parameters()]
    moves = Moves(systems.trajectory(case, n_frames, 10), "step")
    state: dict[str, torch.Tensor] = {}

    def prepare(count: int) -> None:
        state["numpy"] = moves(count)
        state["positions"] = torch.tensor(state["numpy"], dtype=dtype, requires_grad=True)
        potential.zero_grad()

    def forces() -> None:
        energies = potential(state["positions"])
        energies.sum().backward()
        state["energies"] = energies.detach()

    def gradients() -> None:
        frames = Frames(positions=state["positions"].detach())
        frame_derivatives(potential, frames, names)

    sides = {name: lambda e=engine: e.loop(state["numpy"]) for name, engine in engines.items()}
    found = alternate(prepare, sides | {"forces": forces, "gradients": gradients}, settings.repeats)
    host = engines["Reference"].energies(state["numpy"])
    note = disagreement(float(state["energies"].double().mean()), float(host.mean()))
    best = min(engines, key=lambda name: sorted(found[name])[settings.repeats // 2])
    for work, ours, target in (
        ("E, F, summed dE/dp", found["forces"], None),
        ("E, F, all dE/dp per frame", found["gradients"], 0.333),
    ):
        yield Result(
            row=f"alanine-frames {solvent}",
            work=work,
            beside=f"OpenMM {best}: loop of E, F",
            atoms=case.n_atoms,
            ours=ours,
            theirs=found[best],
            target=target,
            note=note,
            extra={
                "frames": n_frames,
                "parameters": sum(p.numel() for p in potential.parameters()),
                "openmm_seconds": {name: found[name] for name in engines},
            },
            **described(settings, moves=f"{n_frames} frames, step"),
        )
