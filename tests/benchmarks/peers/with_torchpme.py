"""torch-pme's electrostatics of water beside OpenMM's; prints fields of results as JSON."""

import json
import math
import sys

import numpy as np
import openmm
import systems
import torch
import torchpme
from engine import Engine, disagreement
from timing import Moves, alternate
from vesin import NeighborList

PASSED = json.loads(sys.argv[1])
_COULOMB = 138.93545764438198
_CUTOFF = 0.9


def charges_alone() -> tuple[systems.Case, np.ndarray]:
    """The box of water without Lennard-Jones and exclusions, which torch-pme does not have."""
    water = systems.water_3k()
    system, force = openmm.System(), openmm.NonbondedForce()
    system.setDefaultPeriodicBoxVectors(*water.box)
    system.addForce(force)
    charges = np.tile([-0.834, 0.417, 0.417], water.n_atoms // 3)
    for charge in charges:
        system.addParticle(1.0)
        force.addParticle(charge, 1.0, 0.0)
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(_CUTOFF)
    return systems.Case(system, water.positions, water.box), charges


def main() -> None:
    """Measure energy and its gradients by positions, charges and box, with OpenMM's accuracy."""
    torch.set_num_threads(PASSED["threads"])
    case, charges = charges_alone()
    engine = Engine(case, "CPU", PASSED["threads"])
    (force,) = case.system.getForces()
    alpha, *mesh = force.getPMEParametersInContext(engine.context)
    spacing = float(case.box[0, 0]) / mesh[0]
    neighbours = NeighborList(cutoff=_CUTOFF, full_list=False)
    results = []
    for name in ("float32", "float64"):
        dtype = getattr(torch, name)
        kernel = torchpme.CoulombPotential(smearing=1 / (math.sqrt(2) * alpha), prefactor=_COULOMB)
        calculator = torchpme.PMECalculator(
            kernel.to(dtype), mesh_spacing=spacing, interpolation_nodes=5
        ).to(dtype)
        moves = Moves(case.positions, "rebuild")
        state = {}

        def prepare(count, moves=moves, dtype=dtype, state=state):
            positions = moves(count)
            engine.place(positions)
            state["numpy"] = positions
            state["positions"] = torch.tensor(positions, dtype=dtype, requires_grad=True)
            state["charges"] = torch.tensor(charges[:, None], dtype=dtype, requires_grad=True)
            state["box"] = torch.tensor(case.box, dtype=dtype, requires_grad=True)

        def compute(calculator=calculator, dtype=dtype, state=state):
            i, j, shifts = neighbours.compute(state["numpy"], case.box, True, "ijS")
            pairs = torch.as_tensor(np.stack([i, j], axis=1).astype(np.int64))
            shifts = torch.as_tensor(shifts).to(dtype)
            x, box = state["positions"], state["box"]
            separations = x[pairs[:, 1]] - x[pairs[:, 0]] + shifts @ box
            found = calculator(state["charges"], box, x, pairs, separations.norm(dim=1))
            energy = (found * state["charges"]).sum()
            energy.backward()
            state["energy"] = energy.item()

        sides = {"theirs": engine.energy_forces, "ours": compute}
        found = alternate(prepare, sides, PASSED["repeats"])
        results.append(
            {
                "row": "peer torchpme water-3k",
                "work": "E, F, dE/dq, virial",
                "beside": "OpenMM CPU: E, F",
                "atoms": case.n_atoms,
                "threads": PASSED["threads"],
                "dtype": name,
                "moves": "rebuild",
                "ours": found["ours"],
                "theirs": found["theirs"],
                "note": disagreement(state["energy"], engine.energy()) or "charges alone",
            }
        )
    print(json.dumps(results))


main()
