"""Reading the user's own files, good and bad."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdgraft
import numpy as np
import openmm
import pytest
from exported import GLOBALS, Springs
from mdgraft import (
    BoxTooSmallError,
    InvalidInputError,
    UnsupportedForceError,
    UntrustedInputError,
)
from mdgraft_openmm import files, to_force
from mdgraft_openmm.export import availability
from mdgraft_openmm.files import check_box, read_positions, read_system
from openmm import app, unit

POSITIONS = np.array([[0.1, 0.2, 0.3], [0.25, 0.2, 0.3], [0.25, 0.4, -0.3]])
BOX = np.array([[2.0, 0, 0], [0.5, 2.1, 0], [-0.3, 0.4, 2.2]])


def make_system(cutoff: float = 0.9) -> openmm.System:
    system = openmm.System()
    bonds, pairs = openmm.HarmonicBondForce(), openmm.NonbondedForce()
    for _ in range(3):
        system.addParticle(12.0)
        pairs.addParticle(0.0, 0.3, 0.5)
    bonds.addBond(0, 1, 0.15, 1000.0)
    pairs.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    pairs.setCutoffDistance(cutoff)
    system.addForce(bonds)
    system.addForce(pairs)
    return system


def make_context(system: openmm.System) -> openmm.Context:
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPeriodicBoxVectors(*BOX)
    context.setPositions(POSITIONS)
    return context


@pytest.fixture
def system_xml() -> str:
    return openmm.XmlSerializer.serialize(make_system())


@pytest.fixture
def state_xml() -> str:
    state = make_context(make_system()).getState(positions=True)
    return openmm.XmlSerializer.serialize(state)


def write(folder: Path, text: str, name: str = "file.xml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_system_comes_back(tmp_path: Path, system_xml: str) -> None:
    system = read_system(write(tmp_path, system_xml))
    assert openmm.XmlSerializer.serialize(system) == system_xml


def test_a_state_comes_back(tmp_path: Path, state_xml: str) -> None:
    positions, box = read_positions(write(tmp_path, state_xml), n_particles=3)
    assert np.array_equal(positions, POSITIONS)
    assert np.array_equal(box, BOX)


@pytest.mark.parametrize(("suffix", "writer"), [(".pdb", app.PDBFile), (".cif", app.PDBxFile)])
@pytest.mark.parametrize("periodic", [True, False])
def test_structure_files_give_positions_and_box(
    tmp_path: Path, suffix: str, writer: type, periodic: bool
) -> None:
    topology = app.Topology()
    residue = topology.addResidue("XXX", topology.addChain())
    for i in range(3):
        topology.addAtom(f"C{i}", app.element.carbon, residue)
    lengths = np.array([2.0, 2.5, 3.0])
    if periodic:
        topology.setUnitCellDimensions(openmm.Vec3(*lengths) * unit.nanometer)
    path = tmp_path / f"structure{suffix}"
    with open(path, "w") as stream:
        writer.writeFile(topology, POSITIONS * unit.nanometer, stream)
    positions, box = read_positions(path, n_particles=3)
    assert np.allclose(positions, POSITIONS, atol=1e-4)
    if periodic:
        assert box is not None
        assert np.allclose(box, np.diag(lengths), atol=1e-4)
    else:
        assert box is None


BROKEN_SYSTEMS = {
    "empty": (lambda x: "", "not well-formed XML"),
    "text": (lambda x: "hello", "not well-formed XML"),
    "truncated": (lambda x: x[: len(x) // 2], "not well-formed XML.*truncated"),
    "another root": (lambda x: "<html/>", "not that of a serialised System"),
    "a number missing": (
        lambda x: x.replace('mass="12"', 'mass="heavy"', 1),
        "line 9: mass='heavy' of <Particle> is not a number",
    ),
    "a mass that is NaN": (
        lambda x: x.replace('mass="12"', 'mass="nan"', 1),
        "particle 0 the mass",
    ),
    "an integrator": (
        lambda x: openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001)),
        "holds a VerletIntegrator, wanted a System",
    ),
}


@pytest.mark.parametrize(("change", "match"), BROKEN_SYSTEMS.values(), ids=BROKEN_SYSTEMS)
def test_what_is_no_system_is_refused(
    tmp_path: Path, system_xml: str, change: object, match: str
) -> None:
    assert callable(change)
    path = write(tmp_path, change(system_xml))
    with pytest.raises(InvalidInputError, match=match):
        read_system(path)


def test_a_state_is_no_system(tmp_path: Path, state_xml: str) -> None:
    with pytest.raises(InvalidInputError, match="holds a State, wanted a System"):
        read_system(write(tmp_path, state_xml))


def test_a_system_is_no_state(tmp_path: Path, system_xml: str) -> None:
    with pytest.raises(InvalidInputError, match="holds a System, wanted a State"):
        read_positions(write(tmp_path, system_xml))


@pytest.mark.parametrize("read", [read_system, read_positions])
def test_files_must_exist(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(InvalidInputError, match="does not exist; wanted a file"):
        read(tmp_path / "nothing.xml")
    with pytest.raises(InvalidInputError, match="is a folder; wanted a file"):
        read(tmp_path)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.xml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InvalidInputError, match="cannot be read as UTF-8 text"):
        read_system(path)


#: Ways to spell the class in a file such that OpenMM's parser still sees it.
SPELLINGS = ["PythonForce", "&#80;ythonForce", "&#x50;ythonForce", "Python&#70;orce"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_pickled_code_is_refused(tmp_path: Path, system_xml: str, spelling: str) -> None:
    text = system_xml.replace("HarmonicBondForce", spelling)
    assert text != system_xml
    with pytest.raises(UntrustedInputError, match=r"Python(Torch)?Force.*pickle.*--trust"):
        read_system(write(tmp_path, text))
    with pytest.raises(UntrustedInputError, match=r"Python(Torch)?Force.*pickle.*--trust"):
        read_positions(write(tmp_path, text))


@pytest.mark.parametrize("kind", ["PythonTorchForce", "TorchForce"])
@pytest.mark.parametrize("letter", ["T", "&#x54;"])
def test_programs_of_plugins_are_refused(
    tmp_path: Path, system_xml: str, kind: str, letter: str
) -> None:
    path = write(tmp_path, system_xml.replace("HarmonicBondForce", kind.replace("T", letter)))
    with pytest.raises(UntrustedInputError, match=rf"{kind}.*(pickle|TorchScript).*--trust"):
        read_system(path)


def exported(
    *, derivatives: bool, backend: str | None = None, potential: bool = False
) -> openmm.Force:
    """An export of each kind that holds a program."""
    if potential:
        return to_force(mdgraft.graft(make_system()).only("HarmonicBondForce"))
    return to_force(
        Springs(),
        global_parameters=GLOBALS,
        parameter_derivatives=derivatives,
        backend=backend or "PythonForce",
        platform="Reference",
    )


def nested(force: openmm.Force) -> openmm.Force:
    outer = openmm.CustomCVForce("v^2")
    outer.addCollectiveVariable("v", force)
    return outer


EXPORTS = {
    "bare": lambda: exported(derivatives=False),
    "with derivatives": lambda: exported(derivatives=True),
    "of a potential": lambda: exported(derivatives=False, potential=True),
    "inside another": lambda: nested(exported(derivatives=True)),
}


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="this OpenMM has no PythonForce")
@pytest.mark.parametrize("make", EXPORTS.values(), ids=EXPORTS)
def test_exports_are_refused_unless_trusted(tmp_path: Path, make: Callable[[], Any]) -> None:
    system = make_system()
    system.addForce(make())
    path = write(tmp_path, openmm.XmlSerializer.serialize(system))
    with pytest.raises(UntrustedInputError, match=r"Python(Torch)?Force.*pickle.*--trust"):
        read_system(path)
    first, second = make_context(system), make_context(read_system(path, trust=True))
    energies = [c.getState(energy=True).getPotentialEnergy()._value for c in (first, second)]
    assert energies[0] == energies[1]


@pytest.mark.openmmtorch
def test_torchscript_is_refused_unless_trusted(tmp_path: Path) -> None:
    system = make_system()
    system.addForce(exported(derivatives=False, backend="TorchForce"))
    path = write(tmp_path, openmm.XmlSerializer.serialize(system))
    with pytest.raises(UntrustedInputError, match=r"TorchForce.*TorchScript.*--trust"):
        read_system(path)
    if availability.torch_force_fault(availability.COPIES) is None:
        assert read_system(path, trust=True).getNumForces() == 3
    else:
        with pytest.raises(UnsupportedForceError, match="ends the process"):
            read_system(path, trust=True)


def test_programs_of_a_broken_plugin_are_not_loaded(
    tmp_path: Path, system_xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "torch_force_fault", lambda platform: "it ends the process")
    path = write(tmp_path, system_xml.replace("HarmonicBondForce", "TorchForce"))
    with pytest.raises(UnsupportedForceError, match="openmm-torch.*ends the process"):
        read_system(path, trust=True)


def test_another_encoding_is_not_believed(tmp_path: Path, system_xml: str) -> None:
    """OpenMM does not either."""
    _, _, rest = system_xml.partition("?>")
    for name in ("utf-7", "cp037", "no-such-encoding"):
        text = f'<?xml version="1.0" encoding="{name}" ?>{rest}'
        assert openmm.XmlSerializer.serialize(read_system(write(tmp_path, text))) == system_xml
    text = f'<?xml version="1.0" encoding="utf-7" ?>{rest}<!-- &#80;ythonForce -->'
    with pytest.raises(UntrustedInputError, match="mentions a PythonForce"):
        read_system(write(tmp_path, text))


def test_entities_are_refused(tmp_path: Path, system_xml: str) -> None:
    entity = '<!DOCTYPE System [<!ENTITY a "Python">]><System'
    text = system_xml.replace("<System", entity, 1)
    with pytest.raises(UntrustedInputError, match="declares XML entities"):
        read_system(write(tmp_path, text))


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="this OpenMM has no PythonForce")
def test_trusted_code_is_loaded(tmp_path: Path) -> None:
    system = make_system()
    system.addForce(openmm.PythonForce(np.max))
    path = write(tmp_path, openmm.XmlSerializer.serialize(system))
    with pytest.raises(UntrustedInputError, match="PythonForce"):
        read_system(path)
    assert read_system(path, trust=True).getNumForces() == 3


def test_forces_of_absent_plugins_are_listed(tmp_path: Path, system_xml: str) -> None:
    text = system_xml.replace('"HarmonicBondForce"', '"OneForce"')
    text = text.replace('"NonbondedForce"', '"OtherForce"')
    with pytest.raises(UnsupportedForceError, match="OneForce, OtherForce"):
        read_system(write(tmp_path, text))


def test_states_without_positions_are_refused(tmp_path: Path) -> None:
    state = make_context(make_system()).getState(energy=True)
    path = write(tmp_path, openmm.XmlSerializer.serialize(state))
    with pytest.raises(InvalidInputError, match=r"holds no positions.*positions=True"):
        read_positions(path)


def test_particle_counts_must_match(tmp_path: Path, state_xml: str) -> None:
    with pytest.raises(InvalidInputError, match="holds 3 particles, the system 4"):
        read_positions(write(tmp_path, state_xml), n_particles=4)


@pytest.mark.parametrize("value", ["nan", "inf", "-1e999"])
def test_positions_must_be_finite(tmp_path: Path, state_xml: str, value: str) -> None:
    text = state_xml.replace('<Position x=".25"', f'<Position x="{value}"', 1)
    assert text != state_xml
    with pytest.raises(InvalidInputError, match="NaN or infinity at particle 1"):
        read_positions(write(tmp_path, text))


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
@pytest.mark.parametrize("text", ["", "ATOM  x\n", "hello"])
def test_broken_structure_files_are_refused(tmp_path: Path, suffix: str, text: str) -> None:
    path = write(tmp_path, text, f"structure{suffix}")
    with pytest.raises(InvalidInputError, match="structure file|holds no atoms"):
        read_positions(path)


GOOD_BOXES = {
    "triclinic": BOX,
    "cutoff of exactly half": np.diag([1.8, 1.8, 1.8]),
    "at the limit of the reduced form": np.array([[2.0, 0, 0], [0, 2, 0], [1, 1, np.sqrt(2)]])
    * 1.5,
}


@pytest.mark.parametrize("box", GOOD_BOXES.values(), ids=GOOD_BOXES)
def test_good_boxes_pass_and_run(box: np.ndarray) -> None:
    system = make_system()
    check_box(system, box)
    context = make_context(system)
    context.setPeriodicBoxVectors(*box)
    context.getState(energy=True)


BAD_BOXES = {
    "too small": (np.diag([1.79, 2, 2]), BoxTooSmallError, r"cutoff of 0.9 nm.*at least 1.8 nm"),
    "upper triangle": (BOX.T, InvalidInputError, "not in reduced form"),
    "too skewed": (
        np.array([[2.0, 0, 0], [1.1, 2, 0], [0, 0, 2]]),
        InvalidInputError,
        "not in reduced form",
    ),
    "negative": (np.diag([2.0, -2, 2]), InvalidInputError, "not in reduced form"),
    "NaN": (np.diag([2.0, np.nan, 2]), InvalidInputError, "not in reduced form"),
}


@pytest.mark.parametrize(("box", "error", "match"), BAD_BOXES.values(), ids=BAD_BOXES)
def test_bad_boxes_are_refused(box: np.ndarray, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_box(make_system(), box)


def test_ewald_needs_a_rectangular_box() -> None:
    system = make_system()
    system.getForce(1).setNonbondedMethod(openmm.NonbondedForce.Ewald)
    check_box(system, np.diag(np.diagonal(BOX)))
    with pytest.raises(InvalidInputError, match="not rectangular.*use PME"):
        check_box(system, BOX)


def test_open_systems_need_no_box() -> None:
    system = make_system()
    system.getForce(1).setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
    check_box(system, np.zeros((3, 3)))
