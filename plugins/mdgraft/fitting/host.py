"""What a fit needs from the host that simulates."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mdgraft.frames import Frames
from mdgraft.potentials import Potential


@dataclasses.dataclass(frozen=True, kw_only=True)
class Atoms:
    """Names of the N particles, for selecting among them.

    Attributes
    ----------
    elements, atom_names, residue_names
        One string for each particle; an empty one where there is none.
    """

    elements: Sequence[str]
    atom_names: Sequence[str]
    residue_names: Sequence[str]


class AbstractSimulation(abc.ABC):
    """A system that a host can simulate at the present parameters of its `potential`.

    A host offers it as the service ``simulation``: a function ``open(config, folder, *, trust)``
    of a `SystemConfig`, the folder that its file names are relative to, and whether to load files
    whose loading runs code. Every method is a function of its arguments, the potential's present
    parameters and the configured seed alone, so that an interrupted fit can be continued.
    """

    #: The grafted potential; a fit changes its parameters in place.
    potential: Potential
    #: Number of molecules.
    n_molecules: int
    #: Mass of all particles [Da].
    total_mass: float
    #: Pressure [bar] that frames are sampled at; None at constant volume.
    pressure: float | None
    #: Names of the particles, or None when no topology was given.
    atoms: Atoms | None
    #: Fingerprint of the input files.
    digest: str

    @abc.abstractmethod
    def configuration(self) -> Frames:
        """The input configuration, one frame."""

    @abc.abstractmethod
    def equilibrate(self, start: Frames | None, *, stream: int) -> Frames:
        """Equilibrate and return one frame with velocities.

        Parameters
        ----------
        start
            A frame to start from; None means the input configuration after minimisation.
        stream
            Selects independent random numbers.
        """

    @abc.abstractmethod
    def measure_interval(self, state: Frames, *, stream: int) -> float:
        """Time [ps] between independent frames."""

    @abc.abstractmethod
    def sample_block(
        self, index: int, n_frames: int, state: Frames, *, interval: float, stream: int
    ) -> Frames:
        """Draw one block of frames, starting from the end of the block before."""

    @abc.abstractmethod
    def write(self, path: Path) -> None:
        """Write the system with the present parameters into the host's own file format."""
