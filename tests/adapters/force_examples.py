"""A small System for each Force class that has energy."""

import numpy as np
import openmm

N = 9
BOX = np.array([[2.0, 0, 0], [0.4, 2.1, 0], [-0.5, 0.3, 2.2]])
BONDS = [(i, i + 1) for i in range(4)]
ANGLES = [(i, i + 1, i + 2) for i in range(3)]
TORSIONS = [(i, i + 1, i + 2, i + 3) for i in range(3)]
PERIODIC = 2  # CutoffPeriodic of every class that has it


def _rng():
    return np.random.default_rng(3)


def _periodic(force):
    force.setNonbondedMethod(PERIODIC)
    force.setCutoffDistance(0.8)
    return force


def atm():
    force = openmm.ATMForce(0.3, 0.6, 0.05, 10.0, 0.2, 80.0, 40.0, 0.1, 1)
    force.addForce(harmonic_bond())
    for i in range(N):
        force.addParticle(openmm.Vec3(0.1 * (i == 2), 0.0, 0.05), openmm.Vec3(0, 0, 0))
    return force


def amoeba_torsion_torsion():
    force = openmm.AmoebaTorsionTorsionForce()
    angle = np.linspace(-180, 180, 8)
    x, y = np.meshgrid(angle, angle, indexing="ij")
    energy = 3 * np.cos(np.deg2rad(x)) + 2 * np.sin(np.deg2rad(x + y)).round(12)
    force.setTorsionTorsionGrid(0, np.stack([x, y, energy], axis=-1).tolist())
    force.addTorsionTorsion(0, 1, 2, 3, 4, 5, 0)
    return force


def amoeba_vdw():
    rng, force = _rng(), openmm.AmoebaVdwForce()
    force.setNonbondedMethod(openmm.AmoebaVdwForce.CutoffPeriodic)
    force.setCutoffDistance(0.8)
    force.setAlchemicalMethod(openmm.AmoebaVdwForce.Decouple)
    for i in range(N):
        parent = i - i % 3
        sigma, epsilon = rng.uniform(0.12, 0.2), rng.uniform(0.2, 1.0)
        force.addParticle(parent, sigma, epsilon, 0.0 if i == parent else 0.9, i < 3, 1.0)
        force.setParticleExclusions(i, [parent, parent + 1, parent + 2])
    return force


def amoeba_wca_dispersion():
    rng, force = _rng(), openmm.AmoebaWcaDispersionForce()
    for _ in range(N):
        force.addParticle(rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.6))
    return force


def amoeba_multipole():
    rng, force = _rng(), openmm.AmoebaMultipoleForce()
    # Free of the noise of an iteration, which differences would show.
    force.setPolarizationType(openmm.AmoebaMultipoleForce.Extrapolated)
    for i in range(N):
        a, b, c = rng.normal(0, 3e-4, size=3)
        quadrupole = [a, b, c, b, -2 * a, 0.0, c, 0.0, a]
        axes = (
            openmm.AmoebaMultipoleForce.ZThenX,
            i - i % 3 + (i + 1) % 3,
            i - i % 3 + (i + 2) % 3,
        )
        dipole = rng.normal(0, 0.01, size=3).tolist()
        force.addMultipole(0.3 * rng.normal(), dipole, quadrupole, *axes, -1, 0.39, 0.09, 5e-4)
    for i in range(N):
        group = [i - i % 3, i - i % 3 + 1, i - i % 3 + 2]
        others = [j for j in group if j != i]
        force.setCovalentMap(i, openmm.AmoebaMultipoleForce.Covalent12, others)
        force.setCovalentMap(i, openmm.AmoebaMultipoleForce.PolarizationCovalent11, group)
    return force


def amoeba_generalized_kirkwood():
    rng, force = _rng(), openmm.AmoebaGeneralizedKirkwoodForce()
    multipoles = amoeba_multipole()
    # With extrapolated dipoles OpenMM's forces are not the gradient of its energy.
    multipoles.setPolarizationType(openmm.AmoebaMultipoleForce.Direct)
    for i in range(N):
        charge = multipoles.getMultipoleParameters(i)[0]._value
        radii = rng.uniform(0.1, 0.14, size=2)
        force.addParticle(charge, radii[0], rng.uniform(0.6, 0.8), radii[1], 0.0)
    return [multipoles, force]


def cmap_torsion():
    force = openmm.CMAPTorsionForce()
    force.addMap(4, _rng().normal(size=16).tolist())
    force.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    return force


def constant_potential():
    rng, force = _rng(), openmm.ConstantPotentialForce()
    for _ in range(N):
        force.addParticle(rng.normal())
    force.addElectrode([0, 1, 2], 20.0, 0.06, 1.0)
    force.addElectrode([6, 7, 8], -10.0, 0.07, 0.0)
    force.addException(3, 4, 0.1)
    force.setUseChargeConstraint(True)
    force.setCutoffDistance(0.8)
    force.setPMEParameters(3.5, 12, 12, 14)
    force.setConstantPotentialMethod(openmm.ConstantPotentialForce.Matrix)
    return force


def custom_angle():
    force = openmm.CustomAngleForce("scale*k*(theta-theta0)^4")
    force.addGlobalParameter("scale", 0.8)
    for name in ("k", "theta0"):
        force.addPerAngleParameter(name)
    for angle in ANGLES:
        force.addAngle(*angle, [30.0, 1.8])
    return force


def custom_bond():
    force = openmm.CustomBondForce("D*(1-exp(a*(r0-r)))^2")
    for name in ("D", "a", "r0"):
        force.addPerBondParameter(name)
    for bond in BONDS:
        force.addBond(*bond, [50.0, 4.0, 0.3])
    return force


def custom_cv():
    force = openmm.CustomCVForce("0.5*k*(d+0.1*a-r0)^2")
    force.addCollectiveVariable("d", _simple(openmm.CustomBondForce("r"), "Bond", BONDS[:1]))
    force.addCollectiveVariable("a", _simple(openmm.CustomAngleForce("theta"), "Angle", ANGLES[:1]))
    force.addGlobalParameter("k", 40.0)
    force.addGlobalParameter("r0", 0.2)
    return force


def _simple(force, kind, members):
    for member in members:
        getattr(force, f"add{kind}")(*member, [])
    return force


def custom_centroid_bond():
    force = openmm.CustomCentroidBondForce(2, "k*distance(g1,g2)^2")
    force.addPerBondParameter("k")
    force.addGroup([0, 1, 2])
    force.addGroup([4, 5, 7], [1.0, 2.0, 3.0])
    force.addBond([0, 1], [12.0])
    return force


def custom_compound_bond():
    force = openmm.CustomCompoundBondForce(
        3, "k*(distance(p1,p2)-distance(p2,p3))^2*angle(p1,p2,p3)"
    )
    force.addPerBondParameter("k")
    for angle in ANGLES:
        force.addBond(angle, [25.0])
    return force


def custom_external():
    force = openmm.CustomExternalForce("k*periodicdistance(x,y,z,x0,y0,z0)^2")
    for name in ("k", "x0", "y0", "z0"):
        force.addPerParticleParameter(name)
    rng = _rng()
    for i in range(0, N, 2):
        force.addParticle(i, [rng.uniform(1, 9), *rng.uniform(0, 1, size=3)])
    return force


def custom_gb():
    rng, force = _rng(), _periodic(openmm.CustomGBForce())
    for name in ("q", "s"):
        force.addPerParticleParameter(name)
    force.addComputedValue("I", "s1*s2*exp(-r^2)", openmm.CustomGBForce.ParticlePair)
    force.addComputedValue("B", "1/(1+0.1*I)", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("-q^2/B", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("q1*q2/sqrt(r^2+B1*B2)", openmm.CustomGBForce.ParticlePair)
    for _ in range(N):
        force.addParticle([rng.normal(), rng.uniform(0.5, 1.5)])
    return force


def custom_hbond():
    force = _periodic(openmm.CustomHbondForce("k*(distance(d1,a1)-r0)^2*cos(angle(d2,d1,a1))"))
    force.addPerDonorParameter("k")
    force.addPerAcceptorParameter("r0")
    for i in (0, 2):
        force.addDonor(i, i + 1, -1, [10.0 + i])
    for i in (5, 7):
        force.addAcceptor(i, i + 1, -1, [0.2])
    return force


def custom_many_particle():
    energy = "C*(1+3*cos(theta1)*cos(theta2)*cos(theta3))/(r12*r13*r23)^3"
    angles = "theta1=angle(p1,p2,p3); theta2=angle(p2,p3,p1); theta3=angle(p3,p1,p2)"
    distances = "r12=distance(p1,p2); r13=distance(p1,p3); r23=distance(p2,p3); C=a1*a2*a3"
    force = _periodic(openmm.CustomManyParticleForce(3, f"{energy}; {angles}; {distances}"))
    force.addPerParticleParameter("a")
    for i in range(N):
        force.addParticle([0.05 + 0.01 * i], 0)
    return force


def custom_nonbonded():
    rng, force = _rng(), _periodic(openmm.CustomNonbondedForce("e*(s/r)^6*f(r); s=s1+s2; e=e1*e2"))
    for name in ("s", "e"):
        force.addPerParticleParameter(name)
    force.addTabulatedFunction("f", openmm.Continuous1DFunction([1.0, 0.7, 0.3, 0.2], 0.0, 2.0))
    for _ in range(N):
        force.addParticle([rng.uniform(0.1, 0.2), rng.uniform(0.3, 1.0)])
    for bond in BONDS:
        force.addExclusion(*bond)
    return force


def custom_torsion():
    force = openmm.CustomTorsionForce("k*(1+cos(n*theta-t0))")
    for name in ("k", "n", "t0"):
        force.addPerTorsionParameter(name)
    for torsion in TORSIONS:
        force.addTorsion(*torsion, [6.0, 2.0, 0.4])
    return force


def custom_volume():
    force = openmm.CustomVolumeForce("p*v+0.1*(ax-bx)^2")
    force.addGlobalParameter("p", 1.5)
    return force


def drude():
    force = openmm.DrudeForce()
    force.addParticle(1, 0, 2, -1, -1, -1.2, 1e-3, 0.8, 1.0)
    force.addParticle(4, 3, -1, -1, -1, -1.0, 1.5e-3, 1.0, 1.0)
    force.addScreenedPair(0, 1, 2.6)
    return force


def gay_berne():
    rng, force = _rng(), _periodic(openmm.GayBerneForce())
    for _ in range(N):
        # Spheres: OpenMM's forces on others are not the gradient of its energy.
        size = 3 * [rng.uniform(0.1, 0.2)]
        force.addParticle(rng.uniform(0.2, 0.3), rng.uniform(0.3, 1), -1, -1, *size, 1, 1, 1)
    force.addException(0, 1, 0.25, 0.0)
    force.addException(3, 4, 0.25, 0.6)
    return force


def gbsa_obc():
    rng, force = _rng(), openmm.GBSAOBCForce()
    for _ in range(N):
        force.addParticle(0.4 * rng.normal(), rng.uniform(0.1, 0.2), rng.uniform(0.6, 0.9))
    return force


def harmonic_angle():
    force = openmm.HarmonicAngleForce()
    for angle in ANGLES:
        force.addAngle(*angle, 1.8, 40.0)
    return force


def harmonic_bond():
    force = openmm.HarmonicBondForce()
    for bond in BONDS:
        force.addBond(*bond, 0.3, 500.0)
    return force


def hippo_nonbonded():
    rng, force = _rng(), openmm.HippoNonbondedForce()
    force.setExtrapolationCoefficients([0.042, 0.635, 0.414])
    for i in range(N):
        a, b, c = rng.normal(0, 3e-4, size=3)
        quadrupole = [a, b, c, b, -2 * a, 0.0, c, 0.0, a]
        axes = (openmm.HippoNonbondedForce.ZThenX, i - i % 3 + (i + 1) % 3, i - i % 3 + (i + 2) % 3)
        force.addParticle(
            0.3 * rng.normal(),
            rng.normal(0, 0.01, size=3).tolist(),
            quadrupole,
            rng.uniform(1, 4),  # core charge
            rng.uniform(30, 50),  # alpha
            rng.uniform(100, 300),  # epsilon
            rng.uniform(20, 40),  # damping
            rng.uniform(0.01, 0.04),  # c6
            rng.uniform(0.5, 1.5),  # Pauli K, Q, alpha
            rng.uniform(2, 4),
            rng.uniform(35, 50),
            1e-3,  # polarizability
            *axes,
            -1,
        )
    for first in range(0, N, 3):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            force.addException(first + i, first + j, 0.0, 0.0, 0.2, 0.0, 0.1, 0.0)
    return force


def lcpo():
    rng, force = _rng(), openmm.LCPOForce()
    force.setSurfaceTension(2.3)
    for _ in range(N):
        force.addParticle(rng.uniform(0.2, 0.33), *rng.normal(size=4))
    return force


def nonbonded():
    rng, force = _rng(), openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(0.8)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.6)
    force.addGlobalParameter("lambda", 0.4)
    for _ in range(N):
        force.addParticle(0.3 * rng.normal(), rng.uniform(0.15, 0.25), rng.uniform(0.2, 1.0))
    for bond in BONDS:
        force.addException(*bond, 0.05, 0.2, 0.1)
    force.addParticleParameterOffset("lambda", 1, 0.3, 0.01, 0.1)
    force.addExceptionParameterOffset("lambda", 1, 0.1, 0.01, 0.1)
    return force


def orientation_restraint():
    return openmm.OrientationRestraintForce(13.0, _rng().normal(size=(N, 3)), [])


def periodic_torsion():
    force = openmm.PeriodicTorsionForce()
    for torsion in TORSIONS:
        force.addTorsion(*torsion, 2, 0.5, 8.0)
    return force


def python():
    return openmm.PythonForce(quartic, {"k": 2.5})


def quartic(state):
    """At module level, so that it can be pickled."""
    k, x = state.getParameters()["k"], state.getPositions(asNumpy=True)._value
    return k * np.sum(x**4), -4 * k * x**3


def rb_torsion():
    force = openmm.RBTorsionForce()
    for torsion in TORSIONS:
        force.addTorsion(*torsion, 1.0, -2.0, 3.0, 0.5, -0.7, 1.1)
    return force


def rg():
    return openmm.RGForce([0, 2, 3, 5])


def rmsd():
    return openmm.RMSDForce(_rng().normal(size=(N, 3)), [])


#: What makes the forces of an example, by Force class; the class itself comes last. By name, since
#: older versions of OpenMM lack some of the classes.
_MAKERS = {
    "ATMForce": atm,
    "AmoebaGeneralizedKirkwoodForce": amoeba_generalized_kirkwood,
    "AmoebaMultipoleForce": amoeba_multipole,
    "AmoebaTorsionTorsionForce": amoeba_torsion_torsion,
    "AmoebaVdwForce": amoeba_vdw,
    "AmoebaWcaDispersionForce": amoeba_wca_dispersion,
    "CMAPTorsionForce": cmap_torsion,
    "ConstantPotentialForce": constant_potential,
    "CustomAngleForce": custom_angle,
    "CustomBondForce": custom_bond,
    "CustomCVForce": custom_cv,
    "CustomCentroidBondForce": custom_centroid_bond,
    "CustomCompoundBondForce": custom_compound_bond,
    "CustomExternalForce": custom_external,
    "CustomGBForce": custom_gb,
    "CustomHbondForce": custom_hbond,
    "CustomManyParticleForce": custom_many_particle,
    "CustomNonbondedForce": custom_nonbonded,
    "CustomTorsionForce": custom_torsion,
    "CustomVolumeForce": custom_volume,
    "DrudeForce": drude,
    "GBSAOBCForce": gbsa_obc,
    "GayBerneForce": gay_berne,
    "HarmonicAngleForce": harmonic_angle,
    "HarmonicBondForce": harmonic_bond,
    "HippoNonbondedForce": hippo_nonbonded,
    "LCPOForce": lcpo,
    "NonbondedForce": nonbonded,
    "OrientationRestraintForce": orientation_restraint,
    "PeriodicTorsionForce": periodic_torsion,
    "PythonForce": python,
    "RBTorsionForce": rb_torsion,
    "RGForce": rg,
    "RMSDForce": rmsd,
}

EXAMPLES = {getattr(openmm, k): make for k, make in _MAKERS.items() if hasattr(openmm, k)}


def example(force_class):
    """System, positions and box vectors with one force of a class."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    for i in range(N):
        fixed = force_class.__name__ == "ConstantPotentialForce" and i in (0, 1, 2, 6, 7, 8)
        system.addParticle(0.0 if fixed else 12.0)
    made = EXAMPLES[force_class]()
    for force in made if isinstance(made, list) else [made]:
        system.addForce(force)
    rng = np.random.default_rng(8)
    lattice = np.array([(i % 3, i // 3 % 3, i // 9) for i in range(N)]) * 0.3
    return system, lattice + rng.uniform(-0.06, 0.06, size=(N, 3)), BOX
