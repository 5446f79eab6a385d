"""Whole systems from OpenMM's own readers and force fields against its Reference platform."""

import functools
from pathlib import Path

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch

DATA = Path(app.__file__).parent / "data"

# Alanine dipeptide: residue, atom, element, and the bonds by position in this list.
_ATOMS = [
    *(("ACE", n, n[0]) for n in ("H1", "CH3", "H2", "H3", "C", "O")),
    *(("ALA", n, n[0]) for n in ("N", "H", "CA", "HA", "CB", "HB1", "HB2", "HB3", "C", "O")),
    *(("NME", n, n[0]) for n in ("N", "H", "C", "H1", "H2", "H3")),
]
_BONDS = [(0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (4, 6), (6, 7), (6, 8), (8, 9), (8, 10)]
_BONDS += [(10, 11), (10, 12), (10, 13), (8, 14), (14, 15), (14, 16), (16, 17), (16, 18)]
_BONDS += [(18, 19), (18, 20), (18, 21)]


def dipeptide():
    """Topology and relaxed positions of alanine dipeptide."""
    topology = app.Topology()
    chain, residues, atoms = topology.addChain(), {}, []
    for residue, name, element in _ATOMS:
        if residue not in residues:
            residues[residue] = topology.addResidue(residue, chain)
        atoms.append(topology.addAtom(name, app.element.get_by_symbol(element), residues[residue]))
    for i, j in _BONDS:
        topology.addBond(atoms[i], atoms[j])
    # A zigzag along x, with side atoms to alternating sides, is close enough to relax.
    heavy = {1: 0, 4: 1, 6: 2, 8: 3, 14: 4, 16: 5, 18: 6}
    rng = np.random.default_rng(5)
    positions = np.zeros((22, 3))
    for i, k in heavy.items():
        positions[i] = (0.125 * k, 0.04 * (-1) ** k, 0.0)
    for i, j in sorted(_BONDS):
        for child, parent in ((i, j), (j, i)):
            if child not in heavy and not positions[child].any():
                side = np.sign(positions[parent][1]) if parent in heavy else 1.0
                step = np.array([0.0, side, 0.0]) + 0.6 * rng.normal(size=3)
                positions[child] = positions[parent] + 0.11 * step / np.linalg.norm(step)
    system = app.ForceField("amber14-all.xml").createSystem(topology)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=500)
    state = context.getState(positions=True)
    return topology, state.getPositions()


def water(name, **options):
    pdb = app.PDBFile(str(DATA / f"{name}.pdb"))
    system = app.ForceField(f"{name}.xml").createSystem(
        pdb.topology, nonbondedCutoff=0.9 * unit.nanometer, **options
    )
    return system, pdb.positions


# In a triclinic box less than three cutoffs high the Reference platform overlooks some pairs
# (its CPU platform and a sum over all pairs do not), so the cutoff is short in the octahedron.
def solvated(force_fields, model, shape, cutoff=1.0, **options):
    topology, positions = dipeptide()
    field = app.ForceField(*force_fields)
    modeller = app.Modeller(topology, positions)
    modeller.addExtraParticles(field)
    modeller.addSolvent(
        field,
        model=model,
        boxShape=shape,
        padding=1.0 * unit.nanometer,
        ionicStrength=0.3 * unit.molar,
    )
    # Relaxed enough that no pair overlaps.
    system = field.createSystem(
        modeller.topology, nonbondedCutoff=cutoff * unit.nanometer, **options
    )
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("CPU")
    )
    context.setPositions(modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=20)
    return system, context.getState(positions=True).getPositions()


def vacuum():
    topology, positions = dipeptide()
    system = app.ForceField("amber14-all.xml").createSystem(topology, constraints=app.HBonds)
    return system, positions


def cmap():
    topology, positions = dipeptide()
    system = app.ForceField("amber19-all.xml").createSystem(topology)
    return system, positions


@functools.cache
def force_field(*names):
    return app.ForceField(*names)


def peptide(*names, **options):
    """Alanine dipeptide in vacuum or an implicit solvent."""
    topology, positions = dipeptide()
    return force_field(*names).createSystem(topology, **options), positions


def lipid(*names, **options):
    pdb = app.PDBFile(str(DATA / "POPC.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete(list(pdb.topology.residues())[1:])
    system = force_field(*names).createSystem(modeller.topology, **options)
    return system, modeller.positions


def salty_water(*names):
    """Water and ions, between which CHARMM has parameters for pairs."""
    modeller = app.Modeller(app.Topology(), [])
    size = openmm.Vec3(2.1, 2.1, 2.1)
    modeller.addSolvent(
        force_field(*names), model="tip3p", boxSize=size, ionicStrength=1.0 * unit.molar
    )
    system = force_field(*names).createSystem(
        modeller.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=1.0 * unit.nanometer,
        switchDistance=0.8 * unit.nanometer,
    )
    return system, modeller.positions


def amoeba_water(name):
    """Water by the AMOEBA family, which has no box of its own in OpenMM."""
    modeller = app.Modeller(app.Topology(), [])
    modeller.addSolvent(app.ForceField("tip3p.xml"), boxSize=openmm.Vec3(1.85, 1.85, 1.85))
    system = force_field(f"{name}.xml").createSystem(
        modeller.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.7 * unit.nanometer,
        vdwCutoff=0.9 * unit.nanometer,
        constraints=None,
        rigidWater=False,
        polarization="extrapolated",
    )
    return system, modeller.positions


GROMACS = """
[ defaults ]
1 2 yes 0.5 0.8333
[ atomtypes ]
CT 12.011 -0.18 A 0.35 0.276144
HC  1.008  0.06 A 0.25 0.125520
[ moleculetype ]
ETH 3
[ atoms ]
1 CT 1 ETH C1 1 -0.18 12.011
2 HC 1 ETH H1 1  0.06 1.008
3 HC 1 ETH H2 1  0.06 1.008
4 HC 1 ETH H3 1  0.06 1.008
5 CT 1 ETH C2 1 -0.18 12.011
6 HC 1 ETH H4 1  0.06 1.008
7 HC 1 ETH H5 1  0.06 1.008
8 HC 1 ETH H6 1  0.06 1.008
[ bonds ]
1 2 1 0.109 284512.0
1 3 1 0.109 284512.0
1 4 1 0.109 284512.0
1 5 1 0.1529 224262.4
5 6 1 0.109 284512.0
5 7 1 0.109 284512.0
5 8 1 0.109 284512.0
[ pairs ]
2 6 1
2 7 1
2 8 1
3 6 1
3 7 1
3 8 1
4 6 1
4 7 1
4 8 1
[ angles ]
2 1 3 1 107.8 276.144
2 1 5 1 110.7 313.800
1 5 6 1 110.7 313.800
7 5 8 1 107.8 276.144
[ dihedrals ]
2 1 5 6 3 0.6276 1.8828 0.0 -2.5104 0.0 0.0
3 1 5 7 3 0.6276 1.8828 0.0 -2.5104 0.0 0.0
4 1 5 8 1 0.0 0.6 3
[ system ]
ethane
[ molecules ]
ETH 1
"""


def gromacs(tmp_path):
    path = tmp_path / "ethane.top"
    path.write_text(GROMACS)
    rng = np.random.default_rng(6)
    positions = np.zeros((8, 3))
    positions[4] = (0.153, 0.01, 0)
    for carbon, hydrogens, side in ((0, (1, 2, 3), -1), (4, (5, 6, 7), 1)):
        for k, h in enumerate(hydrogens):
            angle = 2 * np.pi * k / 3 + 0.3 * carbon
            positions[h] = positions[carbon] + 0.109 * np.array(
                [0.33 * side, 0.94 * np.cos(angle), 0.94 * np.sin(angle)]
            )
    positions += 0.005 * rng.normal(size=(8, 3))
    return app.GromacsTopFile(str(path)).createSystem(nonbondedMethod=app.NoCutoff), positions


TIP3PFB = ("amber14-all.xml", "amber14/tip3pfb.xml")
OPC = ("amber19-all.xml", "amber19/opc.xml")
SYSTEMS = {
    "tip3p-PME-flexible": lambda _: water("tip3p", nonbondedMethod=app.PME, rigidWater=False),
    "tip4pew-PME": lambda _: water("tip4pew", nonbondedMethod=app.PME),
    "tip4pew-LJPME": lambda _: water("tip4pew", nonbondedMethod=app.LJPME),
    "tip5p-reaction-field": lambda _: water("tip5p", nonbondedMethod=app.CutoffPeriodic),
    "spce-Ewald-switched": lambda _: water("spce", nonbondedMethod=app.Ewald, switchDistance=0.8),
    "peptide-vacuum": lambda _: vacuum(),
    "peptide-cmap": lambda _: cmap(),
    "peptide-cube-ions": lambda _: solvated(TIP3PFB, "tip3p", "cube", nonbondedMethod=app.PME),
    "peptide-octahedron-4-site": lambda _: solvated(
        OPC, "tip4pew", "octahedron", cutoff=0.5, nonbondedMethod=app.PME
    ),
    "gromacs-ethane": gromacs,
    **{
        f"implicit-{model}": lambda _, model=model: peptide(
            "amber14-all.xml", f"implicit/{model}.xml"
        )
        for model in ("hct", "obc1", "obc2", "gbn", "gbn2")
    },
    "implicit-amber96": lambda _: peptide("amber96.xml", "amber96_obc.xml"),
    "charmm36-lipid": lambda _: lipid("charmm36.xml"),
    "charmm36-water-ions": lambda _: salty_water("charmm36.xml", "charmm36/water.xml"),
    "swm4ndp-PME": lambda _: water("swm4ndp", nonbondedMethod=app.PME),
    "amoeba-direct": lambda _: peptide("amoeba2018.xml", polarization="direct"),
    "amoeba-mutual": lambda _: peptide("amoeba2018.xml", mutualInducedTargetEpsilon=5e-8),
    "amoeba-extrapolated": lambda _: peptide("amoeba2018.xml", polarization="extrapolated"),
    "amoeba-implicit": lambda _: peptide(
        "amoeba2018.xml", "amoeba2018_gk.xml", polarization="direct"
    ),
    "amoeba-water-PME": lambda _: amoeba_water("amoeba2018"),
    "iamoeba-water-PME": lambda _: amoeba_water("iamoeba"),
}
#: Where OpenMM itself computes parts in single precision, or iterates.
LOOSE = {"amoeba-water-PME": 1e-6, "iamoeba-water-PME": 1e-6, "amoeba-mutual": 1e-6}
LOOSE["charmm36-water-ions"] = 1e-7


# OpenMM's reader of Gromacs topologies leaves its file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SYSTEMS)
def test_whole_system(name, tmp_path):
    """Energy by force, forces, round trip, and finite gradients of every parameter."""
    system, positions = SYSTEMS[name](tmp_path)
    forces = list(system.getForces())
    for group, force in enumerate(forces):
        force.setForceGroup(group)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    context.computeVirtualSites()
    state = context.getState(positions=True, energy=True, forces=True)
    x = torch.tensor(state.getPositions(asNumpy=True)._value, requires_grad=True)
    box = torch.tensor(state.getPeriodicBoxVectors(asNumpy=True)._value)

    potential = mdgraft.graft(context)
    by_term = potential.energy_by_term(x, box)
    energies = {}
    for group, force in enumerate(forces):
        if not isinstance(force, openmm.CMMotionRemover):
            repeats = [key.split("_")[0] for key in energies].count(force.getName())
            key = force.getName() + (f"_{repeats}" if repeats else "")
            own = context.getState(energy=True, groups={group})
            energies[key] = own.getPotentialEnergy()._value
    assert list(by_term) == list(energies)
    rtol = LOOSE.get(name, 1e-9)
    for term, energy in by_term.items():
        assert energy.item() == pytest.approx(energies[term], rel=rtol, abs=1e-8), term

    potential(x, box).backward()
    massive = np.array(
        [system.getParticleMass(i)._value > 0 for i in range(system.getNumParticles())]
    )
    expected = np.array(state.getForces(asNumpy=True)._value)[massive]
    scale = np.sqrt((expected**2).mean())
    np.testing.assert_allclose(
        -x.grad.numpy()[massive], expected, rtol=rtol, atol=0.1 * rtol * scale
    )
    assert np.abs(x.grad.numpy()[~massive]).max(initial=0.0) == 0.0
    for parameter, tensor in potential.named_parameters():
        assert bool(torch.isfinite(tensor.grad).all()), parameter

    before = openmm.XmlSerializer.serialize(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
