"""Sampling a System with OpenMM's own Langevin dynamics and Monte Carlo barostats."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import Frames, InvalidInputError, WrongEnsembleError
from mdgraft._errors import SimulationError
from mdgraft._units import plain as strip_units

from mdgraft_openmm._converter import number
from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm._intervals import decorrelation_interval
from mdgraft_openmm.files import check_box

#: Called with the number of frames done and wanted.
Progress = Callable[[int, int], None]

# Below this many particles the Reference platform is the fastest one.
_SMALL = 48
# Up to this many particles one thread of the CPU platform is nearly as fast as several.
_ONE_THREAD = 2000
# Steps between chances to interrupt.
_STRIDE = 1000
_BAROSTATS = (
    "MonteCarloBarostat",
    "MonteCarloAnisotropicBarostat",
    "MonteCarloFlexibleBarostat",
    "MonteCarloMembraneBarostat",
)
# What each random stream of a run is for.
_EQUILIBRATION, _PILOT, _PRODUCTION = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Streams:
    """Seeds for every random stream of one Context."""

    integrator: int
    barostat: int
    velocities: int

    @staticmethod
    def derive(*key: int) -> _Streams:
        # OpenMM takes 0 as "choose a random seed", so seeds start at 1.
        words = np.random.SeedSequence(key).generate_state(3) % (2**31 - 2) + 1
        return _Streams(integrator=int(words[0]), barostat=int(words[1]), velocities=int(words[2]))


class Sampler:
    """Draws configurations of a System from the NVT or NPT ensemble.

    Runs ``openmm.LangevinMiddleIntegrator`` (Zhang et al., J. Phys. Chem. A 123, 6056, 2019), with
    a Monte Carlo barostat for NPT. The run is cut into blocks. Each block starts in a fresh Context
    from the last frame of the block before and from seeds that follow from ``seed`` and the block's
    number, so a run that is interrupted between blocks continues exactly where it was.

    Parameters
    ----------
    system
        The System. It is copied and never changed.
    topology
        Unused by the dynamics; checked against the System when given.
    positions
        ``(N, 3)`` starting positions [nm]; may be given to `equilibrate` or `sample` instead.
    box
        ``(3, 3)`` starting box vectors as rows [nm]; the System's default box if None.
    temperature
        Temperature [K].
    pressure
        Pressure [bar]. A MonteCarloBarostat is added if the System has no barostat; one that it
        has must agree. None means NVT, or the pressure of the barostat that the System has.
    platform
        Name of an OpenMM platform. By default CUDA or HIP if one works, else CPU, but Reference
        for fewer than 48 particles.
    properties
        Platform properties. The defaults are deterministic forces and, on the CPU platform, one
        thread for systems of up to 2000 particles unless the environment sets
        ``OPENMM_CPU_THREADS``. Larger systems use all cores; then frames are reproducible only up
        to rounding, which grows, unless ``{"Threads": "1"}`` is given.
    seed
        Seed of everything random. The same seed, platform and thread count give the same frames.
    timestep
        Time step [ps].
    friction
        Friction coefficient [1/ps].
    interval
        Time between frames [ps]. None measures it: a pilot run finds the statistical inefficiency
        of the potential energy, and of the volume in NPT.
    equilibration
        Time to equilibrate before the first frame [ps]; the energy is minimised before that.
    pilot
        Length of the pilot run [ps].
    barostat_frequency
        Steps between volume moves of a barostat that is added here.
    block_frames
        Frames in one block.

    Raises
    ------
    InvalidInputError
        For a value that makes no sense; the message names it.
    WrongEnsembleError
        If the System's own barostat or thermostat contradicts ``temperature`` or ``pressure``.

    Notes
    -----
    All numbers may be ``openmm.unit`` quantities. Positions of virtual sites are those that OpenMM
    computes. The CPU platform computes forces in single precision.
    """

    def __init__(
        self,
        system: openmm.System,
        topology: Any = None,
        *,
        positions: Any = None,
        box: Any = None,
        temperature: Any,
        pressure: Any = None,
        platform: str | openmm.Platform | None = None,
        properties: Mapping[str, str] | None = None,
        seed: int = 0,
        timestep: Any = 0.002,
        friction: Any = 1.0,
        interval: Any = None,
        equilibration: Any = 20.0,
        pilot: Any = 20.0,
        barostat_frequency: int = 25,
        block_frames: int = 100,
    ) -> None:
        if not isinstance(system, openmm.System):
            raise InvalidInputError(
                f"system: got {type(system).__qualname__}, wanted an openmm.System"
            )
        self.n_particles = system.getNumParticles()
        if self.n_particles == 0:
            raise InvalidInputError("system: has no particles")
        if topology is not None and not hasattr(topology, "getNumAtoms"):
            raise InvalidInputError(
                f"topology: got {type(topology).__qualname__}, wanted an openmm.app.Topology"
            )
        if topology is not None and topology.getNumAtoms() != self.n_particles:
            raise InvalidInputError(
                f"topology: has {topology.getNumAtoms()} atoms, the system "
                f"{self.n_particles} particles"
            )
        self.temperature = _positive("temperature", temperature, "kelvin")
        self.timestep = _positive("timestep", timestep, "picosecond")
        self.friction = _positive("friction", friction, "picosecond**-1")
        self.equilibration = _positive("equilibration", equilibration, "picosecond", zero=True)
        self.pilot = _positive("pilot", pilot, "picosecond")
        self.interval = None if interval is None else _positive("interval", interval, "picosecond")
        self.seed = _count("seed", seed, 0)
        self.block_frames = _count("block_frames", block_frames, 1)
        self._system = faithful_copy(system)
        self.pressure = self._couple(pressure, _count("barostat_frequency", barostat_frequency, 1))
        if self.interval is not None and self._steps(self.interval) < 1:
            raise InvalidInputError(
                f"interval: got {self.interval:g} ps, shorter than the time step {self.timestep:g}"
            )
        self._platform, self._properties = self._choose(platform, properties)
        self._box = None if box is None else _vectors(box)
        self._start = None if positions is None else self._checked_start(positions)
        self._state: Frames | None = None
        self._block = 0

    # Sampling ---------------------------------------------------------------------------------

    @property
    def sampled(self) -> str:
        """The ensemble: ``"NVT"`` or ``"NPT"``."""
        return "NVT" if self.pressure is None else "NPT"

    @property
    def platform(self) -> str:
        """Name of the platform in use."""
        return str(self._platform.getName())

    @property
    def properties(self) -> dict[str, str]:
        """Properties that the platform is given."""
        return dict(self._properties)

    @property
    def state(self) -> Frames | None:
        """The last state reached, one frame with velocities; None before equilibration."""
        return self._state

    def sample(
        self, n_frames: int, *, positions: Any = None, progress: Progress | None = None
    ) -> Frames:
        """Draw frames, continuing from the last call.

        Parameters
        ----------
        n_frames
            Number of frames F.
        positions
            ``(N, 3)`` starting positions [nm], for the first call if the sampler has none.
        progress
            Called with the number of frames done and wanted.

        Returns
        -------
        Frames
            Positions, velocities and, for a periodic system, boxes, in double precision.

        Raises
        ------
        InvalidInputError
            If there are no starting positions, or they do not fit the System.
        SimulationError
            If the simulation blows up.
        """
        parts = list(self.blocks(n_frames, positions=positions, progress=progress))
        return Frames.concatenate(parts)

    def blocks(
        self, n_frames: int, *, positions: Any = None, progress: Progress | None = None
    ) -> Iterator[Frames]:
        """Draw frames as `sample` does, but hand them out block by block."""
        wanted = _count("n_frames", n_frames, 1)
        if self._state is None:
            self._state = self.equilibrate(positions)
        elif positions is not None:
            raise InvalidInputError(
                "positions: this sampler is under way; make a new Sampler to start elsewhere"
            )
        if self.interval is None:
            self.interval = self.measure_interval(self._state)
        done = 0
        while done < wanted:
            size = min(self.block_frames, wanted - done)
            frames = self.block(self._block, size, self._state)
            self._state, self._block = frames[-1:], self._block + 1
            done += size
            if progress is not None:
                progress(done, wanted)
            yield frames

    def resume(self, state: Frames, block: int) -> None:
        """Continue from a stored state as if ``block`` blocks had just been sampled.

        The state needs velocities, and the sampler the ``interval`` of the run that it continues.
        """
        self._checked_moving(state)
        if self.interval is None:
            raise InvalidInputError(
                "interval: must be that of the run to continue; make this Sampler with interval="
            )
        self._state, self._block = state, _count("block", block, 0)

    # Stages; each is a function of its arguments and the seed alone -----------------------------

    def equilibrate(
        self, positions: Any = None, *, minimize: bool = True, stream: int = 0
    ) -> Frames:
        """Minimise the energy and equilibrate.

        Parameters
        ----------
        positions
            ``(N, 3)`` positions [nm], or `Frames` to start from their last frame, box and
            velocities; the sampler's own if None.
        minimize
            Whether to minimise the energy and draw new velocities first.
        stream
            Number of an independent repetition; other numbers give other random numbers.

        Returns
        -------
        Frames
            One frame with velocities.
        """
        if isinstance(positions, Frames):
            start = self._checked_frame(positions)[-1:]
        elif positions is not None:
            start = self._checked_start(positions)
        elif self._start is not None:
            start = self._start
        else:
            raise InvalidInputError("positions: none given; pass positions= to start from")
        seeds = _Streams.derive(self.seed, _EQUILIBRATION, stream)
        context = self._context(start, seeds)
        if minimize:
            # Constraints hold only after they have been applied once.
            context.applyConstraints(1e-6)
            self._finite_energy(context, "at the starting positions")
            openmm.LocalEnergyMinimizer.minimize(context)
        if minimize or start.velocities is None:
            context.setVelocitiesToTemperature(self.temperature, seeds.velocities)
        self._advance(context, self._steps(self.equilibration), "while equilibrating")
        return self._record(context)

    def measure_interval(self, state: Frames, *, stream: int = 0) -> float:
        """Measure the time [ps] after which frames are statistically independent.

        The larger one of the statistical inefficiencies of the potential energy and, in NPT, of
        the volume, in a pilot run of length `pilot` from ``state``; at most a fifth of that run.
        """
        context = self._context(state, _Streams.derive(self.seed, _PILOT, stream))
        stride = max(1, self._steps(self.pilot) // 400)
        series = []
        for _ in range(max(20, self._steps(self.pilot) // stride)):
            self._advance(context, stride, "in the pilot run")
            now = context.getState(energy=True)
            series.append((number(now.getPotentialEnergy()), number(now.getPeriodicBoxVolume())))
        columns = np.array(series).T if self.sampled == "NPT" else np.array(series).T[:1]
        return decorrelation_interval(columns) * stride * self.timestep

    def block(self, index: int, n_frames: int, state: Frames, *, stream: int = 0) -> Frames:
        """Run one block.

        Parameters
        ----------
        index
            The block's number, from which its seeds follow.
        n_frames
            Number of frames.
        state
            The last frame, with velocities, of the block before or of the equilibration.
        stream
            As in `equilibrate`.
        """
        if self.interval is None:
            raise InvalidInputError(
                "interval: not known yet; pass interval= or call measure_interval() first"
            )
        self._checked_moving(state)
        seeds = _Streams.derive(self.seed, _PRODUCTION, stream, index)
        context = self._context(state, seeds)
        steps = max(1, self._steps(self.interval))
        parts = []
        for frame in range(n_frames):
            self._advance(context, steps, f"in frame {frame} of block {index}")
            parts.append(self._record(context))
        return Frames.concatenate(parts)

    # Host -------------------------------------------------------------------------------------

    def _steps(self, time: float) -> int:
        return round(time / self.timestep)

    def _couple(self, pressure: Any, frequency: int) -> float | None:
        """Bring barostat and thermostats in line with the state asked for."""
        wanted = None if pressure is None else _finite("pressure", pressure, "bar")
        barostats = [f for f in self._system.getForces() if type(f).__name__.endswith("Barostat")]
        if len(barostats) > 1:
            raise InvalidInputError(f"system: has {len(barostats)} barostats, wanted at most one")
        for force in self._system.getForces():
            if isinstance(force, openmm.AndersenThermostat):
                self._agree("thermostat", number(force.getDefaultTemperature()))
        if barostats:
            return self._adopt(barostats[0], wanted)
        if wanted is None:
            return None
        if not self._system.usesPeriodicBoundaryConditions():
            raise InvalidInputError(
                f"pressure: got {wanted:g} bar, but no force of the system is periodic; leave "
                "pressure out for NVT, or make a force periodic"
            )
        self._system.addForce(openmm.MonteCarloBarostat(wanted, self.temperature, frequency))
        return wanted

    def _adopt(self, barostat: Any, wanted: float | None) -> float:
        kind = type(barostat).__name__
        if kind not in _BAROSTATS:
            raise InvalidInputError(
                f"system: a {kind} cannot be used here; use a MonteCarloBarostat"
            )
        self._agree(kind, number(barostat.getDefaultTemperature()))
        given = barostat.getDefaultPressure()
        given = given._value if hasattr(given, "_value") else given
        values = {float(p) for p in np.atleast_1d(np.array(given, dtype=float))}
        if len(values) != 1:
            raise InvalidInputError(
                f"system: the {kind} has different pressures along the axes, {sorted(values)} bar, "
                "which is not an NPT ensemble of one pressure"
            )
        present = values.pop()
        if wanted is not None and not math.isclose(wanted, present, rel_tol=1e-6, abs_tol=1e-9):
            raise WrongEnsembleError(
                f"pressure: got {wanted:g} bar, but the system's {kind} has {present:g} bar; "
                "remove the barostat or pass its pressure"
            )
        if barostat.getFrequency() == 0:
            raise WrongEnsembleError(
                f"system: the {kind} has frequency 0 and never moves the box; remove it for NVT"
            )
        return present

    def _agree(self, kind: str, temperature: float) -> None:
        if not math.isclose(temperature, self.temperature, rel_tol=1e-6):
            raise WrongEnsembleError(
                f"temperature: got {self.temperature:g} K, but the system's {kind} has "
                f"{temperature:g} K; make them agree"
            )

    def _choose(
        self, platform: str | openmm.Platform | None, properties: Mapping[str, str] | None
    ) -> tuple[openmm.Platform, dict[str, str]]:
        if isinstance(platform, openmm.Platform):
            chosen = platform
        elif platform is not None:
            names = _platform_names()
            if platform not in names:
                raise InvalidInputError(f"platform: got {platform!r}, there are {names}")
            chosen = openmm.Platform.getPlatformByName(platform)
        else:
            chosen = openmm.Platform.getPlatformByName(self._default_platform())
        known = set(chosen.getPropertyNames())
        defaults = {"DeterministicForces": "true"}
        threads_chosen = "OPENMM_CPU_THREADS" in os.environ
        if chosen.getName() == "CPU" and self.n_particles <= _ONE_THREAD and not threads_chosen:
            # Even with deterministic forces, several threads do not give the same bits twice.
            defaults["Threads"] = "1"
        merged = {k: v for k, v in defaults.items() if k in known} | {
            key: str(value) for key, value in (properties or {}).items()
        }
        if set(merged) - known:
            raise InvalidInputError(
                f"properties: {sorted(set(merged) - known)} are unknown to the "
                f"{chosen.getName()} platform, which has {sorted(known)}"
            )
        return chosen, merged

    def _default_platform(self) -> str:
        if self.n_particles < _SMALL:
            return "Reference"
        for name in ("CUDA", "HIP"):
            if name in _platform_names() and _works(name):
                return name
        return "CPU"

    def _context(self, start: Frames, seeds: _Streams) -> openmm.Context:
        system = self._system
        for force in system.getForces():
            if hasattr(force, "setRandomNumberSeed"):
                force.setRandomNumberSeed(seeds.barostat)
        integrator = openmm.LangevinMiddleIntegrator(self.temperature, self.friction, self.timestep)
        integrator.setRandomNumberSeed(seeds.integrator)
        try:
            context = openmm.Context(system, integrator, self._platform, self._properties)
            if start.box is not None:
                context.setPeriodicBoxVectors(*start.box[-1].numpy())
            context.setPositions(start.positions[-1].numpy())
            if start.velocities is not None:
                context.setVelocities(start.velocities[-1].numpy())
            context.computeVirtualSites()
        except openmm.OpenMMException as error:
            raise SimulationError(
                f"system: OpenMM's {self.platform} platform cannot run it ({error})"
            ) from error
        return context

    def _advance(self, context: openmm.Context, steps: int, where: str) -> None:
        try:
            # Python sees an interrupt only between calls.
            for done in range(0, steps, _STRIDE):
                context.getIntegrator().step(min(_STRIDE, steps - done))
        except openmm.OpenMMException as error:
            raise SimulationError(
                f"system: the simulation failed {where} ({error}); {self._advice()}"
            ) from error

    def _finite_energy(self, context: openmm.Context, where: str) -> None:
        energy = number(context.getState(energy=True).getPotentialEnergy())
        if not math.isfinite(energy):
            raise SimulationError(
                f"positions: the potential energy is {energy} {where}; do particles coincide?"
            )

    def _record(self, context: openmm.Context) -> Frames:
        state = context.getState(positions=True, velocities=True)
        positions = np.array(state.getPositions(asNumpy=True)._value, dtype=float)
        velocities = np.array(state.getVelocities(asNumpy=True)._value, dtype=float)
        if not (np.isfinite(positions).all() and np.isfinite(velocities).all()):
            raise SimulationError(f"system: the simulation blew up; {self._advice()}")
        box = None
        if self._system.usesPeriodicBoundaryConditions():
            vectors = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value, dtype=float)
            box = torch.from_numpy(vectors)[None]
        return Frames(
            positions=torch.from_numpy(positions)[None],
            velocities=torch.from_numpy(velocities)[None],
            box=box,
            sampled=self.sampled,
        )

    def _advice(self) -> str:
        return (
            f"try a timestep below {self.timestep:g} ps, a longer equilibration, or check the "
            "starting positions and parameters"
        )

    def _checked_start(self, positions: Any) -> Frames:
        try:
            x = _numbers(positions)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"positions: cannot be read as numbers in nm ({error})"
            ) from None
        if x.shape != (self.n_particles, 3):
            raise InvalidInputError(
                f"positions: got shape {x.shape}, wanted ({self.n_particles}, 3) for the system's "
                f"{self.n_particles} particles"
            )
        if not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0, 0])
            raise InvalidInputError(f"positions: NaN or infinity at particle {row}")
        box = None
        if self._system.usesPeriodicBoundaryConditions():
            vectors = self._box
            if vectors is None:
                vectors = _vectors(self._system.getDefaultPeriodicBoxVectors())
            check_box(self._system, vectors)
            box = torch.from_numpy(vectors)[None]
        return Frames(positions=torch.from_numpy(x)[None], box=box)

    def _checked_frame(self, state: Frames) -> Frames:
        if not isinstance(state, Frames):
            raise InvalidInputError(f"state: got {type(state).__name__}, wanted mdgraft.Frames")
        if state.n_particles != self.n_particles:
            raise InvalidInputError(
                f"state: has {state.n_particles} particles, the system {self.n_particles}"
            )
        if self._system.usesPeriodicBoundaryConditions() and state.box is None:
            raise InvalidInputError("state: has no box, but the system is periodic")
        return state

    def _checked_moving(self, state: Frames) -> None:
        if self._checked_frame(state).velocities is None:
            raise InvalidInputError(
                "state: has no velocities, without which a run cannot continue where it was; pass "
                "Sampler.state, or equilibrate(state, minimize=False) to draw new ones"
            )


def _plain(value: Any, unit: str) -> Any:
    """Convert a quantity to a number in the named unit; plain numbers are taken to be in it."""
    if isinstance(value, openmm.unit.Quantity):
        base = unit.removesuffix("**-1")
        wanted = getattr(openmm.unit, base)
        return value.value_in_unit(wanted if base == unit else wanted**-1)
    return value


def _finite(name: str, value: Any, unit: str) -> float:
    try:
        plain = float(_plain(value, unit))
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"{name}: got {value!r}, wanted a number in {unit}") from error
    if not math.isfinite(plain):
        raise InvalidInputError(f"{name}: got {plain}, wanted a finite number in {unit}")
    return plain


def _positive(name: str, value: Any, unit: str, *, zero: bool = False) -> float:
    plain = _finite(name, value, unit)
    if plain < 0 or (plain == 0 and not zero):
        raise InvalidInputError(
            f"{name}: got {plain:g} {unit}, wanted {'zero or more' if zero else 'more than zero'}"
        )
    return plain


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidInputError(f"{name}: got {value!r}, wanted an integer of at least {least}")
    return int(value)


def _numbers(lengths: Any) -> np.ndarray:
    """Quantities, tensors, arrays or lists of lengths as a float64 array [nm]."""
    if torch.is_tensor(lengths):
        return np.array(lengths.detach().cpu().numpy(), dtype=float)
    return np.array(strip_units(lengths), dtype=float)


def _vectors(box: Any) -> np.ndarray:
    vectors = _numbers(box)
    if vectors.shape != (3, 3):
        raise InvalidInputError(
            f"box: got shape {vectors.shape}, wanted (3, 3) with box vectors as rows"
        )
    return vectors


def _platform_names() -> list[str]:
    return [
        openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())
    ]


def _works(name: str) -> bool:
    """Whether a GPU platform has a device here; a platform may be installed without one."""
    probe = openmm.System()
    probe.addParticle(1.0)
    try:
        openmm.Context(
            probe, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(name)
        )
    except openmm.OpenMMException:
        return False
    return True
