"""TorchMD's Lennard-Jones fluid beside OpenMM; prints fields of results as JSON."""

import json
import sys
import types

import systems
import torch
from engine import Engine, disagreement
from timing import Moves, alternate
from torchmd.forces import Forces

PASSED = json.loads(sys.argv[1])
_KCAL = 4.184


def parameters(case: systems.Case, dtype: torch.dtype) -> types.SimpleNamespace:
    """What its forces read, without the force-field files that usually fill it."""
    sigma, epsilon = 3.4, 0.996 / _KCAL
    a, b = (torch.tensor([[4 * epsilon * sigma**p]], dtype=dtype) for p in (12, 6))
    return types.SimpleNamespace(
        masses=torch.full((case.n_atoms,), 39.9),
        charges=torch.zeros(case.n_atoms, dtype=dtype),
        mapped_atom_types=torch.zeros(case.n_atoms, dtype=torch.long),
        nonbonded_params=True,
        get_AB=lambda: (a, b),
        get_exclusions=lambda kinds: [],
        device="cpu",
    )


def main() -> None:
    """Measure energy and forces; it goes through all pairs, so that the fluid is small."""
    torch.set_num_threads(PASSED["threads"])
    case = systems.lennard_jones(8 if PASSED["quick"] else 12, corrected=False)
    engine = Engine(case, "CPU", PASSED["threads"])
    results = []
    for name in ("float32", "float64"):
        dtype = getattr(torch, name)
        peer = Forces(parameters(case, dtype), terms=["lj"], cutoff=10.0, switch_dist=9.0)
        box = 10.0 * torch.tensor(case.box, dtype=dtype)[None]
        forces = torch.zeros(1, case.n_atoms, 3, dtype=dtype)
        moves = Moves(case.positions, "step")
        state = {}

        def prepare(count, moves=moves, dtype=dtype, state=state):
            positions = moves(count)
            engine.place(positions)
            state["positions"] = 10.0 * torch.tensor(positions, dtype=dtype)[None]

        def compute(peer=peer, box=box, forces=forces, state=state):
            state["energy"] = peer.compute(state["positions"], box, forces)[0]

        sides = {"theirs": engine.energy_forces, "ours": compute}
        found = alternate(prepare, sides, PASSED["repeats"])
        differ = disagreement(_KCAL * state["energy"], engine.energy())
        results.append(
            {
                "row": "peer torchmd lj-2k",
                "work": "E, F",
                "beside": "OpenMM CPU: E, F",
                "atoms": case.n_atoms,
                "threads": PASSED["threads"],
                "dtype": name,
                "moves": "step",
                "ours": found["ours"],
                "theirs": found["theirs"],
                "note": differ or "all pairs, no neighbour list",
            }
        )
    print(json.dumps(results))


main()
