"""JAX MD's Lennard-Jones fluid beside OpenMM; prints fields of results as JSON."""

# ruff: noqa: E402 - threads have to be chosen before the import starts them
import json
import os
import sys

PASSED = json.loads(sys.argv[1])
if hasattr(os, "sched_setaffinity"):
    # XLA has no setting for the size of its pool, which is that of the cores it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: PASSED["threads"]])

import jax
import jax.numpy as jnp
import systems
from engine import Engine
from jax_md import energy, partition, space
from timing import Moves, alternate


def main() -> None:
    """Measure energy, forces and gradients of every sigma and epsilon, compiled, in float32."""
    case = systems.lennard_jones(12 if PASSED["quick"] else 22, corrected=False)
    length = float(case.box[0, 0])
    displacement, _ = space.periodic(length)
    neighbours, potential = energy.lennard_jones_neighbor_list(
        displacement,
        length,
        sigma=jnp.full(case.n_atoms, 0.34),
        epsilon=jnp.full(case.n_atoms, 0.996),
        # In units of sigma.
        r_onset=0.9 / 0.34,
        r_cutoff=1.0 / 0.34,
        dr_threshold=0.2,
        format=partition.OrderedSparse,
        capacity_multiplier=1.5,
    )

    def total(positions, sigma, epsilon, listed):
        return potential(positions, neighbor=listed, sigma=sigma, epsilon=epsilon)

    @jax.jit
    def derivatives(positions, sigma, epsilon, listed):
        listed = listed.update(positions)
        return jax.value_and_grad(total, argnums=(0, 1, 2))(
            positions, sigma, epsilon, listed
        ), listed

    engine = Engine(case, "CPU", PASSED["threads"])
    sigma, epsilon = jnp.full(case.n_atoms, 0.34), jnp.full(case.n_atoms, 0.996)
    state = {"listed": neighbours.allocate(jnp.asarray(case.positions % length))}
    results = []
    for kind in Moves.kinds:
        moves = Moves(case.positions, kind)

        def prepare(count, moves=moves):
            positions = moves(count)
            engine.place(positions)
            # Its cell lists want positions inside the box.
            state["positions"] = jnp.asarray(positions % length).block_until_ready()

        def peer():
            found = derivatives(state["positions"], sigma, epsilon, state["listed"])
            (_, slopes), state["listed"] = jax.block_until_ready(found)
            return slopes

        found = alternate(
            prepare, {"theirs": engine.energy_forces, "ours": peer}, PASSED["repeats"], warm_up=2
        )
        overflown = bool(state["listed"].did_buffer_overflow)
        results.append(
            {
                "row": "peer jaxmd lj-10k",
                "work": "E, F, all dE/dp",
                "beside": "OpenMM CPU: E, F",
                "atoms": case.n_atoms,
                "threads": PASSED["threads"],
                "dtype": "float32",
                "moves": kind,
                "ours": found["ours"],
                "theirs": found["theirs"],
                "note": "its list overflowed" if overflown else "other switching function",
            }
        )
    print(json.dumps(results))


main()
