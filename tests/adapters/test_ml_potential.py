"""mdgraft's models by their name in OpenMM-ML."""

import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.neural import MessagePassingNetwork, neural_potential
from mdgraft_openmm import mixed_system
from openmm import app

openmmml = pytest.importorskip("openmmml", reason="OpenMM-ML is not installed")

#: A module with a list of neighbours has no other way into OpenMM.
pytestmark = pytest.mark.skipif(
    not hasattr(openmm, "PythonForce"), reason="OpenMM has no PythonForce before version 8.5"
)

NUMBERS = [8, 1, 1, 8, 1, 1]
X = np.array(
    [
        [0, 0, 0],
        [0.1, 0, 0],
        [-0.03, 0.09, 0],
        [0.3, 0, 0.02],
        [0.33, 0.09, 0.03],
        [0.3, -0.05, 0.1],
    ]
)


def network(**options):
    model = MessagePassingNetwork([1, 8], 0.4, channels=4, radial=4, **options)
    with torch.no_grad():
        model.scale.fill_(50.0)
    return model


def water(box=None):
    """Two molecules."""
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(2):
        residue = topology.addResidue("HOH", chain)
        atoms = [
            topology.addAtom(name, app.Element.getBySymbol(name[0]), residue)
            for name in ("O", "H1", "H2")
        ]
        topology.addBond(atoms[0], atoms[1])
        topology.addBond(atoms[0], atoms[2])
    if box is not None:
        topology.setPeriodicBoxVectors(np.array(box) * openmm.unit.nanometer)
    return topology


def evaluate(system, x=X):
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(x)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


BOXES = {
    "open": None,
    "triclinic": [[0.9, 0, 0], [0.2, 0.85, 0], [-0.3, 0.1, 0.95]],
    "small": [[0.5, 0, 0], [0, 0.45, 0], [0, 0, 0.42]],
}


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("given", ["object", "path", "text", "potential"])
def test_whole_systems(tmp_path, box, given):
    model = network()
    model.save(tmp_path / "model.pt")
    periodic = BOXES[box] is not None
    alone = neural_potential(model, NUMBERS, pbc=periodic)
    options = {
        "object": model,
        "path": tmp_path / "model.pt",
        "text": str(tmp_path / "model.pt"),
        "potential": alone,
    }
    system = openmmml.MLPotential("mdgraft", model=options[given]).createSystem(water(BOXES[box]))
    assert system.usesPeriodicBoundaryConditions() == periodic
    assert system.getNumParticles() == 6
    energy, forces = evaluate(system)
    cell = None if not periodic else torch.tensor(BOXES[box], dtype=torch.float64)
    assert energy == pytest.approx(alone(X, cell).item(), rel=1e-12)
    np.testing.assert_allclose(forces, alone.forces(X, cell).detach(), atol=1e-9)


def test_single_precision():
    model = network(dtype=torch.float32)
    system = openmmml.MLPotential("mdgraft", model=model).createSystem(water())
    expected = neural_potential(model, NUMBERS)(X).item()
    assert evaluate(system)[0] == pytest.approx(expected, rel=1e-6)
    options = {"model": model, "dtype": torch.float64}
    system = openmmml.MLPotential("mdgraft", **options).createSystem(water())
    assert evaluate(system)[0] == pytest.approx(expected, rel=1e-5)
    # Whoever trains the model goes on with it as it was.
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("interpolate", [False, True])
def test_mixed_systems(interpolate):
    topology = water()
    classical = app.ForceField("tip3p.xml").createSystem(topology)
    model = network()
    mixed = openmmml.MLPotential("mdgraft", model=model).createMixedSystem(
        topology, classical, [3, 4, 5], forceGroup=5, interpolate=interpolate
    )
    ours = mixed_system(classical, model, [3, 4, 5], topology=topology, force_group=5)
    assert evaluate(mixed)[0] == pytest.approx(evaluate(ours)[0], rel=1e-9)
    groups = {f.getForceGroup() for f in mixed.getForces() if f.getName() == "mdgraft"}
    assert groups == (set() if interpolate else {5})


def test_functions_take_the_atoms_of_the_region():
    topology = water()
    classical = app.ForceField("tip3p.xml").createSystem(topology)

    def pull(x):
        assert x.shape == (3, 3)
        return 10.0 * x[0, 2]

    mixed = openmmml.MLPotential("mdgraft", model=pull).createMixedSystem(
        topology, classical, [3, 4, 5]
    )
    nothing = openmmml.MLPotential("mdgraft", model=lambda x: 0.0 * x.sum()).createMixedSystem(
        topology, classical, [3, 4, 5]
    )
    change = evaluate(mixed)[1] - evaluate(nothing)[1]
    expected = np.zeros((6, 3))
    expected[3, 2] = -10.0
    np.testing.assert_allclose(change, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "match"),
    [(None, "NoneType"), (3, "int"), ("nowhere.pt", "cannot read nowhere.pt")],
)
def test_models_that_make_no_sense(model, match):
    with pytest.raises(InvalidInputError, match=match):
        openmmml.MLPotential("mdgraft", model=model)


@pytest.mark.parametrize("keyword", ["cutoff", "Device", "mlLongRange", "linkAtomDistances"])
def test_unknown_keywords_of_whole_systems(keyword):
    potential = openmmml.MLPotential("mdgraft", model=network())
    with pytest.raises(InvalidInputError, match=f"{keyword}: .*device, dtype, backend, periodic"):
        potential.createSystem(water(), **{keyword: 1})


@pytest.mark.parametrize("interpolate", [False, True])
def test_unknown_keywords_of_mixed_systems(interpolate):
    """What OpenMM-ML has for itself it hands on as well."""
    topology = water()
    classical = app.ForceField("tip3p.xml").createSystem(topology)
    potential = openmmml.MLPotential("mdgraft", model=network())
    with pytest.raises(InvalidInputError, match="chrage: .*device, dtype, backend, periodic"):
        potential.createMixedSystem(topology, classical, [3], interpolate=interpolate, chrage=1)
    distances = [(3, 4, 0.09 * openmm.unit.nanometer), (3, 5, 0.09 * openmm.unit.nanometer)]
    mixed = potential.createMixedSystem(
        topology, classical, [3], interpolate=interpolate, linkAtomDistances=distances
    )
    found = [mixed.getVirtualSite(i).getLocalPosition()._value[0] for i in (6, 7)]
    assert found == pytest.approx([0.09, 0.09])


def test_unknown_keywords_of_potentials():
    with pytest.raises(InvalidInputError, match="dtpye: .*model, dtype, backend"):
        openmmml.MLPotential("mdgraft", model=network(), dtpye=torch.float64)


def test_atoms_without_elements():
    topology = water()
    topology.addAtom("M", None, topology.addResidue("SITE", next(topology.chains())))
    with pytest.raises(InvalidInputError, match=r"\[6\] have no element"):
        openmmml.MLPotential("mdgraft", model=network()).createSystem(topology)


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_nothing_else_needs_openmmml():
    """Without OpenMM-ML mdgraft works, and the factory says what is missing."""
    code = (
        "import sys; sys.modules['openmmml'] = None\n"
        "from mdgraft_openmm.ml_potential import MDGraftPotentialImplFactory\n"
        "try:\n"
        "    MDGraftPotentialImplFactory().createImpl('mdgraft', model=len)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "pip install openmmml" in _run(code)


@pytest.mark.parametrize("module", ["ml_potential", "ml_implementation"])
def test_the_order_of_imports_does_not_matter(module):
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        f"import mdgraft_openmm.{module}\n"
        "import openmmml\n"
        "print(openmmml.MLPotential('mdgraft', model=len)._impl.getMLLongRange())\n"
    )
    assert _run(code).strip() == "False"
