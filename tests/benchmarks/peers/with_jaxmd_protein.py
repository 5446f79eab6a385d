"""JAX MD's force field of the solvated protein beside mdgraft; prints fields of results as JSON.

Its converter takes the OpenMM System, so that both sides get the same one. Each side is a process
of its own, which shows its memory, and whose heap is not as the other side has left it.
"""

# ruff: noqa: E402 - threads have to be chosen before the import starts them
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from grafted import Graft

# Neither side's package is imported before it is used, so that no process has both.

_KCAL = 4.184
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
        """Compute energy, forces and gradients of all parameters."""
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


def grafted(case: systems.Case) -> Graft:
    """mdgraft's side, of the System alone: no Context of OpenMM is in its memory."""
    import torch
    from grafted import Graft

    torch.set_num_threads(PASSED["threads"])
    settings = Settings(threads=PASSED["threads"], dtype="float32")
    return Graft(case.system, case, settings, virial=False)


def differences(case: systems.Case, found: Converted) -> dict[str, object]:
    """Energies of JAX MD and OpenMM by force [kJ/mol], and how much the forces differ, relative."""
    reference = Engine(case, "Reference")
    energies = {}
    for group, force in enumerate(case.system.getForces()):
        if (energy := found.energies().get(force.getName())) is not None:
            state = reference.context.getState(energy=True, groups={group})
            energies[force.getName()] = [energy, state.getPotentialEnergy()._value]
    forces = reference.energy_forces().getForces(asNumpy=True)._value
    difference = np.linalg.norm(found.forces() - forces) / np.linalg.norm(forces)
    return {"energies": energies, "force_difference": float(difference)}


def serve(build_side: Callable[[systems.Case], Converted | Graft]) -> None:
    """Tell the peak memory of one side, everything counted; then move atoms and compute on request.

    A request is a line: a kind of moves with the number of the round, or nothing to compute.
    """
    case = build()
    memory.restart_peak()
    side = build_side(case)
    for _ in range(2):
        side.everything()
    answer = {"peak_bytes": memory.peak()}
    if isinstance(side, Converted):
        answer |= differences(case, side)
    print(json.dumps(answer), flush=True)
    moves = {kind: Moves(case.positions, kind) for kind in Moves.kinds}
    for request in sys.stdin:
        if request.strip():
            kind, count = request.split()
            side.place(moves[kind](int(count)))
        else:
            side.everything()
        overflown = isinstance(side, Converted) and side.overflown()
        print(json.dumps({"overflown": overflown}), flush=True)


class Remote:
    """One side in a process of its own."""

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(PASSED | {"side": name})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.found = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"one side ended with exit status {self.process.wait()}")
        return json.loads(line)

    def ask(self, request: str = "") -> dict[str, Any]:
        """Send a line and wait for what comes back."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Measure memory and difference, then time both sides in turn."""
    theirs, ours = Remote("jaxmd"), Remote("mdgraft")
    n_atoms = build().n_atoms
    totals = [sum(pair) for pair in zip(*theirs.found["energies"].values(), strict=True)]
    peaks = [side.found["peak_bytes"] for side in (theirs, ours)]
    note = (
        f"peak {peaks[0] / 1e6:.0f} MB, mdgraft {peaks[1] / 1e6:.0f} MB ({peaks[0] / peaks[1]:.1f}"
        f" times); E off by {abs(totals[0] / totals[1] - 1):.1g}, F by "
        f"{theirs.found['force_difference']:.1g}; dispersion correction is a constant"
    )
    results = []
    for kind in Moves.kinds:

        def prepare(count, kind=kind):
            for side in (theirs, ours):
                side.ask(f"{kind} {count}")

        found = alternate(
            prepare, {"theirs": ours.ask, "ours": theirs.ask}, PASSED["repeats"], warm_up=2
        )
        overflown = theirs.ask()["overflown"]
        results.append(
            {
                "row": "peer jaxmd dhfr",
                "work": "E, F, all dE/dp",
                "beside": "mdgraft: the same",
                "atoms": n_atoms,
                "threads": PASSED["threads"],
                "dtype": "float32",
                "moves": kind,
                "ours": found["ours"],
                "theirs": found["theirs"],
                "target": 7.0,
                "note": "its list overflowed" if overflown else note,
                "extra": theirs.found | {"mdgraft_peak_bytes": peaks[1]},
            }
        )
    for side in (theirs, ours):
        side.end()
    print(json.dumps(results))


if "side" in PASSED:
    serve({"jaxmd": Converted, "mdgraft": grafted}[PASSED["side"]])
else:
    main()
