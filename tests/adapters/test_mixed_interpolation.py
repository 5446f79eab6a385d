"""Interpolation towards a model, where OpenMM-ML ends elsewhere."""

import itertools
import math

import numpy as np
import openmm
import pytest
from mdgraft._units import COULOMB
from mdgraft_openmm import mixed_system
from mdgraft_openmm._converter import Host
from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm._mesh import mesh_parameters
from test_mixed import REGIONS, box_of, evaluate, network, solvated, with_openmmml

#: A module with a list of neighbours has no other way into OpenMM.
pytestmark = pytest.mark.skipif(
    not hasattr(openmm, "PythonForce"), reason="OpenMM has no PythonForce before version 8.5"
)


def beyond_the_cutoff(system, positions, region):
    """What OpenMM-ML scales of pairs beyond the cutoff, and the System does not have:
    Lennard-Jones energies, and all of the Coulomb energy where PME counts ``erf(alpha r)/r``."""
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    alpha, _ = mesh_parameters(force, Host(system=system))
    cutoff = force.getCutoffDistance()._value
    rows = [[x._value for x in force.getParticleParameters(i)] for i in range(len(positions))]
    sides = np.diag(box_of(system).numpy())
    total = 0.0
    for i, j in itertools.combinations(region, 2):
        apart = positions[i] - positions[j]
        r = float(np.linalg.norm(apart - sides * np.round(apart / sides)))
        if r > cutoff:
            (q1, s1, e1), (q2, s2, e2) = rows[i], rows[j]
            x = (0.5 * (s1 + s2) / r) ** 6
            total += (
                4 * math.sqrt(e1 * e2) * (x**2 - x) + COULOMB * q1 * q2 * math.erfc(alpha * r) / r
            )
    return total


@pytest.mark.parametrize("place", ["near", "far"])
def test_interpolation_differs_from_openmmml_by_what_lies_beyond_the_cutoff(place):
    """The end of a chain and a water: ours ends at the classical System, theirs near it."""
    system, topology, positions = solvated()
    system = faithful_copy(system)
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    # The link atom counts among the particles over which OpenMM's correction takes its mean.
    force.setUseDispersionCorrection(False)
    sides = np.diag(box_of(system).numpy())
    waters = [[a.index for a in r.atoms()] for r in topology.residues() if r.name == "HOH"]
    apart = positions[[w[0] for w in waters]] - positions[REGIONS["end"][0]]
    order = np.linalg.norm(apart - sides * np.round(apart / sides), axis=1).argsort()
    region = REGIONS["end"] + waters[order[0 if place == "near" else -1]]
    ours = mixed_system(system, network(), region, topology=topology, interpolate=True)
    theirs = with_openmmml(system, topology, region, interpolate=True)
    classical = evaluate(system, positions)[0]
    found, other = (evaluate(m, positions, lambda_interpolate=0.0)[0] for m in (ours, theirs))
    assert found == pytest.approx(classical, rel=1e-11)
    extra = beyond_the_cutoff(system, positions, region)
    assert (abs(extra) > 1e-4) == (place == "far")
    # Its Coulomb constant has fewer digits.
    assert other - found == pytest.approx(extra, abs=2e-6)
    found, other = (evaluate(m, positions, lambda_interpolate=1.0)[0] for m in (ours, theirs))
    assert found == pytest.approx(other, rel=1e-12)
