"""JAX MD's force field of the solvated protein beside mdgraft; prints fields of results as JSON.

Its converter takes the OpenMM System, so that both sides get the same one.
"""

# ruff: noqa: E402 - threads have to be chosen before the import starts them
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PASSED = json.loads(sys.argv[1])
if hasattr(os, "sched_setaffinity"):
    # XLA has no setting for the size of its pool, which is that of the cores it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: PASSED["threads"]])

import memory
import numpy as np
import openmm
import systems
from engine import Engine
from openmm import unit
from timing import Moves, Settings, alternate

# Neither side's package is imported before it is used: memory is measured with one alone.

_KCAL = 4.184
_SETTINGS = Settings(threads=PASSED["threads"], dtype="float32")
#: Margin of JAX MD's list [nm]. Its own benchmark has 0.2; less takes less time and memory here,
#: with a new list and without, but would need new ones more often in dynamics.
_MARGIN = 0.05


class Converted:
    """JAX MD's side, in float32: energy, forces and gradients of all parameters, compiled."""

    def __init__(self, case: systems.Case) -> None:
        import jax
        import jax.numpy as jnp
        from jax_md import partition
        from jax_md.mm_forcefields.amber.energy import energy
        from jax_md.mm_forcefields.io.openmm import convert_openmm_system
        from jax_md.mm_forcefields.nonbonded.electrostatics import PMECoulomb

        self.jax = jax
        found = convert_openmm_system(
            case.system,
            None,
            case.positions * unit.nanometer,
            case.box * unit.nanometer,
            dr_threshold=10 * _MARGIN,
            format=partition.NeighborListFormat.OrderedSparse,
            precision="single",
        )
        mesh = PMECoulomb(
            r_cut=found.nb_options.r_cut,
            alpha=float(found.recip_alpha),
            grid_size=np.asarray(found.recip_grid),
        )
        potential, neighbours, *_ = energy(
            found.params,
            found.topology,
            found.box_vectors,
            coulomb_options=mesh,
            nb_options=found.nb_options,
        )
        leaves, structure = jax.tree.flatten(found.params)
        # Periodicities are integers.
        varied = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

        def total(positions, values, listed):
            left = iter(values)
            filled = [next(left) if v else leaf for leaf, v in zip(leaves, varied, strict=True)]
            terms = potential(positions, listed, params=structure.unflatten(filled))
            return terms["etotal"], terms

        @jax.jit
        def derivatives(positions, values, listed):
            listed = listed.update(positions)
            slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
            return slopes(positions, values, listed), listed

        self.derivatives = derivatives
        self.values = [leaf for leaf, v in zip(leaves, varied, strict=True) if v]
        self.side = np.asarray(found.box_vectors)
        self.listed = neighbours.allocate(found.positions)
        self.place(case.positions)

    def place(self, positions: np.ndarray) -> None:
        """Move the atoms, into the box, where its cell lists want them."""
        wrapped = np.mod(10 * positions, self.side)
        self.positions = self.jax.device_put(wrapped.astype(np.float32)).block_until_ready()

    def everything(self) -> None:
        """Energy, forces and gradients of all parameters."""
        found = self.derivatives(self.positions, self.values, self.listed)
        ((_, self.terms), (slope, _)), self.listed = self.jax.block_until_ready(found)
        self.slope = slope

    def energies(self) -> dict[str, float]:
        """Energies by OpenMM's force [kJ/mol]."""
        terms = {name: _KCAL * float(value) for name, value in self.terms.items()}
        return {
            "HarmonicBondForce": terms["bond_pot"],
            "HarmonicAngleForce": terms["angle_pot"],
            "PeriodicTorsionForce": terms["torsion_pot"],
            "NonbondedForce": terms["nb_pot"] + terms["disp_pot"],
        }

    def forces(self) -> np.ndarray:
        """Forces ``(N, 3)`` [kJ/mol/nm]."""
        return -10 * _KCAL * np.asarray(self.slope)

    def overflown(self) -> bool:
        """Whether neighbours found no place in its list."""
        return bool(self.listed.did_buffer_overflow)


def build() -> systems.Case:
    """The protein, with the mesh that OpenMM's CPU platform takes written into its System."""
    protein = Path(PASSED["protein"]) if PASSED["protein"] else None
    case = systems.protein(PASSED["quick"], Path(PASSED["output"]), protein)
    engine = Engine(case, "CPU", PASSED["threads"])
    # This platform settles its mesh when it first computes an energy.
    engine.energy()
    (force,) = (f for f in case.system.getForces() if isinstance(f, openmm.NonbondedForce))
    force.setPMEParameters(*force.getPMEParametersInContext(engine.context))
    for group, force in enumerate(case.system.getForces()):
        force.setForceGroup(group)
    return case


def converted(case: systems.Case) -> Callable[[], None]:
    """What JAX MD computes."""
    return Converted(case).everything


def grafted(case: systems.Case) -> Callable[[], None]:
    """What mdgraft computes, without a Context of OpenMM in its memory."""
    import mdgraft
    import torch

    torch.set_num_threads(PASSED["threads"])
    potential = mdgraft.graft(case.system, dtype=torch.float32)
    positions = torch.tensor(case.positions, dtype=torch.float32, requires_grad=True)
    box = torch.tensor(case.box, dtype=torch.float32)
    return lambda: potential(positions, box).backward()


def memory_of(side: str) -> dict[str, int]:
    """Highest memory of a process of its own that sets one side up and computes twice [bytes]."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(PASSED | {"side": side})],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(side: Callable[[systems.Case], Callable[[], None]]) -> None:
    """Print the highest memory, everything counted, and that before either package came in."""
    case = build()
    before = memory.restart_peak()
    compute = side(case)
    for _ in range(2):
        compute()
    print(json.dumps({"peak_bytes": memory.peak(), "before_bytes": before}))


def differences(case: systems.Case, theirs: Converted) -> dict[str, object]:
    """Energies of both by force [kJ/mol], and how much the forces differ, relative."""
    reference = Engine(case, "Reference")
    theirs.place(case.positions)
    theirs.everything()
    energies = {}
    for group, force in enumerate(case.system.getForces()):
        if (found := theirs.energies().get(force.getName())) is not None:
            state = reference.context.getState(energy=True, groups={group})
            energies[force.getName()] = [found, state.getPotentialEnergy()._value]
    forces = reference.energy_forces().getForces(asNumpy=True)._value
    difference = np.linalg.norm(theirs.forces() - forces) / np.linalg.norm(forces)
    return {"energies": energies, "force_difference": float(difference)}


def main() -> None:
    """Measure memory of both, then time, then compare what they computed."""
    sides = {name: memory_of(name) for name in ("jaxmd", "mdgraft")}
    import torch
    from grafted import Graft

    torch.set_num_threads(PASSED["threads"])
    case = build()
    ours = Graft(Engine(case, "CPU", PASSED["threads"]), case, _SETTINGS, virial=False)
    theirs = Converted(case)
    extra = differences(case, theirs) | {"memory": sides}
    of_all = [sum(pair) for pair in zip(*extra["energies"].values(), strict=True)]
    peaks = [sides[name]["peak_bytes"] for name in ("jaxmd", "mdgraft")]
    note = (
        f"peak {peaks[0] / 1e6:.0f} MB, mdgraft {peaks[1] / 1e6:.0f} MB ({peaks[0] / peaks[1]:.1f}"
        f" times); E off by {abs(of_all[0] / of_all[1] - 1):.1g}, F by "
        f"{extra['force_difference']:.1g}; dispersion correction is a constant"
    )
    results = []
    for kind in Moves.kinds:
        moves = Moves(case.positions, kind)

        def prepare(count, moves=moves):
            positions = moves(count)
            ours.place(positions)
            theirs.place(positions)

        found = alternate(
            prepare,
            {"theirs": ours.everything, "ours": theirs.everything},
            PASSED["repeats"],
            warm_up=2,
        )
        results.append(
            {
                "row": "peer jaxmd dhfr",
                "work": "E, F, all dE/dp",
                "beside": "mdgraft: the same",
                "atoms": case.n_atoms,
                "threads": PASSED["threads"],
                "dtype": "float32",
                "moves": kind,
                "ours": found["ours"],
                "theirs": found["theirs"],
                "target": 7.0,
                "note": "its list overflowed" if theirs.overflown() else note,
                "extra": extra,
            }
        )
    print(json.dumps(results))


if "side" in PASSED:
    measure_memory({"jaxmd": converted, "mdgraft": grafted}[PASSED["side"]])
else:
    main()
