"""OpenMM as the host of a fit: the user's files in, frames and a fitted System out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import openmm
import openmm.app
import torch
from mdgraft import ConfigurationError, Frames, InvalidInputError, graft
from mdgraft.fitting.config import SystemConfig
from mdgraft.fitting.host import AbstractSimulation, Atoms

from mdgraft_openmm._converter import number
from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm.files import check_box, read_positions, read_system
from mdgraft_openmm.sampler import Sampler
from mdgraft_openmm.write import write_parameters

_ROLES = ("system", "positions", "topology")
_READERS = {
    ".pdb": openmm.app.PDBFile,
    ".cif": openmm.app.PDBxFile,
    ".mmcif": openmm.app.PDBxFile,
    ".pdbx": openmm.app.PDBxFile,
}


class OpenMMSimulation(AbstractSimulation):
    """A serialised System, sampled by OpenMM.

    Parameters
    ----------
    config
        Files and settings.
    folder
        What file names are relative to.
    trust
        Load files whose deserialisation runs code.

    Raises
    ------
    ConfigurationError
        If a file is not named, or a system that is called rigid is not.
    InvalidInputError
        If a file is missing or corrupt, or the files do not fit each other.
    UntrustedInputError
        If loading a file would run code and ``trust`` is false.
    UnsupportedForceError
        If the System holds forces without a torch form.
    """

    def __init__(self, config: SystemConfig, folder: Path, *, trust: bool = False) -> None:
        files = self._files(config, folder)
        self._config = config
        self._system = read_system(files["system"], trust=trust)
        n = self._system.getNumParticles()
        positions, box = read_positions(files["positions"], n_particles=n, trust=trust)
        if box is None:
            vectors = self._system.getDefaultPeriodicBoxVectors()
            box = np.array([[number(x) for x in row] for row in vectors])
        check_box(self._system, box)
        self._positions, self._box = positions, box
        self.potential = graft(self._system)
        self.atoms = _read_atoms(files, n)
        self.total_mass = sum(number(self._system.getParticleMass(i)) for i in range(n))
        self.n_molecules = _count_molecules(self._system)
        self.digest = hashlib.sha256(
            b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files.values())
        ).hexdigest()
        self.pressure = config.pressure
        if config.rigid:
            self._positions = self._rigid_positions()
        else:
            interval = None if config.interval == "auto" else config.interval
            self.pressure = self._sampler(interval).pressure

    @staticmethod
    def _files(config: SystemConfig, folder: Path) -> dict[str, Path]:
        unknown = set(config.files) - set(_ROLES)
        if unknown:
            raise ConfigurationError(
                f"files: {sorted(unknown)} are unknown to OpenMM, which takes {', '.join(_ROLES)}"
            )
        for role in _ROLES[:2]:
            if role not in config.files:
                raise ConfigurationError(
                    f"files: {role} is missing; name a serialised System as system, and a "
                    "serialised State, a .pdb or a .cif file as positions"
                )
        return {role: folder / config.files[role] for role in _ROLES if role in config.files}

    # Sampling ---------------------------------------------------------------------------------

    def configuration(self) -> Frames:
        """The input configuration, one frame."""
        periodic = self._system.usesPeriodicBoundaryConditions()
        return Frames(
            positions=torch.from_numpy(self._positions)[None],
            box=torch.from_numpy(self._box)[None] if periodic else None,
        )

    def equilibrate(self, start: Frames | None, *, stream: int) -> Frames:
        """Equilibrate, after minimisation when starting from the input configuration."""
        begin = self._positions if start is None else start
        return self._sampler().equilibrate(begin, minimize=start is None, stream=stream)

    def measure_interval(self, state: Frames, *, stream: int) -> float:
        """Time [ps] between independent frames, from a pilot run."""
        return self._sampler().measure_interval(state, stream=stream)

    def sample_block(
        self, index: int, n_frames: int, state: Frames, *, interval: float, stream: int
    ) -> Frames:
        """Draw one block of frames."""
        return self._sampler(interval).block(index, n_frames, state, stream=stream)

    def write(self, path: Path) -> None:
        """Write a serialised System that plain OpenMM loads."""
        path.write_text(openmm.XmlSerializer.serialize(self._parametrised()), encoding="utf-8")

    def _parametrised(self) -> openmm.System:
        system = faithful_copy(self._system)
        write_parameters(self.potential, system)
        return system

    def _sampler(self, interval: float | None = None) -> Sampler:
        config = self._config
        return Sampler(
            self._parametrised(),
            box=self._box,
            temperature=config.temperature,
            pressure=config.pressure,
            platform=config.platform,
            properties=config.properties,
            seed=config.seed,
            timestep=config.timestep,
            friction=config.friction,
            interval=interval,
            equilibration=config.equilibration,
            barostat_frequency=config.barostat_frequency,
        )

    # Structure --------------------------------------------------------------------------------

    def _rigid_positions(self) -> np.ndarray:
        """Positions that satisfy the constraints, which must fix every internal coordinate."""
        integrator = openmm.VerletIntegrator(0.001)
        reference = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(self._system, integrator, reference)
        context.setPeriodicBoxVectors(*self._box)
        context.setPositions(self._positions)
        context.applyConstraints(1e-10)
        context.computeVirtualSites()
        x = np.array(context.getState(positions=True).getPositions(asNumpy=True)._value, float)
        real = [i for i in range(len(x)) if not self._system.isVirtualSite(i)]
        place = {atom: k for k, atom in enumerate(real)}
        rows = np.zeros((self._system.getNumConstraints(), 3 * len(real)))
        for row in range(len(rows)):
            a, b, _ = self._system.getConstraintParameters(row)
            for atom, difference in ((a, x[a] - x[b]), (b, x[b] - x[a])):
                rows[row, 3 * place[atom] : 3 * place[atom] + 3] = difference
        # Translations and rotations are the only motions that may remain.
        centred = x[real] - x[real].mean(axis=0)
        axes = np.eye(3)
        motions = [np.tile(axis, len(real)) for axis in axes]
        motions += [np.cross(axis, centred).reshape(-1) for axis in axes]
        free = 3 * len(real) - (np.linalg.matrix_rank(rows) if len(rows) else 0)
        allowed = int(np.linalg.matrix_rank(np.array(motions), tol=1e-6))
        if free > allowed:
            raise ConfigurationError(
                f"rigid: {free - allowed} internal degrees of freedom are not constrained, so the "
                "energy varies and must be sampled; leave rigid out"
            )
        return x


def open_simulation(config: SystemConfig, folder: Path, *, trust: bool = False) -> OpenMMSimulation:
    """Open a system for `mdgraft.fitting`; see `OpenMMSimulation`."""
    return OpenMMSimulation(config, folder, trust=trust)


def _count_molecules(system: openmm.System) -> int:
    reference = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), reference)
    return len(context.getMolecules())


def _read_atoms(files: dict[str, Path], n_particles: int) -> Atoms | None:
    """Names from the topology, or from the positions if these are in a structure file."""
    path = files.get("topology", files["positions"])
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        if "topology" in files:
            raise InvalidInputError(
                f"topology: got {path.name}, wanted a file that ends in {', '.join(_READERS)}"
            )
        return None
    try:
        atoms = list(reader(str(path)).topology.atoms())
    # The readers raise whatever their parsing runs into.
    except Exception as error:
        raise InvalidInputError(
            f"topology: {path} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if len(atoms) != n_particles:
        raise InvalidInputError(
            f"topology: {path} holds {len(atoms)} atoms, the system {n_particles} particles"
        )
    return Atoms(
        elements=[atom.element.symbol if atom.element is not None else "" for atom in atoms],
        atom_names=[atom.name for atom in atoms],
        residue_names=[atom.residue.name for atom in atoms],
    )
