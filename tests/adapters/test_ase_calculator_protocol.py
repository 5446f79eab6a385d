"""MDGraftCalculator keeps ASE's rules: caching, options, files, names, the command line."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys

import ase.calculators.calculator
import ase.db
import ase.io
import mdgraft
import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import (
    PropertyNotImplementedError,
    all_changes,
    get_calculator_class,
)
from ase.calculators.mixing import SumCalculator
from ase.cli.main import main
from ase_systems import (
    KJ,
    LATTICES,
    ROTATIONS,
    argon,
    as_atoms,
    diatomic,
    peptide,
    rigid_four_site_water,
    turned,
)
from mdgraft import InvalidInputError
from mdgraft_ase import MDGraftCalculator
from mdgraft_ase._energy import EnergyFunction


@pytest.fixture
def passes(monkeypatch):
    """What each evaluation was asked for, in order."""
    made = []
    evaluate = EnergyFunction.evaluate

    def counted(self, *args, **wanted):
        made.append("stress" if wanted["strain"] else "forces" if wanted["forces"] else "energy")
        return evaluate(self, *args, **wanted)

    monkeypatch.setattr(EnergyFunction, "evaluate", counted)
    return made


def stretched(calculator=None):
    atoms = as_atoms(diatomic(), calculator)
    atoms.positions[1, 0] += 0.1
    atoms.set_cell([10, 10, 10])
    return atoms


# Caching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("e", ["energy"]),
        ("f", ["forces"]),
        ("s", ["stress"]),
        ("fe", ["forces"]),
        ("ef", ["energy", "forces"]),
        ("sfe", ["stress"]),
        ("fs", ["forces", "stress"]),
        ("eeffee", ["energy", "forces"]),
    ],
)
def test_one_pass_does_for_all_that_it_gives(passes, asked, made):
    atoms = stretched()
    for letter in asked:
        {"e": atoms.get_potential_energy, "f": atoms.get_forces, "s": atoms.get_stress}[letter]()
    assert passes == made


def test_a_stress_that_follows_forces_is_foreseen(passes):
    # As dynamics at constant pressure ask.
    atoms = stretched()
    wanted = []
    for step in range(4):
        atoms.positions[1, 0] += 0.01
        atoms.get_forces()
        if step < 3:
            wanted.append(atoms.get_stress())
    atoms.positions[1, 0] += 0.01
    atoms.get_forces()
    assert passes == ["forces", "stress", "stress", "stress", "stress", "forces"]
    atoms.positions[1, 0] -= 0.03
    assert atoms.get_stress() == pytest.approx(wanted[1])


@pytest.mark.parametrize(
    ("change", "calculates"),
    [
        (lambda atoms: atoms.translate(0.1), True),
        (lambda atoms: atoms.set_cell([11, 10, 10]), True),
        (lambda atoms: atoms.set_atomic_numbers([1, 1]), True),
        (lambda atoms: atoms.set_initial_charges([1, -1]), False),
        (lambda atoms: atoms.set_initial_magnetic_moments([1, 1]), False),
        (lambda atoms: atoms.set_velocities(np.ones((2, 3))), False),
        (lambda atoms: None, False),
    ],
)
def test_what_makes_a_new_calculation(passes, change, calculates):
    atoms = stretched()
    atoms.get_forces()
    assert not atoms.calc.calculation_required(atoms, ["energy", "forces"])
    assert atoms.calc.calculation_required(atoms, ["stress"])
    change(atoms)
    assert atoms.calc.calculation_required(atoms, ["energy"]) == calculates
    atoms.get_forces()
    assert len(passes) == 1 + calculates


def test_results_without_a_calculation(passes):
    atoms = stretched()
    calculator = atoms.calc
    assert calculator.get_property("energy", atoms, allow_calculation=False) is None
    energy = atoms.get_potential_energy()
    assert calculator.get_property("energy", atoms, allow_calculation=False) == energy
    assert calculator.get_property("forces", atoms, allow_calculation=False) is None
    assert calculator.get_property("energy") == energy
    assert passes == ["energy"]
    atoms.translate(1.0)
    assert calculator.get_property("energy", atoms, allow_calculation=False) is None
    calculator.reset()
    with pytest.raises(InvalidInputError, match="nothing was calculated yet"):
        calculator.get_property("energy")
    with pytest.raises(InvalidInputError, match="nothing was calculated yet"):
        calculator.calculate()


def test_results_are_copies():
    atoms = stretched()
    forces, stress = atoms.get_forces(), atoms.get_stress()
    kept = forces.copy(), stress.copy()
    forces[:] = 0.0
    stress[:] = 0.0
    assert (atoms.get_forces() == kept[0]).all() and (atoms.get_stress() == kept[1]).all()


def test_calculate_by_hand():
    atoms = stretched()
    calculator = atoms.calc
    calculator.calculate(atoms, ["energy"], all_changes)
    assert set(calculator.results) == {"energy", "free_energy"}
    calculator.calculate(atoms, ["stress"], [])
    assert set(calculator.results) == {"energy", "free_energy", "forces", "stress"}
    other = atoms.copy()
    other.positions[1, 0] += 0.1
    calculator.calculate(other, ["energy"])
    assert set(calculator.results) == {"energy", "free_energy"}
    assert calculator.results["energy"] != atoms.get_potential_energy()
    properties = calculator.calculate_properties(atoms, ["energy", "forces", "stress"])
    assert properties["forces"] == pytest.approx(atoms.get_forces())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_s_grad_mode_makes_no_difference(mode):
    atoms = stretched()
    with mode():
        forces = atoms.get_forces()
        energy = atoms.get_potential_energy()
        atoms.translate(0.0)
        assert atoms.get_stress() is not None
    again = stretched()
    assert again.get_potential_energy() == energy
    assert (again.get_forces() == forces).all()


# Training -------------------------------------------------------------------------------------


def _scaled(tensor):
    with torch.no_grad():
        tensor.mul_(2.0)


def _through_data(tensor):
    tensor.data.mul_(2.0)


def _through_numpy(tensor):
    tensor.detach().numpy()[...] *= 2.0


def _by_an_optimizer(tensor):
    tensor.grad = -tensor.detach().clone()
    torch.optim.SGD([tensor], lr=1.0).step()


@pytest.mark.parametrize("change", [_scaled, _through_data, _through_numpy, _by_an_optimizer])
@pytest.mark.parametrize("wrapped", ["potential", "method", "partial", "closure"])
def test_training_drops_cached_results(passes, change, wrapped):
    potential = diatomic().potential
    atoms = stretched(
        MDGraftCalculator(
            {
                "potential": potential,
                "method": potential.forward,
                "partial": functools.partial(_call, potential),
                "closure": lambda x, h: potential(x, h),
            }[wrapped]
        )
    )
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert atoms.get_potential_energy() == energy
    made = len(passes)
    change(potential.get_parameter("HarmonicBondForce.k"))
    assert atoms.calc.calculation_required(atoms, ["energy"])
    assert atoms.get_potential_energy() == pytest.approx(2 * energy)
    assert atoms.get_forces() == pytest.approx(2 * forces)
    assert atoms.calc.get_property("energy") == pytest.approx(2 * energy)
    assert len(passes) == made + 2


def _call(potential, x, h):
    return potential(x, h)


def test_changes_that_are_taken_back_do_not_confuse():
    potential = diatomic().potential
    k = potential.get_parameter("HarmonicBondForce.k")
    atoms = stretched(MDGraftCalculator(potential))
    first = atoms.get_potential_energy()
    k.data.mul_(2.0)
    atoms.positions[1, 0] += 0.1
    atoms.get_potential_energy()
    k.data.div_(2.0)
    moved = atoms.get_potential_energy()
    assert moved == pytest.approx(4 * first)


def test_numbers_in_a_closure_and_loaded_states():
    scale = np.array([1.0])

    def energy(x, h):
        return float(scale[0]) * x.square().sum()

    atoms = Atoms("H", positions=[[1, 0, 0]], calculator=MDGraftCalculator(energy))
    assert atoms.get_potential_energy() == pytest.approx(0.01 * KJ)
    scale[0] = 3.0
    assert atoms.get_potential_energy() == pytest.approx(0.03 * KJ)

    potential = diatomic().potential
    atoms = stretched(MDGraftCalculator(potential))
    before = atoms.get_potential_energy()
    state = {k: 2 * v for k, v in potential.state_dict().items()}
    potential.load_state_dict(state)
    assert atoms.get_potential_energy() != pytest.approx(before)


class Holder:
    """Not callable itself; one of its methods is an energy."""

    def __init__(self):
        self.k = 1.0

    def energy(self, x, h):
        return self.k * x.square().sum()


class SlottedHolder:
    __slots__ = "k"
    __init__ = Holder.__init__
    energy = Holder.energy


class Counting(torch.nn.Module):
    """With a number that is no parameter, and a count of its calls."""

    def __init__(self):
        super().__init__()
        self.k = 1.0
        self.calls = 0

    def energy(self, x, h):
        return self(x, h)

    def forward(self, x, h):
        self.calls += 1
        return self.k * x.square().sum()


@pytest.mark.parametrize("wrapped", ["method", "closure"])
@pytest.mark.parametrize("kind", [Holder, SlottedHolder, Counting])
def test_numbers_that_objects_hold(kind, wrapped):
    held = kind()
    energy = held.energy if wrapped == "method" else (lambda x, h: held.energy(x, h))
    atoms = Atoms("H", positions=[[1, 0, 0]], calculator=MDGraftCalculator(energy))
    assert atoms.get_potential_energy() == pytest.approx(0.01 * KJ)
    held.k = 3.0
    assert atoms.get_potential_energy() == pytest.approx(0.03 * KJ)


def test_an_energy_that_looks_at_its_atoms():
    atoms = Atoms("H", positions=[[1, 0, 0]])
    made = []

    def energy(x, h):
        made.append(x)
        return len(atoms) * x.square().sum()

    atoms.calc = MDGraftCalculator(energy, check=False)
    for _ in range(2):
        atoms.get_forces()
        atoms.get_potential_energy()
    assert len(made) == 1


def test_a_count_of_calls_is_no_change():
    module = Counting()
    atoms = Atoms("H", positions=[[1, 0, 0]], calculator=MDGraftCalculator(module, check=False))
    for _ in range(2):
        atoms.get_forces()
        atoms.get_potential_energy()
    assert module.calls == 1


@pytest.mark.parametrize("kind", ["open", "skewed", "without sites"])
def test_a_training_step_uses_the_potential_itself(kind):
    if kind == "open":
        case, options = peptide(), {}
        atoms = case.atoms()
    elif kind == "skewed":
        case, options = argon(), {}
        atoms = turned(case.atoms(), LATTICES["left-handed"], ROTATIONS["turned"])
    else:
        case, options = rigid_four_site_water(), {"particles": "real"}
        atoms = case.atoms()
    potential = case.potential
    atoms.calc = MDGraftCalculator(potential, **options)
    atoms.get_forces()
    assert all(p.grad is None for p in potential.parameters())
    energy = potential(*atoms.calc.inputs(atoms))
    assert energy.item() * KJ == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    (gradient,) = torch.autograd.grad(energy, potential.get_parameter("NonbondedForce.epsilon"))
    assert gradient.shape == (potential.n_particles,) and gradient.any()


# Options --------------------------------------------------------------------------------------


def test_options_and_their_defaults(tmp_path):
    case = peptide()
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(case.system))
    calculator = MDGraftCalculator(system=path, dtype="float32")
    assert calculator.todict() == {"system": str(path), "dtype": "float32"}
    assert calculator.parameters.route == "auto"
    assert calculator.potential.dtype == torch.float32
    atoms = as_atoms(case, calculator)
    single = atoms.get_potential_energy()
    assert calculator.set(dtype="float64") == {"dtype": "float64"}
    assert calculator.results == {} and calculator.potential.dtype == torch.float64
    assert atoms.get_potential_energy() == pytest.approx(single, rel=1e-4)
    assert calculator.set(dtype="float64") == {}
    assert calculator.results != {}
    assert set(calculator.set(route="host")) == {"route"}
    assert set(calculator.potential.routes.values()) == {"host"}
    assert atoms.get_potential_energy() == pytest.approx(case.truth()[0])
    with pytest.raises(InvalidInputError, match="dtype: got 'half'"):
        calculator.set(dtype="half")
    assert calculator.parameters["dtype"] == "float64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got neither a potential and a system"),
        ({"potential": "yes", "system": "system.xml"}, "got both"),
        ({"potential": "yes", "cutoff": 3}, r"\['cutoff'\] are not options"),
        ({"potential": "yes", "route": "host"}, "route: got 'host', but the potential is there"),
        ({"potential": "yes", "dtype": "float32"}, r"dtype: got torch\.float32, but the potential"),
        ({"potential": "a path"}, r"pass it as system="),
        ({"system": "nowhere.xml"}, "nowhere.xml does not exist"),
    ],
)
def test_options_that_make_no_sense(options, message):
    if options.get("potential") == "yes":
        options = options | {"potential": diatomic().potential}
    with pytest.raises(InvalidInputError, match=message):
        MDGraftCalculator(**options)


def test_how_atoms_are_read_does_not_load_again():
    case = rigid_four_site_water()
    calculator = MDGraftCalculator(case.system)
    potential = calculator.potential
    assert calculator.set(particles="real") == {"particles": "real"}
    assert calculator.potential is potential
    atoms = case.atoms()
    atoms.calc = calculator
    atoms.get_forces()
    with pytest.raises(InvalidInputError, match="particles: got 'unreal'"):
        calculator.set(particles="unreal")
    assert calculator.parameters["particles"] == "real"
    calculator.set(route="host")
    assert calculator.potential is not potential


def test_changes_of_options_that_make_no_sense():
    calculator = MDGraftCalculator(diatomic().potential, label="x", directory=".")
    with pytest.raises(InvalidInputError, match=r"\['xc'\] are not options"):
        calculator.set(xc="PBE")
    with pytest.raises(InvalidInputError, match="has a potential already"):
        calculator.set(system="system.xml")
    assert calculator.parameters["system"] is None


def test_code_in_a_file_is_not_run(tmp_path):
    system = openmm.System()
    system.addParticle(1.0)
    if not hasattr(openmm, "PythonForce"):
        pytest.skip("OpenMM before 8.5 has no PythonForce")
    system.addForce(openmm.PythonForce(_nothing))
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(system))
    with pytest.raises(mdgraft.UntrustedInputError, match="would run code"):
        MDGraftCalculator(system=path)
    assert MDGraftCalculator(system=path, trust=True).todict()["trust"] is True


def _nothing(state):
    """At module level, so that it can be pickled."""
    return 0.0, np.zeros((1, 3))


# Copies and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(copied, passes):
    atoms = stretched()
    energy = atoms.get_potential_energy()
    other = copied(atoms)
    assert other.calc is not atoms.calc and other.get_potential_energy() == energy
    assert len(passes) == 1
    with torch.no_grad():
        other.calc.potential.get_parameter("HarmonicBondForce.k").mul_(2.0)
    assert other.get_potential_energy() == pytest.approx(2 * energy)
    assert atoms.get_potential_energy() == energy


@pytest.mark.parametrize("suffix", ["traj", "xyz", "json", "db"])
def test_files(tmp_path, suffix):
    atoms = stretched()
    atoms.get_stress()
    atoms.write(tmp_path / f"x.{suffix}")
    read = ase.io.read(tmp_path / f"x.{suffix}")
    assert read.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
    assert read.get_forces() == pytest.approx(atoms.get_forces(), abs=1e-7)


def test_a_trajectory(tmp_path, passes):
    atoms = stretched()
    with ase.io.Trajectory(tmp_path / "x.traj", "w", atoms) as trajectory:
        for _ in range(3):
            atoms.positions[1, 0] += 0.1
            atoms.get_forces()
            trajectory.write()
    # Writing asks for what is there, and calculates nothing.
    assert passes == ["forces"] * 3
    frames = ase.io.read(tmp_path / "x.traj", ":")
    assert frames[2].get_potential_energy() == atoms.get_potential_energy()
    assert frames[0].calc.name == "mdgraft"


def test_a_database_knows_the_calculator(tmp_path):
    case = peptide()
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(case.system))
    atoms = as_atoms(case, MDGraftCalculator(system=path))
    energy = atoms.get_potential_energy()
    with ase.db.connect(tmp_path / "x.db") as database:
        database.write(atoms)
    row = ase.db.connect(tmp_path / "x.db").get(calculator="mdgraft")
    assert row.energy == pytest.approx(energy)
    assert row.calculator_parameters == {"system": str(path)}
    made = get_calculator_class(row.calculator)(**row.calculator_parameters)
    again = row.toatoms()
    again.calc = made
    assert again.get_potential_energy() == pytest.approx(energy, rel=1e-9)


def test_arithmetic_of_calculators():
    case = argon()
    atoms = as_atoms(case)
    single = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    atoms.calc = SumCalculator([atoms.calc, MDGraftCalculator(case.potential)])
    assert atoms.get_potential_energy() == pytest.approx(2 * single[0])
    assert atoms.get_forces() == pytest.approx(2 * single[1])
    assert atoms.get_stress() == pytest.approx(2 * single[2])


# Names ----------------------------------------------------------------------------------------


def test_ase_knows_the_name():
    assert get_calculator_class("mdgraft") is MDGraftCalculator
    assert "mdgraft" in ase.calculators.calculator.names
    assert MDGraftCalculator(diatomic().potential).name == "mdgraft"


def command_line_files(folder):
    """A crystal with one atom out of place, and its System."""
    case = argon(n=3, a=0.532)
    atoms = case.atoms()
    atoms.positions[3] += 0.1
    atoms.write(folder / "argon.xyz")
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(case.system))
    return case, ["run", "mdgraft", "argon.xyz", "-p", "system=system.xml", "-o", "out.xyz"]


def test_the_command_line(tmp_path):
    case, arguments = command_line_files(tmp_path)
    command = [sys.executable, "-W", "error", "-m", "mdgraft_ase", "-T", *arguments]
    done = subprocess.run(
        [*command, "-f", "0.3"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = ase.io.read(tmp_path / "out.xyz")
    stored, result.calc = result.calc, MDGraftCalculator(case.potential)
    assert result.get_potential_energy() == pytest.approx(stored.get_potential_energy())
    assert np.abs(result.get_forces()).max() < 0.3


def test_options_on_the_command_line(tmp_path, monkeypatch):
    case, arguments = command_line_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments[arguments.index("system=system.xml")] += ",route=host,dtype=float64"
    main(args=[*arguments, "--properties", "efsd"])
    result = ase.io.read(tmp_path / "out.xyz")
    fresh = result.copy()
    fresh.calc = MDGraftCalculator(case.potential)
    assert result.get_potential_energy() == pytest.approx(fresh.get_potential_energy())
    assert result.get_forces() == pytest.approx(fresh.get_forces(), abs=1e-6)
    assert result.get_stress().shape == (6,)


@pytest.mark.parametrize("name", ["dipole", "magmom", "charges", "stresses"])
def test_properties_that_are_not_there(name):
    atoms = stretched()
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property(name, atoms)
