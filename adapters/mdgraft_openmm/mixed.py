"""Systems in which a model describes some particles and a force field the others."""

from __future__ import annotations

import copy
import operator
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import openmm
import torch
from mdgraft import InvalidInputError, Potential
from mdgraft.neural import neural_potential
from torch import nn

from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm._interpolation import internal_nonbonded
from mdgraft_openmm._link_atoms import add_link_atoms
from mdgraft_openmm._separation import Region, check_separable, only, separable, without
from mdgraft_openmm.export.to_force import to_force


def mixed_system(
    system: openmm.System,
    model: Potential | nn.Module | Callable[..., Any],
    atoms: Iterable[int],
    *,
    topology: Any = None,
    atomic_numbers: Sequence[int] | None = None,
    bonds: Iterable[tuple[int, int]] | None = None,
    embedding: str = "mechanical",
    interpolate: bool | str = False,
    remove_constraints: bool = True,
    link_atoms: bool = True,
    link_distances: Mapping[tuple[int, int], Any] | None = None,
    keep: Collection[str] = (),
    periodic: bool | None = None,
    force_group: int = 0,
    name: str = "neural",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: Any = "auto",
) -> openmm.System:
    """Describe some atoms by a model, and all others, and what is between, by the force field.

    Mechanical embedding: of the classical System, interactions within the region are taken out
    (bonds, angles, torsions, maps, compound bonds; nonbonded ones by exceptions and exclusions;
    constraints), and the model's energy of the region is added. Bonds across the border stay as
    they are; by default the model sees a hydrogen on each of them, a virtual site at a fixed
    distance along the bond, and in return describes angles and torsions that reach over the border.
    Under Ewald sums the region still meets its own periodic images with the charges of the force
    field. The result agrees with that of ``openmmml.MLPotential.createMixedSystem``.

    Parameters
    ----------
    system
        The classical System of all particles; it stays as it is.
    model
        A model of atoms, see `mdgraft.neural.AtomicModel`; or a `Potential` of the region's
        particles and link atoms in their order; or a function of positions [nm], and of a box if
        periodic, that returns an energy [kJ/mol].
    atoms
        The region, in the order in which the model gets them.
    topology
        An ``openmm.app.Topology`` of the System; gives elements and bonds.
    atomic_numbers
        One for each of ``atoms``, if there is no topology.
    bonds
        Pairs of bonded particles, if there is no topology. Needed where something crosses the
        border.
    embedding
        ``"mechanical"``.
    interpolate
        True, or the name of a global parameter, to scale from the force field at 0 to the mixed
        system at 1; True names it ``lambda_interpolate``. Its energy derivative is available.
    remove_constraints
        Whether constraints within the region go.
    link_atoms
        Whether the model sees a hydrogen on each bond across the border. They are added at the end
        of the System, in the order of the bonds, sorted; place them by
        ``context.computeVirtualSites()``.
    link_distances
        Distance [nm] of a link atom from the region's atom, for pairs (inside, outside), where that
        should not be a sum of covalent radii.
    keep
        Names of forces, or one name, that act within the region, cannot be separated (implicit
        solvents, collective variables), and shall stay as they are beside the model.
    periodic
        Whether the model is periodic; by default as the System.
    force_group
        Of the model's force.
    name
        Of the model's force, and of the term that it becomes when the result is grafted.
    dtype, device
        Where the model computes; by default where it is. If a model of atoms is elsewhere, a copy
        is moved, which does not follow the model's training. See `to_force` for all others.
    backend
        See `to_force`.

    Returns
    -------
    openmm.System
        A new System. `mdgraft.graft` makes it one differentiable potential.

    Raises
    ------
    InvalidInputError
        For arguments that make no sense, or a border that cannot be understood.
    UnsupportedForceError
        If a force acts within the region and cannot be separated; it names all of them.
    """
    if embedding != "mechanical":
        raise InvalidInputError(f"embedding: got {embedding!r}, wanted 'mechanical'")
    keep = [keep] if isinstance(keep, str) else list(keep)
    picked = _checked_atoms(system, atoms)
    numbers = _atomic_numbers(picked, topology, atomic_numbers)
    chemical = _bonds(topology, bonds)
    region = Region(
        particles=frozenset(picked) | _sites_of(system, set(picked)),
        bonds=chemical,
        capped=link_atoms,
    )
    if chemical is None and link_atoms:
        _check_closed(system, region)
    check_separable(system, region, keep)
    mixed = faithful_copy(system)
    crossing = region.crossing() if link_atoms else []
    caps = add_link_atoms(mixed, crossing, _elements_at(picked, numbers, crossing), link_distances)
    parameter = "lambda_interpolate" if interpolate is True else str(interpolate or "")
    if interpolate:
        _check_parameter(parameter, system)
        _check_pickles(model)
    wraps = system.usesPeriodicBoundaryConditions() if periodic is None else periodic
    force = to_force(
        energy_of(
            model,
            None if numbers is None else [*numbers, *[1] * len(caps)],
            periodic=wraps,
            name=name,
            dtype=dtype,
            device=device,
        ),
        particles=[*picked, *caps],
        periodic=wraps,
        dtype=dtype,
        device=device,
        backend=backend,
        name=name,
        force_group=force_group,
    )
    internal = _separate(mixed, region, keep, bool(interpolate))
    if interpolate:
        force = _between(parameter, force, internal, name, force_group)
    mixed.addForce(force)
    if remove_constraints:
        for i in reversed(range(mixed.getNumConstraints())):
            first, second, _ = mixed.getConstraintParameters(i)
            if first in region.particles and second in region.particles:
                mixed.removeConstraint(i)
    return mixed


def _separate(
    mixed: openmm.System, region: Region, keep: Collection[str], wanted: bool
) -> list[openmm.Force]:
    """Replace forces by copies without what is within the region; return that, if wanted."""
    internal: list[openmm.Force] = []
    forces = [
        without(force, region)
        if separable(force) and force.getName() not in keep
        else faithful_copy(force)
        for force in mixed.getForces()
    ]
    for before, after in zip(mixed.getForces(), forces, strict=True):
        if isinstance(after, openmm.NonbondedForce):
            after.setExceptionsUsePeriodicBoundaryConditions(mixed.usesPeriodicBoundaryConditions())
        if not wanted or before.getName() in keep:
            continue
        if isinstance(before, openmm.NonbondedForce):
            internal.append(internal_nonbonded(before, region.particles, mixed))
        else:
            alone = only(before, region) if separable(before) else None
            internal.extend([] if alone is None else [alone])
    for _ in range(mixed.getNumForces()):
        mixed.removeForce(0)
    for force in forces:
        mixed.addForce(force)
    return internal


def _between(
    parameter: str,
    model: openmm.Force,
    internal: Sequence[openmm.Force],
    name: str,
    force_group: int,
) -> openmm.CustomCVForce:
    """The model's energy times the parameter, and that of the force field times the rest."""
    parts = [f"classical_{i}" for i in range(len(internal))]
    classical = f" + (1 - {parameter})*({' + '.join(parts)})" if parts else ""
    force = openmm.CustomCVForce(f"{parameter}*model{classical}")
    force.addGlobalParameter(parameter, 1.0)
    force.addEnergyParameterDerivative(parameter)
    force.addCollectiveVariable("model", model)
    for part, inner in zip(parts, internal, strict=True):
        force.addCollectiveVariable(part, inner)
    force.setName(name)
    force.setForceGroup(force_group)
    return force


# What the user hands over ---------------------------------------------------------------------


def _checked_atoms(system: openmm.System, atoms: Iterable[int]) -> list[int]:
    n = system.getNumParticles()
    try:
        picked = [operator.index(i) for i in atoms]
    except TypeError as error:
        raise InvalidInputError(f"atoms: wanted indices of particles ({error})") from error
    if not picked or len(set(picked)) != len(picked) or not all(0 <= i < n for i in picked):
        raise InvalidInputError(
            f"atoms: got {picked[:10]}, wanted different indices from 0 to {n - 1}"
        )
    sites = [i for i in picked if system.isVirtualSite(i)]
    if sites:
        raise InvalidInputError(
            f"atoms: {sites} are virtual sites, which a model of atoms does not know; leave them "
            "out, they belong to the region if all of their parents do"
        )
    return picked


def _sites_of(system: openmm.System, particles: set[int]) -> frozenset[int]:
    """Virtual sites all of whose parents are within the region."""
    found = set()
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i):
            site = system.getVirtualSite(i)
            if all(site.getParticle(k) in particles for k in range(site.getNumParticles())):
                found.add(i)
    return frozenset(found)


def _atomic_numbers(
    atoms: Sequence[int], topology: Any, given: Sequence[int] | None
) -> list[int] | None:
    if given is not None:
        numbers = [operator.index(z) for z in given]
        if len(numbers) != len(atoms):
            raise InvalidInputError(
                f"atomic_numbers: got {len(numbers)}, wanted one for each of {len(atoms)} atoms"
            )
        return numbers
    if topology is None:
        return None
    everything = list(topology.atoms())
    bare = [i for i in atoms if i >= len(everything) or everything[i].element is None]
    if bare:
        raise InvalidInputError(
            f"topology: has no element for the particles {bare[:10]} of the region; pass "
            "atomic_numbers="
        )
    return [everything[i].element.atomic_number for i in atoms]


def _bonds(
    topology: Any, given: Iterable[tuple[int, int]] | None
) -> frozenset[frozenset[int]] | None:
    if given is not None:
        found = frozenset(frozenset(map(operator.index, bond)) for bond in given)
        wrong = [sorted(bond) for bond in found if len(bond) != 2]
        if wrong:
            raise InvalidInputError(f"bonds: got {wrong[:5]}, wanted pairs of different particles")
        return found
    if topology is None:
        return None
    return frozenset(frozenset((b.atom1.index, b.atom2.index)) for b in topology.bonds())


def _check_closed(system: openmm.System, region: Region) -> None:
    """Raise if something may be bonded across the border, where bonds are not known."""
    pairs = [system.getConstraintParameters(i)[:2] for i in range(system.getNumConstraints())]
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce | openmm.CustomBondForce):
            pairs += [force.getBondParameters(i)[:2] for i in range(force.getNumBonds())]
    for first, second in pairs:
        if (first in region.particles) != (second in region.particles):
            raise InvalidInputError(
                f"topology: got None, but particles {first} and {second} may be bonded across the "
                "border of the region; pass topology= or bonds=, or link_atoms=False to have no "
                "link atoms"
            )


def _elements_at(
    atoms: Sequence[int], numbers: Sequence[int] | None, crossing: Sequence[tuple[int, int]]
) -> dict[int, int]:
    """Atomic numbers of the region's atoms that get a link atom."""
    if crossing and numbers is None:
        raise InvalidInputError(
            f"atomic_numbers: got None, but the bonds {list(crossing)[:5]} cross the border; pass "
            "topology= or atomic_numbers=, or link_atoms=False"
        )
    return dict(zip(atoms, numbers or (), strict=False))


def _check_parameter(name: str, system: openmm.System) -> None:
    """Raise for a name that OpenMM cannot read in an expression, or that has another meaning."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or re.fullmatch(r"model|classical_\d+", name):
        raise InvalidInputError(
            f"interpolate: got {name!r}, wanted a word of letters, digits and _ that does not "
            "begin with a digit, other than 'model' and 'classical_0'"
        )
    taken = [
        force.getName()
        for force in system.getForces()
        if hasattr(force, "getNumGlobalParameters")
        and any(
            force.getGlobalParameterName(i) == name for i in range(force.getNumGlobalParameters())
        )
    ]
    if taken:
        raise InvalidInputError(
            f"interpolate: {name!r} is a global parameter of {', '.join(taken)} already; pass "
            "another name"
        )


def _check_pickles(model: Any) -> None:
    """Raise for a model that OpenMM cannot copy into a force which holds others."""
    try:
        pickle.dumps(model)
    except Exception as error:
        raise InvalidInputError(
            "interpolate: OpenMM must copy the model's force, but this model cannot be pickled "
            f"({error}); define it at the top of a module, not inside a function"
        ) from error


def energy_of(
    model: Any,
    numbers: Sequence[int] | None,
    *,
    periodic: bool,
    name: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Any:
    """What is exported: a potential of a model's atoms, or the user's own function.

    A model of atoms that is of another precision, or on another device, is copied first: who
    hands it over may be training it.

    Raises
    ------
    InvalidInputError
        If it is none of these, or atomic numbers are needed and not known.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InvalidInputError(f"dtype: got {dtype!r}, wanted a floating-point type of torch")
    if is_model_of_atoms(model):
        if numbers is None:
            raise InvalidInputError(
                "atomic_numbers: got None, but a model of atoms needs them; pass topology= or "
                "atomic_numbers="
            )
        if not _is_at(model, dtype, device):
            model = copy.deepcopy(model).to(device=device, dtype=dtype)
        return neural_potential(model, numbers, pbc=periodic, name=name)
    if not callable(model):
        raise InvalidInputError(
            f"model: got {type(model).__name__}, wanted a model of atoms, a Potential or a function"
        )
    return model


def is_model_of_atoms(model: Any) -> bool:
    """Whether it wants atomic numbers and neighbours, see `mdgraft.neural.AtomicModel`."""
    return (
        isinstance(model, nn.Module)
        and hasattr(model, "units")
        and not isinstance(model, Potential)
    )


def _is_at(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> bool:
    """Whether the model has this precision and is on this device."""
    place = None if device is None else torch.device(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            return False
        if place is not None and (
            tensor.device.type != place.type or place.index not in (None, tensor.device.index)
        ):
            return False
    return True
