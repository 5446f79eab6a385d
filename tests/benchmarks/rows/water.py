"""Averages over frames of water, and their gradients by the parameters of its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mdgraft
import numpy as np
import openmm
import systems
import torch
from engine import Engine
from mdgraft.ensembles import Ensemble
from mdgraft.frames import Frames
from mdgraft.potentials import Potential
from timing import Moves, Result, Settings, alternate, described

_TEMPERATURE = 300.0


class Dipole:
    """Squared dipole of the box [e^2 nm^2], which the dielectric constant follows from."""

    def __init__(self, charges: torch.Tensor) -> None:
        self.charges = charges

    def __call__(self, frames: Frames) -> torch.Tensor:
        """Map frames to ``(F,)``."""
        moment = torch.einsum("n,fni->fi", self.charges.to(frames.positions), frames.positions)
        return moment.square().sum(dim=-1)


class Average:
    """Both sides of an average over a box of water.

    Parameters
    ----------
    settings
        Precision and threads.
    n_molecules, n_frames, cutoff
        Size.
    rigid
        Three parameters (charge, sigma, epsilon) if rigid, seven with bonds and angles.
    kind
        How far frames are apart; see `Moves`.
    """

    def __init__(
        self,
        settings: Settings,
        n_molecules: int,
        n_frames: int,
        cutoff: float,
        rigid: bool,
        kind: str,
    ) -> None:
        self.dtype = getattr(torch, settings.dtype)
        case = systems.water_box(n_molecules, rigid, cutoff)
        sampled = systems.water_box(n_molecules, True, cutoff)
        self.case = case
        self.engine = Engine(case, "CPU", settings.threads)
        self.forces = {type(force): force for force in case.system.getForces()}
        self.defaults = read(self.forces)
        self.potential = tie_water(mdgraft.graft(self.engine.context, dtype=self.dtype))
        self.n_frames = n_frames
        self.moves = Moves(systems.trajectory(sampled, n_frames, 10, 0.002), kind)
        charges = self.potential.get_parameter("NonbondedForce.charge").detach().clone()
        self.observable = Dipole(charges)

    @property
    def n_parameters(self) -> int:
        """Scalars that gradients are taken for."""
        return len(self.defaults)

    def prepare(self, count: int) -> None:
        """New frames, with the energies that are known from sampling them."""
        self.numpy = self.moves(count)
        self.generating = torch.tensor(self.engine.energies(self.numpy))
        box = torch.tensor(self.case.box, dtype=self.dtype).expand(len(self.numpy), 3, 3)
        positions = torch.tensor(self.numpy, dtype=self.dtype)
        self.frames = Frames(positions=positions, box=box.contiguous(), sampled="NVT")
        self.potential.zero_grad()

    def _ensemble(self) -> Ensemble:
        return Ensemble(
            self.potential,
            self.frames,
            temperature=_TEMPERATURE,
            generating_energies=self.generating,
        )

    def gradient(self) -> None:
        """Average with a backward pass."""
        self._ensemble().average(self.observable).backward()

    def estimate(self) -> None:
        """Average and gradient, both with standard errors."""
        self._ensemble().estimate(self.observable)

    def loop(self) -> None:
        """OpenMM's energies and forces of all frames."""
        self.engine.loop(self.numpy)

    def differences(self) -> None:
        """Central differences of OpenMM's energies by every parameter, for all frames."""
        for entry in range(self.n_parameters):
            for sign in (1.0, -1.0):
                values = list(self.defaults)
                values[entry] *= 1.0 + sign * 1e-4
                write(self.forces, self.engine.context, values)
                self.engine.energies(self.numpy)
        write(self.forces, self.engine.context, self.defaults)


def tie_water(potential: Potential) -> Potential:
    """Leave one charge, one sigma and one epsilon, and one of each bonded parameter."""
    n_molecules = potential.n_particles // 3
    oxygen = torch.tensor([True, False, False] * n_molecules)
    factors = torch.tensor([-2.0, 1.0, 1.0] * n_molecules, dtype=potential.dtype)
    potential.freeze("*")
    potential.tie("charge", {"NonbondedForce.charge": (torch.ones_like(oxygen), factors)})
    potential.tie("sigma", {"NonbondedForce.sigma": oxygen})
    potential.tie("epsilon", {"NonbondedForce.epsilon": oxygen})
    bonded = {"length": "HarmonicBondForce", "angle": "HarmonicAngleForce"}
    for name, term in bonded.items():
        for key in (name, "k"):
            parameter = dict(potential.named_parameters()).get(f"{term}.{key}")
            if parameter is not None and parameter.numel():
                potential.tie(f"{name}_{key}", {f"{term}.{key}": None})
    return potential


def read(forces: dict[type, openmm.Force]) -> list[float]:
    """The model's charge of hydrogen, sigma and epsilon, and what bonds and angles have."""
    force = forces[openmm.NonbondedForce]
    values = [force.getParticleParameters(1)[0], *force.getParticleParameters(0)[1:]]
    for cls, get in (
        (openmm.HarmonicBondForce, "getBondParameters"),
        (openmm.HarmonicAngleForce, "getAngleParameters"),
    ):
        if cls in forces and _count(forces[cls]):
            values += getattr(forces[cls], get)(0)[-2:]
    return [value._value for value in values]


def write(
    forces: dict[type, openmm.Force], context: openmm.Context, values: Sequence[float]
) -> None:
    """Put parameters, in the order of `read`, into a Context as a fitting program does."""
    charge, sigma, epsilon, *bonded = values
    force = forces[openmm.NonbondedForce]
    for particle in range(0, force.getNumParticles(), 3):
        force.setParticleParameters(particle, -2.0 * charge, sigma, epsilon)
        force.setParticleParameters(particle + 1, charge, 1.0, 0.0)
        force.setParticleParameters(particle + 2, charge, 1.0, 0.0)
    force.updateParametersInContext(context)
    if not bonded:
        return
    for cls, get, put in (
        (openmm.HarmonicBondForce, "getBondParameters", "setBondParameters"),
        (openmm.HarmonicAngleForce, "getAngleParameters", "setAngleParameters"),
    ):
        force = forces[cls]
        for entry in range(_count(force)):
            atoms = getattr(force, get)(entry)[:-2]
            getattr(force, put)(entry, *atoms, *bonded[:2])
        force.updateParametersInContext(context)
        bonded = bonded[2:]


def _count(force: openmm.Force) -> int:
    is_bond = isinstance(force, openmm.HarmonicBondForce)
    return force.getNumBonds() if is_bond else force.getNumAngles()


def water_ensemble(settings: Settings) -> Iterator[Result]:
    """Gradient of an average over frames of 300 molecules beside OpenMM's energies and forces."""
    n_frames = 6 if settings.quick else 500
    for kind in Moves.kinds:
        average = Average(settings, 300, n_frames, 0.9, rigid=True, kind=kind)
        sides = {"theirs": average.loop, "ours": average.gradient, "errors": average.estimate}
        found = alternate(average.prepare, sides, min(settings.repeats, 5))
        for key, work, target in (
            ("ours", f"d<A>/dp, P = {average.n_parameters}", 1.5),
            ("errors", "the same with errors", None),
        ):
            yield Result(
                row="water-ensemble",
                work=work,
                beside="OpenMM CPU: loop of E, F",
                atoms=average.case.n_atoms,
                ours=found[key],
                theirs=found["theirs"],
                target=target,
                extra={"frames": n_frames},
                **described(settings, moves=f"{n_frames} frames, {kind}"),
            )


def finite_differences(settings: Settings) -> Iterator[Result]:
    """An ensemble gradient beside the energies that central differences need: cost per frame."""
    n_frames = 5 if settings.quick else 50
    for rigid in (True, False):
        average = Average(settings, 300, n_frames, 0.9, rigid=rigid, kind="rebuild")
        sides = {"theirs": average.differences, "ours": average.gradient}
        found = alternate(average.prepare, sides, min(settings.repeats, 5))
        per_frame = {key: np.array(values) / n_frames for key, values in found.items()}
        yield Result(
            row="finite-differences",
            work=f"d<A>/dp, P = {average.n_parameters}; a frame",
            beside=f"OpenMM CPU: {2 * average.n_parameters} energies",
            atoms=average.case.n_atoms,
            ours=per_frame["ours"].tolist(),
            theirs=per_frame["theirs"].tolist(),
            extra={"frames": n_frames},
            **described(settings, moves=f"{n_frames} frames, rebuild"),
        )
