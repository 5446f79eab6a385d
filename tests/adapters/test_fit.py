"""Whole fits through OpenMM: closed forms, interruption, failure."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from mdgraft import ConfigurationError, InvalidInputError, UntrustedInputError
from mdgraft._errors import SimulationError
from mdgraft._units import BAR_NM3, BOLTZMANN
from mdgraft.fitting import load_config, run
from mdgraft.fitting.parameters import tie_parameters
from mdgraft_openmm.simulation import open_simulation

TEMPERATURE = 300.0
KT = BOLTZMANN * TEMPERATURE
N_DIMERS, K, LENGTH = 10, 2000.0, 0.30

OBSERVABLES = """
import torch

def bond(frames):
    return (frames.positions[:, 1::2] - frames.positions[:, ::2]).norm(dim=-1).mean(dim=-1)

def scaled_energy(frames, potential):
    return 2.0 * potential(frames.positions, frames.box)

def vector(frames):
    return frames.positions[:, 0]

def broken(frames):
    raise RuntimeError("no such thing")
"""

DIMERS = """
[systems.dimers]
files = { system = "system.xml", positions = "state.xml" }
temperature = 300.0
timestep = 0.01
friction = 2.0
interval = 0.5
equilibration = 5.0
frames = 60
block_frames = 20
seed = 11

[parameters.length]
select = "HarmonicBondForce.length"
bounds = [0.05, 1.0]

[targets.distance]
observable = "fit_observables:bond"
value = 0.40
uncertainty = 0.002
"""


def write_system(
    folder: Path, system: openmm.System, positions: np.ndarray, stem: str = ""
) -> None:
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    state = context.getState(positions=True)
    (folder / f"{stem}system.xml").write_text(openmm.XmlSerializer.serialize(system))
    (folder / f"{stem}state.xml").write_text(openmm.XmlSerializer.serialize(state))


def dimers(n: int = N_DIMERS, *, box: float | None = None) -> tuple[openmm.System, np.ndarray]:
    system = openmm.System()
    bonds = openmm.HarmonicBondForce()
    for i in range(n):
        system.addParticle(12.0)
        system.addParticle(12.0)
        bonds.addBond(2 * i, 2 * i + 1, LENGTH, K)
    system.addForce(bonds)
    if box is not None:
        system.setDefaultPeriodicBoxVectors([box, 0, 0], [0, box, 0], [0, 0, box])
        none = openmm.NonbondedForce()
        none.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
        none.setCutoffDistance(0.5)
        for _ in range(2 * n):
            none.addParticle(0.0, 0.1, 0.0)
        system.addForce(none)
    x = np.random.default_rng(2).uniform(0, box or 3.0, size=(n, 1, 3)).repeat(2, axis=1)
    x[:, 1, 0] += LENGTH
    return system, x.reshape(-1, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_system(tmp_path, *dimers())
    (tmp_path / "fit_observables.py").write_text(OBSERVABLES)
    return tmp_path


def write_config(folder: Path, text: str = DIMERS, name: str = "fit.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path) as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def mean_distance(length: float) -> float:
    """<r> for a density r^2 exp(-K (r - length)^2 / 2 kT) of one dimer."""
    r = np.linspace(1e-4, 2.0, 20001)
    weight = r**2 * np.exp(-0.5 * K * (r - length) ** 2 / KT)
    return float((r * weight).sum() / weight.sum())


def best_length(target: float) -> float:
    low, high = 0.05, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean_distance(middle) < target else (low, middle)
    return low


METHODS = [
    "gauss_newton",
    "scipy.least_squares",
    "scipy.L-BFGS-B",
    "scipy.Nelder-Mead",
    "scipy.trust-exact",
    "torch.LBFGS",
    "torch.Adam",
]


@pytest.mark.parametrize("method", METHODS)
def test_fit_reaches_the_closed_form(method: str, folder: Path) -> None:
    options = {"torch.Adam": "options = { lr = 0.1 }", "torch.LBFGS": "options = { lr = 0.5 }"}
    text = DIMERS + f'\n[optimizer]\nmethod = "{method}"\n{options.get(method, "")}\n'
    text += "\n[convergence]\nmax_iterations = 80\n"
    result = run(write_config(folder, text), output=folder / "out")
    assert result.converged
    assert result.reason == "targets_met"
    found = result.parameters["length"]
    assert found["value"] == pytest.approx(best_length(0.40), abs=4 * found["standard_error"])
    assert found["standard_error"] < 0.005

    rows = rows_of(result.history)
    last = rows[-1]
    assert last["resampled"] == 1
    assert last["targets_met"] == 1
    assert abs(last["distance"] - 0.40) <= last["distance_standard_error"]
    assert last["length"] == found["value"]
    # Far from the start frames cannot be reweighted, so there must be fresh ones on the way.
    assert sum(row["resampled"] for row in rows) >= 2
    for row in rows:
        expected = mean_distance(row["length"])
        assert row["distance"] == pytest.approx(expected, abs=5 * row["distance_standard_error"])
        slope = (mean_distance(row["length"] + 1e-4) - mean_distance(row["length"] - 1e-4)) / 2e-4
        assert row["d_distance_d_length"] == pytest.approx(
            slope, abs=5 * row["d_distance_d_length_standard_error"]
        )
        if row["resampled"]:
            assert row["effective_sample_size_dimers"] == 60
        else:
            assert 30 <= row["effective_sample_size_dimers"] <= 60


def test_fitted_system_loads_in_plain_openmm(folder: Path) -> None:
    result = run(write_config(folder), output=folder / "out")
    system = openmm.XmlSerializer.deserialize((folder / "out" / "system.xml").read_text())
    bonds = system.getForce(0)
    for i in range(bonds.getNumBonds()):
        _, _, length, k = bonds.getBondParameters(i)
        assert length._value == result.parameters["length"]["value"]
        assert k._value == K
    stored = json.loads((folder / "out" / "parameters.json").read_text())
    assert stored["parameters"]["length"]["value"] == result.parameters["length"]["value"]
    assert stored["converged"] is True
    assert (folder / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result.to_json(), allow_nan=False)
    assert "converged after" in result.summary()


def test_same_seed_same_history(folder: Path) -> None:
    config = write_config(folder)
    first = run(config, output=folder / "a").history.read_bytes()
    assert run(config, output=folder / "b").history.read_bytes() == first


def test_previous_run_is_moved_aside(folder: Path) -> None:
    config = write_config(folder, DIMERS + "\n[convergence]\nmax_iterations = 1\n")
    for _ in range(3):
        run(config, output=folder / "out")
    assert sorted(p.name for p in folder.glob("out*")) == ["out", "out.1", "out.2"]


def test_foreign_folder_is_left_alone(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="not from a fit"):
        run(write_config(folder), output=folder)


def test_unreached_targets_are_not_converged(folder: Path) -> None:
    config = write_config(folder, DIMERS + "\n[convergence]\nmax_iterations = 2\n")
    result = run(config, output=folder / "out")
    assert not result.converged
    assert result.reason == "max_iterations"
    assert result.iterations == len(rows_of(result.history)) == 2
    assert not result.targets["distance"]["met"]
    assert "NOT CONVERGED" in result.summary()
    assert (folder / "out" / "system.xml").exists()
    # More iterations are the one change that a resumed run may have.
    more = write_config(folder, DIMERS + "\n[convergence]\nmax_iterations = 40\n")
    resumed = run(more, output=folder / "out", resume=True)
    assert resumed.converged
    whole = run(more, output=folder / "whole")
    assert resumed.history.read_bytes() == whole.history.read_bytes()


def test_target_out_of_bounds_stalls(folder: Path) -> None:
    text = DIMERS.replace("bounds = [0.05, 1.0]", "bounds = [0.05, 0.32]")
    result = run(write_config(folder, text), output=folder / "out")
    assert not result.converged
    assert result.reason == "stalled"
    assert result.parameters["length"]["value"] == pytest.approx(0.32)
    assert "may not be reachable" in result.summary()


def test_tolerance_may_include_the_uncertainty_of_the_target(folder: Path) -> None:
    text = DIMERS.replace("uncertainty = 0.002", "uncertainty = 0.2")
    text += "\n[convergence]\ntarget_uncertainty = true\n"
    result = run(write_config(folder, text), output=folder / "out")
    assert result.converged
    assert result.iterations == 1


def test_interval_can_be_measured(folder: Path) -> None:
    text = DIMERS.replace("interval = 0.5", 'interval = "auto"')
    result = run(write_config(folder, text), output=folder / "out")
    assert result.converged
    (path,) = (folder / "out").glob("frames/*/*/equilibrated.npz")
    with np.load(path) as stored:
        # Bonds of a relaxation time of about 1 ps cannot need more than the pilot's limit.
        assert 0.05 < float(stored["interval"]) <= 20.0 * 0.8 / 5


def test_resume_refuses_another_configuration(folder: Path) -> None:
    config = write_config(folder, DIMERS + "\n[convergence]\nmax_iterations = 1\n")
    run(config, output=folder / "out")
    write_config(folder, DIMERS.replace("seed = 11", "seed = 12"))
    with pytest.raises(ConfigurationError, match="made with another configuration"):
        run(config, output=folder / "out", resume=True)
    write_config(folder, DIMERS + "\n[convergence]\nmax_iterations = 1\n")
    write_system(folder, *dimers(5))
    with pytest.raises(ConfigurationError, match="made with other input files"):
        run(config, output=folder / "out", resume=True)
    write_system(folder, *dimers())
    (folder / "fit_observables.py").write_text(OBSERVABLES.replace("mean(dim=-1)", "amax(dim=-1)"))
    with pytest.raises(ConfigurationError, match="made with other input files"):
        run(config, output=folder / "out", resume=True)


def test_torn_journal_line_is_dropped(folder: Path) -> None:
    config = write_config(folder)
    whole = run(config, output=folder / "whole").history.read_bytes()
    result = run(config, output=folder / "out")
    journal = folder / "out" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    assert run(config, output=folder / "out", resume=True).history.read_bytes() == whole
    assert result.converged


def test_damaged_journal_is_an_error(folder: Path) -> None:
    config = write_config(folder)
    run(config, output=folder / "out")
    journal = folder / "out" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"nonsense\n" + b"".join(lines[2:]))
    with pytest.raises(ConfigurationError, match="is damaged"):
        run(config, output=folder / "out", resume=True)


# SIGKILL, from outside, at moments that nobody chose.
_RUN = """
import sys
from mdgraft.fitting import run
run(sys.argv[1], output=sys.argv[2], resume="--resume" in sys.argv)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_killed_run_resumes_to_the_same_history(folder: Path) -> None:
    text = DIMERS.replace("interval = 0.5", "interval = 4.0").replace(
        "block_frames = 20", "block_frames = 5"
    )
    config = write_config(folder, text)
    whole = run(config, output=folder / "whole")
    command = [sys.executable, "-c", _RUN, str(config), str(folder / "out")]
    out, kills = folder / "out", 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for wanted in (2, 7, 13):
        process = subprocess.Popen([*command, "--resume"], env=environment)
        deadline = time.monotonic() + 60
        # Kill once a few more files than last time are there, wherever the run then is.
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("frames/*/*/*.npz"))) + _journal_lines(out) >= wanted:
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(timeout=30)
    assert kills >= 2
    resumed = run(config, output=out, resume=True)
    assert resumed.history.read_bytes() == whole.history.read_bytes()
    assert resumed.parameters == whole.parameters
    assert (out / "system.xml").read_bytes() == (folder / "whole" / "system.xml").read_bytes()
    # Nothing was done twice: a second resume finds everything in the journal.
    before = (out / "journal.jsonl").read_bytes()
    assert run(config, output=out, resume=True).converged
    assert (out / "journal.jsonl").read_bytes() == before


def _journal_lines(folder: Path) -> int:
    path = folder / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Thermodynamics --------------------------------------------------------------------------------

LIQUID = """
[systems.liquid]
files = { system = "system.xml", positions = "state.xml" }
temperature = 300.0
pressure = 50.0
timestep = 0.01
friction = 2.0
interval = 0.5
equilibration = 20.0
barostat_frequency = 2
frames = 150
seed = 5

[systems.gas]
files = { system = "gas_system.xml", positions = "gas_state.xml" }
temperature = 300.0
timestep = 0.01
friction = 2.0
interval = 0.5
frames = 150
seed = 6
GAS_IS_RIGID

[parameters.k]
select = "HarmonicBondForce.k"

[targets.density]
value = 100.0
uncertainty = 1.0

[targets.heat_of_vaporization]
value = 1.0
uncertainty = 1.0
gas = "gas"

[targets.energy]
observable = "potential_energy"
value = 0.1
uncertainty = 1.0
unit = "kcal/mol"

[targets.twice]
observable = "fit_observables:scaled_energy"
value = 0.0
uncertainty = 1.0

[targets.volume]
value = 1.0
uncertainty = 1.0
unit = "A^3"

[convergence]
max_iterations = 1
"""


def test_ideal_dimers_have_the_closed_form_thermodynamics(tmp_path: Path) -> None:
    n = 40
    write_system(tmp_path, *dimers(n, box=4.0))
    write_system(tmp_path, *dimers(1), stem="gas_")
    (tmp_path / "fit_observables.py").write_text(OBSERVABLES)
    config = write_config(tmp_path, LIQUID.replace("GAS_IS_RIGID", ""))
    result = run(config, output=tmp_path / "out")
    row = rows_of(result.history)[0]
    # <U> of one dimer: half kT, and a little for the volume element r^2.
    r = np.linspace(1e-4, 1.5, 20001)
    weight = r**2 * np.exp(-0.5 * K * (r - LENGTH) ** 2 / KT)
    u = float((0.5 * K * (r - LENGTH) ** 2 * weight).sum() / weight.sum())
    scale = KT / (50.0 * BAR_NM3)
    density = 24.0 * n * 1.66053906892 / (n * scale)
    expected = {
        "density": density,  # <1/V> of a Gamma distribution of shape n + 1
        "heat_of_vaporization": KT - KT * (n + 1) / n,
        "energy": n * u / 4.184,
        "twice": 2 * n * u,
        "volume": (n + 1) * scale * 1000.0,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=4 * row[f"{name}_standard_error"]), name
        assert row[f"{name}_standard_error"] > 0
    # kT/2 per bond whatever k is, up to the same small term; and no coupling to the volume.
    slope = row["d_energy_d_k"]
    assert slope == pytest.approx(0.0, abs=4 * row["d_energy_d_k_standard_error"] + 1e-4)
    assert row["d_twice_d_k"] == pytest.approx(2 * 4.184 * slope, rel=1e-9)
    assert sorted(p.name for p in result.systems.values()) == ["system.xml", "system_gas.xml"]


def test_rigid_gas_is_evaluated_exactly(tmp_path: Path) -> None:
    n = 20
    system, positions = dimers(n, box=4.0)
    write_system(tmp_path, system, positions)
    gas = openmm.System()
    bonds = openmm.HarmonicBondForce()
    gas.addParticle(12.0)
    gas.addParticle(12.0)
    gas.addConstraint(0, 1, 0.35)
    bonds.addBond(0, 1, LENGTH, K)
    gas.addForce(bonds)
    # The input violates the constraint, which must hold where the energy is evaluated.
    write_system(tmp_path, gas, np.array([[0, 0, 0], [0.31, 0, 0]]), stem="gas_")
    (tmp_path / "fit_observables.py").write_text(OBSERVABLES)
    text = LIQUID.replace("GAS_IS_RIGID", "rigid = true").replace("frames = 150", "frames = 20")
    text = text.replace('"HarmonicBondForce.k"', '{ parameter = "HarmonicBondForce.k" }')
    text += """target_uncertainty = true

[targets.rigid_energy]
observable = "potential_energy"
system = "gas"
value = 1.0
uncertainty = 1.0
"""
    row = rows_of(run(write_config(tmp_path, text), output=tmp_path / "out").history)[0]
    assert row["rigid_energy"] == pytest.approx(0.5 * K * 0.05**2, rel=1e-6)
    assert row["d_rigid_energy_d_k"] == pytest.approx(0.5 * 0.05**2, rel=1e-6)
    assert row["rigid_energy_standard_error"] == 0.0
    gas.removeConstraint(0)
    write_system(tmp_path, gas, np.array([[0, 0, 0], [0.31, 0, 0]]), stem="gas_")
    with pytest.raises(ConfigurationError, match="1 internal degrees of freedom"):
        run(tmp_path / "fit.toml", output=tmp_path / "out2")


# Input that is wrong ---------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str, type[Exception], str]] = {
    "system file": ('"system.xml"', '"none.xml"', InvalidInputError, r"none\.xml does not exist"),
    "no positions": (
        ', positions = "state.xml"',
        "",
        ConfigurationError,
        r"systems\.dimers\.files: positions is missing",
    ),
    "role": ("system =", "sistem =", ConfigurationError, r"\['sistem'\] are unknown to OpenMM"),
    "host": ("seed = 11", 'host = "abacus"', ConfigurationError, r"host: got 'abacus'"),
    "parameter": (
        "HarmonicBondForce.length",
        "HarmonicBondForce.size",
        ConfigurationError,
        r"no system has a parameter 'HarmonicBondForce\.size'; dimers has HarmonicBondForce",
    ),
    "entry": (
        '"HarmonicBondForce.length"',
        '{ parameter = "HarmonicBondForce.length", entries = [10] }',
        ConfigurationError,
        "entries: got 10, but HarmonicBondForce.length has 10 entries",
    ),
    "twice": (
        '"HarmonicBondForce.length"',
        '["HarmonicBondForce.length", "HarmonicBondForce.length"]',
        ConfigurationError,
        "selected twice",
    ),
    "mixed": (
        '"HarmonicBondForce.length"',
        '["HarmonicBondForce.length", "HarmonicBondForce.k"]',
        ConfigurationError,
        "initial: is missing, and the selected entries differ",
    ),
    "no topology": (
        '"HarmonicBondForce.length"',
        '{ parameter = "HarmonicBondForce.length", element = "C" }',
        ConfigurationError,
        "system 'dimers' has no topology",
    ),
    "bounds": ("[0.05, 1.0]", "[0.5, 1.0]", ConfigurationError, "0.3, is outside"),
    "function": (
        "fit_observables:bond",
        "fit_observables:none",
        ConfigurationError,
        "has no 'none'",
    ),
    "module": (
        "fit_observables:bond",
        "nowhere_to_be:seen",
        ConfigurationError,
        "cannot be import",
    ),
    "failing": (":bond", ":broken", ConfigurationError, r"no such thing, .*, line 14\)"),
    "interval": ("interval = 0.5", "interval = 1e-3", InvalidInputError, "shorter than the time"),
    "blow-up": ("timestep = 0.01", "timestep = 0.2", SimulationError, "did the simulation blow up"),
    "shape": (
        "fit_observables:bond",
        "fit_observables:vector",
        InvalidInputError,
        "wanted one number",
    ),
    "pressure": ("seed = 11", "pressure = 1.0", InvalidInputError, "no force of the system"),
    "platform": ("seed = 11", 'platform = "Abacus"', InvalidInputError, "got 'Abacus'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused(case: str, folder: Path) -> None:
    old, new, error, message = WRONG[case]
    assert old in DIMERS
    config = write_config(folder, DIMERS.replace(old, new, 1))
    with pytest.raises(error, match=message):
        run(config, output=folder / "out")


def test_pickles_are_refused_unless_trusted(folder: Path) -> None:
    path = folder / "system.xml"
    path.write_text(path.read_text().replace('name="HarmonicBondForce"', 'name="PythonForce"'))
    with pytest.raises(UntrustedInputError, match="--trust"):
        run(write_config(folder), output=folder / "out")
    text = DIMERS.replace("HarmonicBondForce", "PythonForce")
    text += "\n[convergence]\nmax_iterations = 1\n"
    assert run(write_config(folder, text), output=folder / "out", trust=True).iterations == 1


# Selection -------------------------------------------------------------------------------------

PDB = """\
HETATM    1  O1  HOH A   1       0.000   0.000   0.000  1.00  0.00           O
HETATM    2  H1  HOH A   1       1.000   0.000   0.000  1.00  0.00           H
HETATM    3  H2  HOH A   1       0.000   1.000   0.000  1.00  0.00           H
HETATM    4  C1  MET A   2       5.000   0.000   0.000  1.00  0.00           C
HETATM    5  O1  MET A   2       6.000   0.000   0.000  1.00  0.00           O
END
"""

SELECTIONS: dict[str, tuple[str, list[int]]] = {
    "all": ("{ parameter = 'NonbondedForce.sigma' }", [0, 1, 2, 3, 4]),
    "element": ("{ parameter = 'NonbondedForce.sigma', element = 'O' }", [0, 4]),
    "elements": ("{ parameter = 'NonbondedForce.sigma', element = ['C', 'H'] }", [1, 2, 3]),
    "name": ("{ parameter = 'NonbondedForce.sigma', atom_name = 'H2' }", [2]),
    "residue": ("{ parameter = 'NonbondedForce.sigma', residue_name = 'MET' }", [3, 4]),
    "both": (
        "{ parameter = 'NonbondedForce.sigma', element = 'O', residue_name = 'MET' }",
        [4],
    ),
    "particles": ("{ parameter = 'NonbondedForce.sigma', particles = [1, 3] }", [1, 3]),
    "entries": ("{ parameter = 'NonbondedForce.sigma', entries = [0] }", [0]),
    "bonds": ("{ parameter = 'HarmonicBondForce.k', residue_name = 'HOH' }", [0, 1]),
    "exceptions": (
        "{ parameter = 'NonbondedForce.exception_epsilon', residue_name = 'MET' }",
        [1],
    ),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_selection(case: str, tmp_path: Path) -> None:
    system = openmm.System()
    bonds, nonbonded = openmm.HarmonicBondForce(), openmm.NonbondedForce()
    for _ in range(5):
        system.addParticle(1.0)
        nonbonded.addParticle(0.0, 0.3, 1.0)
    for i, j in ((0, 1), (0, 2), (3, 4)):
        bonds.addBond(i, j, 0.1, 100.0)
    for i, j in ((0, 1), (3, 4)):
        nonbonded.addException(i, j, 0.0, 1.0, 0.5)
    system.addForce(bonds)
    system.addForce(nonbonded)
    write_system(tmp_path, system, np.random.default_rng(0).normal(size=(5, 3)))
    (tmp_path / "top.pdb").write_text(PDB)
    selection, expected = SELECTIONS[case]
    text = DIMERS.replace('positions = "state.xml"', 'positions = "top.pdb"')
    text = text.replace('"HarmonicBondForce.length"', selection).replace("[0.05, 1.0]", "[0, 1e3]")
    config = load_config(write_config(tmp_path, text))
    simulation = open_simulation(config.systems["dimers"], tmp_path)
    (trainable,) = tie_parameters(config.parameters, {"dimers": simulation})
    members: Any = simulation.potential.get_submodule("tied").members()["length"]
    assert [index.tolist() for index in members.values()] == [expected]
    assert trainable.selected["dimers"] == {next(iter(members)): len(expected)}


def test_one_value_in_several_systems(tmp_path: Path) -> None:
    write_system(tmp_path, *dimers(3))
    write_system(tmp_path, *dimers(1), stem="gas_")
    text = DIMERS + '\n[systems.gas]\nfiles = { system = "gas_system.xml", positions = '
    text += '"gas_state.xml" }\ntemperature = 300.0\n'
    config = load_config(write_config(tmp_path, text))
    simulations = {n: open_simulation(s, tmp_path) for n, s in config.systems.items()}
    (trainable,) = tie_parameters(config.parameters, simulations)
    assert trainable.systems == ("dimers", "gas")
    assert trainable.unit == "nanometer"
    assert simulations["dimers"].n_molecules == 3
    assert simulations["gas"].total_mass == pytest.approx(24.0)
