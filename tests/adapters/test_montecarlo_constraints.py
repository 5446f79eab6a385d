"""Chains of host systems with constraints: what is known of them, refused, and kept."""

from __future__ import annotations

from typing import Any

import ase
import mdgraft
import mdgraft_ase
import numpy as np
import openmm
import pytest
import torch
from ase.calculators.lj import LennardJones
from ase.constraints import (
    FixAtoms,
    FixBondLength,
    FixCom,
    FixedMode,
    FixedPlane,
    FixInternals,
    FixLinearTriatomic,
    Hookean,
)
from mdgraft import InvalidInputError, WrongEnsembleError
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ChainState,
    Displacement,
    InsertionDeletion,
    Metropolis,
    Mixture,
    PotentialByNumber,
    Rotation,
    Sequence,
    Target,
    Torsion,
    Translation,
    Volume,
)
from mdgraft_openmm import ContextEnergy, HostPotential, HybridMonteCarlo
from montecarlo_laws import F64, TEMPERATURE, dihedral
from montecarlo_systems import agree, by_chain, chain, site_water, wells

ROUTES: dict[str, Any] = {
    "context": ContextEnergy,
    "graft": mdgraft.graft,
    "host potential": HostPotential,
    "part of a graft": lambda system: mdgraft.graft(system).only("HarmonicAngleForce"),
    "copy in single precision": lambda system: mdgraft.graft(system, dtype=torch.float32),
}


@pytest.mark.parametrize("route", ROUTES)
def test_energies_of_a_system_know_its_constraints(route: str) -> None:
    system, x = chain(constrained=True)
    system.addParticle(0.0)
    system.addParticle(0.0)
    system.setVirtualSite(6, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    x = torch.cat((x, torch.tensor([[1.0, 1, 1], [0.0, 0, 0]], dtype=F64)))
    energy = ROUTES[route](system)
    target, state = Target(energy, temperature=300.0), ChainState(positions=x[None])
    assert target.held is not None and target.held.pairs.tolist() == [[i, i + 1] for i in range(4)]
    assert target.held.lengths.tolist() == pytest.approx([0.15] * 4)
    assert target.held.pinned.tolist() == [5]  # No virtual site.
    for move, match in (
        (Displacement(0.01), "Displacement changes 4 of the 4 .* and moves 1 of the 1"),
        (MALA(0.01), "MALA changes 4 of the 4"),
        (HMC(0.001, 2), "HMC changes 4 of the 4"),
        (Translation(0.1, [[0, 1, 2, 3, 4, 6], [5]]), "Translation moves 1 of the 1"),
        (Rotation(0.1, [[0, 1, 2]]), "Rotation changes 1 of the 4"),
    ):
        with pytest.raises(WrongEnsembleError, match=match):
            Metropolis(target, move, state)
        free = Target(energy, temperature=300.0, ignore_constraints=True)
        Metropolis(free, move, state)
    bonds = [(i, i + 1) for i in range(4)]
    Metropolis(target, Mixture([Torsion(0.5, bonds), Translation(0.1, [[0, 1, 2, 3, 4]])]), state)


def test_nothing_is_held_without_constraints() -> None:
    for energy in (ContextEnergy(wells()), mdgraft.graft(wells()), HostPotential(wells())):
        assert Target(energy, temperature=300.0).held is None


def test_trajectories_hold_what_their_system_holds() -> None:
    system, x = chain(constrained=True)
    flexible, _ = chain()
    state = ChainState.replicate(2, positions=x)
    move = HybridMonteCarlo(ContextEnergy(system), 0.002, 2)
    bonds = [(i, i + 1) for i in range(4)]
    for energy in (ContextEnergy(system), mdgraft.graft(system), mdgraft.graft(flexible)):
        target = Target(energy, temperature=TEMPERATURE)
        Metropolis(target, Sequence([move, Torsion(0.3, bonds)]), state).step()
        with pytest.raises(WrongEnsembleError, match="Displacement changes 4 of the 4"):
            Metropolis(target, Mixture([move, Displacement(0.01)]), state)
    free = HybridMonteCarlo(ContextEnergy(flexible), 0.002, 2)
    with pytest.raises(WrongEnsembleError, match="HybridMonteCarlo changes 4 of the 4"):
        Metropolis(Target(mdgraft.graft(system), temperature=TEMPERATURE), free, state)


def test_trajectories_that_hold_distances_sample_no_free_positions() -> None:
    system, x = chain(constrained=True)
    state = ChainState(positions=x[None])
    move = HybridMonteCarlo(ContextEnergy(system), 0.002, 2)
    target = Target(move.energy, temperature=TEMPERATURE, ignore_constraints=True)
    for moves in (move, Sequence([move, Displacement(0.01)])):
        with pytest.raises(WrongEnsembleError, match="trajectories of HybridMonteCarlo hold 4"):
            Metropolis(target, moves, state)


def test_trajectories_leave_massless_particles_to_other_moves() -> None:
    # Two particles in wells, one without mass, which only displacements move.
    system = wells(2)
    system.setParticleMass(1, 0.0)
    state = ChainState.replicate(200, positions=torch.zeros(2, 3, dtype=F64))
    energy = ContextEnergy(system)
    still = HybridMonteCarlo(energy, 0.02, 5)
    moves = Sequence([still, Displacement(0.1, particles=[1])])
    with pytest.raises(WrongEnsembleError, match="Displacement moves 1 of the 1"):
        Metropolis(Target(energy, temperature=TEMPERATURE), moves, state)
    target = Target(energy, temperature=TEMPERATURE, ignore_constraints=True)
    chains = Metropolis(target, moves, state, seed=4)
    chains.burn_in(60)
    squares = [s.positions.square().sum(dim=2) for s in chains.sample(15, stride=4).states]
    means = torch.stack(squares).mean(dim=0)
    error = means.std(dim=0) / len(means) ** 0.5
    difference = means[:, 0].mean() - means[:, 1].mean()
    assert float(difference.abs()) < 4 * float(error.norm())


def test_trajectories_ignore_what_openmm_ignores() -> None:
    # Constraints between particles without mass have no effect, whatever their length.
    system, x = chain(constrained=True)
    for _ in range(2):
        system.addParticle(0.0)
    system.addConstraint(5, 6, 0.5)
    x = torch.cat((x, torch.tensor([[1.0, 1, 1], [1.0, 1, 1.2]], dtype=F64)))
    energy = ContextEnergy(system)
    move = HybridMonteCarlo(energy, 0.002, 2)
    chains = Metropolis(Target(energy, temperature=300.0), move, ChainState(positions=x[None]))
    last = chains.sample(5).states[-1].positions
    assert float((last - x)[:, :5].abs().max()) > 0.0 == float((last - x)[:, 5:].abs().max())


def test_torsions_that_change_the_metric_go_with_no_trajectories() -> None:
    # With an angle constrained, a torsion turns one constraint against another that it shares a
    # particle with.
    system, x = chain(constrained=True)
    system.addConstraint(0, 2, float((x[0] - x[2]).norm()))
    energy = ContextEnergy(system)
    target, state = Target(energy, temperature=TEMPERATURE), ChainState(positions=x[None])
    torsions = Torsion(0.5, [(i, i + 1) for i in range(4)])
    Metropolis(target, torsions, state).step()
    for move in (HybridMonteCarlo(energy, 0.002, 2), Translation(0.1, [[0, 1, 2, 3, 4]])):
        moves = Sequence([move, torsions])
        if move.held is None:
            Metropolis(target, moves, state).step()
        else:
            with pytest.raises(WrongEnsembleError, match="metric factor that the law of Hybrid"):
                Metropolis(target, moves, state)
    about = Torsion(0.5, [(i, i + 1) for i in range(4)], rotatable=[(2, 3)])
    Metropolis(target, Sequence([HybridMonteCarlo(energy, 0.002, 2), about]), state).step()


def test_torsions_and_trajectories_of_a_constrained_chain_agree() -> None:
    system, x = chain(constrained=True)
    energy = ContextEnergy(system)
    bonds = [(i, i + 1) for i in range(4)]
    results: list[list[tuple[float, float]]] = []
    for seed, moves in enumerate(
        (
            HybridMonteCarlo(energy, 0.006, 12),
            Sequence([HybridMonteCarlo(energy, 0.006, 6), Torsion(1.5, bonds)]),
        )
    ):
        chains = Metropolis(
            Target(energy, temperature=TEMPERATURE),
            moves,
            ChainState.replicate(16, positions=x),
            seed=seed,
        )
        chains.burn_in(100, adapt=False)
        samples = chains.sample(250)
        p = samples.positions
        phi = dihedral(p[:, :, :4].reshape(-1, 4, 3)).reshape(p.shape[:2])
        ends = (p[:, :, 4] - p[:, :, 0]).norm(dim=-1)
        results.append([by_chain(samples, v) for v in (samples.energies, phi.cos(), ends)])
        assert energy.held is not None
        assert float(energy.held.errors(p[-1]).max()) < 1e-6
    for quantity in zip(*results, strict=True):
        agree(*quantity)


def test_rigid_water_with_a_virtual_site() -> None:
    system, x, box = site_water()
    molecules = [list(range(4 * i, 4 * i + 4)) for i in range(len(x) // 4)]
    energy = ContextEnergy(system)
    moves = Sequence(
        [
            Translation(0.02, molecules),
            Rotation(0.3, molecules),
            Volume(0.03, molecules=molecules, smallest=1.0),
        ]
    )
    state = ChainState.replicate(2, positions=x, box=box)
    chains = Metropolis(Target(energy, temperature=300.0, pressure=1.0), moves, state, seed=3)
    chains.burn_in(15)
    last = chains.sample(5).states[-1]
    assert energy.held is not None and len(energy.held.pairs) == 3 * len(molecules)
    assert (
        float((energy.held.errors(last.positions) - energy.held.errors(x[None])).abs().max()) < 1e-9
    )
    assert not torch.equal(last.positions[0], last.positions[1])
    placed = chains.target.placed(last)
    torch.testing.assert_close(placed.positions, last.positions)
    with pytest.raises(WrongEnsembleError, match="Volume changes 172 of the 258"):
        Metropolis(
            chains.target,
            Volume(
                0.03,
                molecules=[[i for i in m if i % 4 != 2] for m in molecules]
                + [[m[2]] for m in molecules],
            ),
            state,
        )


def test_numbers_of_rigid_molecules_that_vary() -> None:
    def factory(n: int) -> mdgraft.Potential:
        system = openmm.System()
        well = openmm.CustomExternalForce("5*(x^2+y^2+z^2)")
        for k in range(1 + 2 * n):
            system.addParticle(0.0 if k == 0 else 10.0)
            well.addParticle(k, [])
        for k in range(n):
            system.addConstraint(1 + 2 * k, 2 + 2 * k, 0.1)
        system.addForce(well)
        return mdgraft.graft(system)

    places = [[0, 1], [2, 3], [5, 6]]
    energy = PotentialByNumber(factory, places, fixed=[4])
    assert energy.held is not None
    assert energy.held.pairs.tolist() == places and energy.held.pinned.tolist() == [4]
    x = torch.zeros(7, 3, dtype=F64)
    x[1::2, 0] = x[6, 0] = 0.1
    state = ChainState.replicate(
        4, positions=x, box=torch.eye(3, dtype=F64), present=torch.zeros(3, dtype=torch.bool)
    )
    target = Target(energy, temperature=300.0, log_activity=3.0)
    insert = InsertionDeletion(molecules=places, template=[[0.0, 0, 0], [0.1, 0, 0]], truncate=True)
    chains = Metropolis(target, Mixture([insert, Rotation(0.4, places)]), state)
    chains.burn_in(30)
    last = chains.state
    assert last.present is not None
    errors = energy.held.errors(last.positions)[last.present]
    assert errors.numel() and float(errors.max()) < 1e-9
    with pytest.raises(WrongEnsembleError, match="Displacement changes 3 of the 3"):
        Metropolis(target, Mixture([insert, Displacement(0.1)]), state)


# ASE --------------------------------------------------------------------------------------------


def atoms(*constraints: Any) -> ase.Atoms:
    made = ase.Atoms("Ar5", positions=4.0 * np.eye(5)[:, :3] + np.arange(15).reshape(5, 3) / 10)
    made.calc = LennardJones(sigma=3.4, epsilon=0.01, rc=9.0)
    made.set_constraint(list(constraints))
    return made


ASE: dict[str, tuple[Any, list[list[int]], list[int]]] = {
    "bond": (FixBondLength(0, -1), [[0, 4]], []),
    "atoms": (FixAtoms([1, -2]), [], [1, 3]),
    "mask": (FixAtoms(mask=[True, False, False, False, True]), [], [0, 4]),
    "bonds of internals": (FixInternals(bonds=[[None, [2, 1]]]), [[1, 2]], []),
    "angle": (FixInternals(angles_deg=[[None, [0, 1, 2]]]), [[0, 1], [0, 2], [1, 2]], []),
    "combination": (
        FixInternals(bondcombos=[[None, [[0, 1, 1.0], [1, 2, -1.0]]]]),
        [[0, 1], [0, 2], [1, 2]],
        [],
    ),
    "plane": (FixedPlane([2], (0, 0, 1)), [], [2]),
    "centre of mass": (FixCom(), [], [0, 1, 2, 3, 4]),
    "mode": (FixedMode(np.ones((5, 3))), [], [0, 1, 2, 3, 4]),
    "linear molecule": (FixLinearTriatomic([[3, 1, 0]]), [[1, 3], [0, 3], [0, 1]], []),
}


@pytest.mark.parametrize("host", [mdgraft.graft, mdgraft_ase.HostPotential])
@pytest.mark.parametrize("name", ASE)
def test_constraints_of_ase(name: str, host: Any) -> None:
    constraint, pairs, pinned = ASE[name]
    structure = atoms(constraint)
    target = Target(host(structure), temperature=100.0)
    assert target.held is not None
    assert target.held.pairs.tolist() == pairs and target.held.pinned.tolist() == pinned
    state = ChainState(positions=torch.tensor(0.1 * structure.positions)[None])
    with pytest.raises(WrongEnsembleError, match="Displacement (changes|moves)"):
        Metropolis(target, Displacement(0.01), state)
    others = sorted(set(range(5)) - set(np.ravel(pairs).tolist()) - set(pinned))
    if others:
        Metropolis(target, Displacement(0.01, particles=others), state).step()
    if pairs:
        moved = ChainState(positions=state.positions * 1.1)
        with pytest.raises(InvalidInputError, match="but their host holds them at"):
            Metropolis(target, Translation(0.01, [[0, 1, 2, 3, 4]]), moved)


def test_ase_without_constraints() -> None:
    for structure in (atoms(), atoms(Hookean(0, 1, rt=1.0, k=5.0))):
        assert Target(mdgraft.graft(structure), temperature=100.0).held is None
    own = mdgraft.graft(atoms())
    wrapped = atoms(FixAtoms([0]))
    wrapped.calc = mdgraft_ase.MDGraftCalculator(own)
    known = mdgraft.graft(wrapped)
    assert known.held is not None and own.held is None
    assert dict(known.named_parameters()).keys() == dict(own.named_parameters()).keys()
    for mine, others in zip(known.parameters(), own.parameters(), strict=True):
        assert mine is others
