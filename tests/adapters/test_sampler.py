"""Sampling with OpenMM: ensembles with a closed form, determinism, restarts, refusals."""

from __future__ import annotations

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch
from mdgraft import Frames, InvalidInputError, WrongEnsembleError
from mdgraft._errors import SimulationError
from mdgraft._units import BAR_NM3, BOLTZMANN
from mdgraft.ensembles import standard_error
from mdgraft_openmm import Sampler

TEMPERATURE = 300.0
KT = BOLTZMANN * TEMPERATURE


def wells(n: int = 8, k: float = 500.0) -> openmm.System:
    """Particles bound to massless anchors, so that every coordinate is a harmonic oscillator."""
    system = openmm.System()
    force = openmm.HarmonicBondForce()
    for i in range(n):
        system.addParticle(0.0)
        system.addParticle(10.0)
        force.addBond(2 * i, 2 * i + 1, 0.0, k)
    system.addForce(force)
    return system


def wells_positions(n: int = 8) -> np.ndarray:
    x = np.zeros((2 * n, 3))
    x[:, 0] = np.repeat(np.arange(n), 2)
    x[1::2, 1] = 0.05
    return x


def ideal_gas(n: int = 20, box: float = 4.0) -> openmm.System:
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([box, 0, 0], [0, box, 0], [0, 0, box])
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.3)
    for _ in range(n):
        system.addParticle(20.0)
        force.addParticle(0.0, 0.1, 0.0)
    system.addForce(force)
    return system


def ideal_gas_positions(n: int = 20, box: float = 4.0) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, box, size=(n, 3))


def harmonic_sampler(**changes: object) -> Sampler:
    settings: dict[str, object] = {
        "positions": wells_positions(),
        "temperature": TEMPERATURE,
        "timestep": 0.01,
        "interval": 0.5,
        "equilibration": 5.0,
        "seed": 3,
        "block_frames": 10,
    } | changes
    return Sampler(wells(), **settings)  # type: ignore[arg-type]


def test_equipartition_of_harmonic_wells() -> None:
    frames = harmonic_sampler(block_frames=500).sample(2000)
    assert frames.sampled == "NVT"
    assert frames.box is None
    assert frames.positions.dtype == torch.float64
    energy = 0.5 * 500.0 * (frames.positions[:, 1::2] - frames.positions[:, ::2]).square()
    energy = energy.sum(dim=(1, 2))
    assert frames.velocities is not None
    kinetic = 0.5 * 10.0 * frames.velocities[:, 1::2].square().sum(dim=(1, 2))
    for series in (energy, kinetic):
        error = float(standard_error(series - series.mean()))
        assert float(series.mean()) == pytest.approx(24 * KT / 2, abs=4 * error)
        assert error < 0.02 * 24 * KT / 2


def test_volume_of_an_ideal_gas() -> None:
    n, pressure = 100, 30.0
    # Each block tunes its step in volume anew; one long block makes that negligible.
    sampler = Sampler(
        ideal_gas(n, 5.0),
        positions=ideal_gas_positions(n, 5.0),
        temperature=TEMPERATURE,
        pressure=pressure,
        timestep=0.02,
        barostat_frequency=1,
        platform="CPU",
        interval=0.2,
        equilibration=20.0,
        block_frames=1000,
        seed=5,
    )
    frames = sampler.sample(1000)
    assert frames.sampled == "NPT"
    assert frames.box is not None
    v = torch.linalg.det(frames.box)
    # p(V) ~ V^n exp(-P V / kT) is a Gamma distribution of shape n + 1.
    scale = KT / (pressure * BAR_NM3)
    for power, expected in ((1, (n + 1) * scale), (2, (n + 1) * (n + 2) * scale**2)):
        series = v**power
        error = float(standard_error(series - series.mean()))
        assert float(series.mean()) == pytest.approx(expected, abs=4 * error)
        assert error < 0.03 * expected


def test_same_seed_same_frames_other_seed_others() -> None:
    first, again = harmonic_sampler().sample(25), harmonic_sampler().sample(25)
    other = harmonic_sampler(seed=4).sample(25)
    assert torch.equal(first.positions, again.positions)
    assert torch.equal(first.velocities, again.velocities)
    assert not torch.allclose(first.positions, other.positions)


@pytest.mark.parametrize("pressure", [None, 30.0])
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_restart_between_blocks_is_exact(pressure: float | None, platform: str) -> None:
    def make() -> Sampler:
        return Sampler(
            ideal_gas(),
            positions=ideal_gas_positions(),
            temperature=TEMPERATURE,
            pressure=pressure,
            platform=platform,
            timestep=0.01,
            interval=0.2,
            equilibration=1.0,
            block_frames=5,
            seed=1,
        )

    whole = make().sample(20)
    resumed = make()
    resumed.resume(whole[9:10], 2)
    rest = resumed.sample(10)
    assert torch.equal(rest.positions, whole.positions[10:])
    assert torch.equal(rest.box, whole.box[10:])


def test_a_run_continues_only_from_a_whole_state() -> None:
    state = harmonic_sampler().sample(1)
    still = Frames(positions=state.positions, box=state.box)
    for attempt in (
        lambda: harmonic_sampler().resume(still, 1),
        lambda: harmonic_sampler().block(0, 1, still),
    ):
        with pytest.raises(InvalidInputError, match="state: has no velocities"):
            attempt()
    with pytest.raises(InvalidInputError, match="interval: must be that of the run"):
        Sampler(wells(), temperature=TEMPERATURE).resume(state, 1)


def test_successive_calls_continue() -> None:
    whole = harmonic_sampler().sample(20)
    sampler = harmonic_sampler()
    assert sampler.state is None
    parts = [sampler.sample(10), sampler.sample(10)]
    assert torch.equal(torch.cat([p.positions for p in parts]), whole.positions)
    assert torch.equal(sampler.state.positions, whole.positions[-1:])


def test_measured_interval_decorrelates() -> None:
    # Overdamped wells: each coordinate is an Ornstein-Uhlenbeck process of time friction m / k.
    relaxation = 50.0 * 10.0 / 500.0
    sampler = harmonic_sampler(interval=None, friction=50.0, pilot=400.0)
    sampler.sample(1)
    # The energy, a square, relaxes twice as fast, and g = 1 + 2 tau/dt spans both sides.
    assert sampler.interval == pytest.approx(2 * relaxation / 2, rel=0.6)


def test_system_is_not_changed() -> None:
    system = ideal_gas()
    before = openmm.XmlSerializer.serialize(system)
    Sampler(
        system,
        positions=ideal_gas_positions(),
        temperature=TEMPERATURE,
        pressure=1.0,
        interval=0.1,
        equilibration=0.1,
    ).sample(2)
    assert openmm.XmlSerializer.serialize(system) == before


def test_units_and_plain_numbers_agree() -> None:
    plain = harmonic_sampler()
    quantities = harmonic_sampler(
        positions=wells_positions() * 10 * unit.angstrom,
        temperature=TEMPERATURE * unit.kelvin,
        timestep=10 * unit.femtosecond,
        interval=0.0005 * unit.nanosecond,
        equilibration=5000 * unit.femtosecond,
        friction=1 / unit.picosecond,
    )
    a, b = plain.sample(5).positions, quantities.sample(5).positions
    assert torch.allclose(a, b, atol=1e-9)
    gas = Sampler(ideal_gas(), temperature=TEMPERATURE, pressure=1 * unit.atmosphere)
    assert gas.pressure == pytest.approx(1.01325)


def test_progress_reports_every_block() -> None:
    calls: list[tuple[int, int]] = []
    harmonic_sampler().sample(25, progress=lambda done, wanted: calls.append((done, wanted)))
    assert calls == [(10, 25), (20, 25), (25, 25)]


def test_default_platforms() -> None:
    assert Sampler(wells(), temperature=TEMPERATURE).platform == "Reference"
    assert Sampler(ideal_gas(200), temperature=TEMPERATURE).platform in ("CPU", "CUDA", "HIP")


def test_barostat_of_the_system_is_used() -> None:
    system = ideal_gas()
    system.addForce(openmm.MonteCarloBarostat(2.0, TEMPERATURE, 5))
    assert Sampler(system, temperature=TEMPERATURE).pressure == pytest.approx(2.0)
    assert Sampler(system, temperature=TEMPERATURE, pressure=2.0).sampled == "NPT"


def test_virtual_sites_are_where_openmm_puts_them() -> None:
    system = openmm.System()
    force = openmm.HarmonicBondForce()
    for mass in (10.0, 10.0, 0.0):
        system.addParticle(mass)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.25, 0.75))
    force.addBond(0, 1, 0.1, 1e4)
    system.addForce(force)
    start = np.array([[0, 0, 0], [0.1, 0, 0], [9, 9, 9]])
    frames = Sampler(
        system, positions=start, temperature=TEMPERATURE, interval=0.1, equilibration=0.1
    ).sample(5)
    expected = 0.25 * frames.positions[:, 0] + 0.75 * frames.positions[:, 1]
    assert torch.allclose(frames.positions[:, 2], expected, atol=1e-12)


def two_barostats() -> openmm.System:
    system = ideal_gas()
    for _ in range(2):
        system.addForce(openmm.MonteCarloBarostat(1.0, TEMPERATURE))
    return system


def with_barostat(pressure: float = 2.0, frequency: int = 25) -> openmm.System:
    system = ideal_gas()
    system.addForce(openmm.MonteCarloBarostat(pressure, TEMPERATURE, frequency))
    return system


def anisotropic() -> openmm.System:
    system = ideal_gas()
    system.addForce(openmm.MonteCarloAnisotropicBarostat(openmm.Vec3(1, 2, 3), TEMPERATURE))
    return system


REFUSED: dict[str, tuple[object, dict[str, object], type[Exception], str]] = {
    "no system": (3, {}, InvalidInputError, r"system: got int"),
    "empty": (openmm.System(), {}, InvalidInputError, "no particles"),
    "temperature": (wells(), {"temperature": -1.0}, InvalidInputError, r"temperature: got -1"),
    "zero temperature": (wells(), {"temperature": 0}, InvalidInputError, "more than zero"),
    "nan temperature": (wells(), {"temperature": np.nan}, InvalidInputError, "finite"),
    "text": (wells(), {"temperature": "warm"}, InvalidInputError, "got 'warm'"),
    "wrong unit": (wells(), {"temperature": 1 * unit.meter}, InvalidInputError, "number in kelvin"),
    "timestep": (wells(), {"timestep": 0.0}, InvalidInputError, "timestep: got 0"),
    "friction": (wells(), {"friction": -1.0}, InvalidInputError, "friction: got -1"),
    "interval": (wells(), {"interval": 1e-4}, InvalidInputError, "shorter than the time step"),
    "seed": (wells(), {"seed": -2}, InvalidInputError, "seed: got -2"),
    "fractional seed": (wells(), {"seed": 1.5}, InvalidInputError, r"seed: got 1\.5"),
    "no box": (wells(), {"pressure": 1.0}, InvalidInputError, "no force of the system is periodic"),
    "platform": (wells(), {"platform": "Abacus"}, InvalidInputError, "platform: got 'Abacus'"),
    "property": (
        wells(),
        {"platform": "Reference", "properties": {"Threads": "2"}},
        InvalidInputError,
        "unknown to the Reference platform",
    ),
    "topology": (wells(), {"topology": "x.pdb"}, InvalidInputError, "topology: got str"),
    "two barostats": (two_barostats(), {}, InvalidInputError, "2 barostats"),
    "other pressure": (with_barostat(), {"pressure": 1.0}, WrongEnsembleError, "has 2 bar"),
    "other temperature": (
        with_barostat(),
        {"temperature": 310.0},
        WrongEnsembleError,
        "has 300 K",
    ),
    "idle barostat": (with_barostat(frequency=0), {}, WrongEnsembleError, "never moves the box"),
    "anisotropic": (anisotropic(), {}, InvalidInputError, "different pressures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused(case: str) -> None:
    system, changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        Sampler(system, **({"temperature": TEMPERATURE} | changes))  # type: ignore[arg-type]


POSITIONS: dict[str, tuple[object, str]] = {
    "none": (None, "none given"),
    "shape": (np.zeros((3, 3)), r"got shape \(3, 3\), wanted \(16, 3\)"),
    "nan": (np.where(np.arange(48).reshape(16, 3) == 7, np.nan, 0.1), "particle 2"),
    "text": ("here", "cannot be read as numbers"),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_bad_positions_are_refused(case: str) -> None:
    positions, message = POSITIONS[case]
    sampler = Sampler(wells(), temperature=TEMPERATURE, interval=1.0)
    with pytest.raises(InvalidInputError, match=message):
        sampler.sample(1, positions=positions)


def test_positions_and_box_may_be_tensors() -> None:
    positions = torch.tensor(ideal_gas_positions(), requires_grad=True)
    sampler = Sampler(
        ideal_gas(),
        positions=positions,
        box=4 * torch.eye(3),
        temperature=TEMPERATURE,
        interval=0.01,
        equilibration=0.0,
    )
    frames = sampler.sample(1)
    assert frames.box is not None
    assert torch.equal(frames.box[0], 4 * torch.eye(3, dtype=torch.float64))


def test_blown_up_simulation_is_an_error() -> None:
    sampler = harmonic_sampler(timestep=5.0, interval=500.0, friction=1e-3, equilibration=0.0)
    with pytest.raises(SimulationError, match="try a timestep below 5 ps"):
        sampler.sample(20)


def test_coincident_particles_are_an_error() -> None:
    system = ideal_gas(2)
    force = system.getForce(0)
    for i in range(2):
        force.setParticleParameters(i, 0.0, 0.2, 1.0)
    sampler = Sampler(system, temperature=TEMPERATURE, interval=0.1)
    with pytest.raises(SimulationError, match="do particles coincide"):
        sampler.sample(1, positions=np.zeros((2, 3)))


def test_small_systems_run_on_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENMM_CPU_THREADS", raising=False)

    def threads(n: int = 20, **settings: object) -> str:
        sampler = Sampler(ideal_gas(n), temperature=TEMPERATURE, platform="CPU", **settings)  # type: ignore[arg-type]
        return sampler.properties.get("Threads", "all")

    assert threads() == "1"
    assert threads(3000) == "all"
    assert threads(properties={"Threads": "2"}) == "2"
