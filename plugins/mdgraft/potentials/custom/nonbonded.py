"""Pair energies written as expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import NANOMETER
from mdgraft.kernels.pairs import Pairs, exclusion_keys
from mdgraft.kernels.periodic import volume
from mdgraft.lepton import Expression
from mdgraft.potentials import pair_forms
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables, parameter_keys
from mdgraft.potentials.custom.compiled_pairs import CompiledPairs, Groups
from mdgraft.potentials.custom.long_range import PairCounts, correction
from mdgraft.potentials.custom.pairwise import list_pairs, measure, particle_and_pair_names
from mdgraft.potentials.nonbonded import Method

#: A list of tiles of so many particles without a cutoff still fits.
_LARGE = 20_000


class CustomNonbonded(AbstractCustomTerm):
    """``E = sum of e(r, p1, p2)`` over pairs that are not excluded.

    Parameters
    ----------
    energy
        Expression of ``r``, ``<name>1`` and ``<name>2`` of each parameter and computed value, and
        global parameters. It should be symmetric. If not: particle 1 has the lower index without
        a cutoff, the higher one with a cutoff, and comes from the first set of an interaction
        group, as on OpenMM's Reference platform.
    parameters
        ``(N,)`` by name.
    exclusions
        ``(exclusions, 2)`` particle indices.
    method, cutoff
        One of the methods without Ewald sums, and its cutoff [nm].
    computed_values
        Expressions of one particle's parameters and globals by name.
    switching_distance
        ``()`` [nm], or None; without a cutoff it must be None.
    long_range_correction
        Whether pairs beyond the cutoff are integrated over, see `long_range`.
    groups
        Interaction groups: two arrays of particle indices each. Without any, all pairs interact;
        a pair in several groups counts several times.
    global_names, tables
        See `AbstractCustomTerm`.
    where
        What errors call the force.
    """

    excluded: Tensor
    kind: Tensor
    forward_weights: Tensor
    backward_weights: Tensor
    group_first: Tensor
    group_second: Tensor

    def __init__(
        self,
        energy: str,
        parameters: Mapping[str, Tensor],
        *,
        n_particles: int,
        exclusions: Tensor,
        method: Method,
        cutoff: float = math.inf,
        computed_values: Mapping[str, str] | None = None,
        switching_distance: Tensor | None = None,
        long_range_correction: bool = False,
        groups: Sequence[tuple[np.ndarray, np.ndarray]] = (),
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        where: str = "CustomNonbondedForce",
    ) -> None:
        super().__init__(
            parameters, global_names=global_names, tables=tables, periodic=method.periodic
        )
        self.method, self.cutoff, self.where = method, cutoff, where
        self.n_particles = n_particles
        self.long_range_correction = long_range_correction and method.periodic
        #: Quadrature points of each integral; see `settle_quadrature`.
        self.points = 64
        names, functions = set(self.item_keys), self.arities
        self._computed = {
            name: Expression(
                text,
                variables=names | set(global_names),
                functions=functions,
                where=f"{where}.{name}",
            )
            for name, text in (computed_values or {}).items()
        }
        allowed = {"r", *global_names, *particle_and_pair_names(names | self._computed.keys())}
        self._energy = Expression(
            energy, variables=allowed, functions=functions, where=f"{where}.energy"
        )
        read = {name for text in self._computed.values() for name in text.variables}
        read |= {name for name in names if {f"{name}1", f"{name}2"} & self._energy.variables}
        self._used = [name for name in self.item_keys if name in read]
        if self.long_range_correction and "r" not in self._energy.variables:
            raise InvalidInputError(
                f"{where}: uses a long-range correction, but its energy does not depend on r; "
                "switch the correction off"
            )
        # A user may have a parameter or a table of that name.
        taken = [*self.item_keys, *self.tabulated, "switching_distance"]
        self.switching_key = parameter_keys(taken)[-1]
        self.switched = switching_distance is not None
        if switching_distance is not None:
            self.add_parameter(self.switching_key, switching_distance, NANOMETER)
        keys = exclusion_keys(exclusions, n_particles)
        self.register_buffer("excluded", keys, persistent=False)
        self.grouped = bool(groups)
        self._add_groups(groups)
        weights = (self.forward_weights, self.backward_weights)
        arrays = [t.cpu().numpy() for t in (self.kind, *weights)]
        self._compiled = CompiledPairs(
            self._energy,
            particle=[*self.item_keys, *self._computed],
            shared=self.global_names,
            method=method,
            cutoff=cutoff,
            switched=self.switched,
            exclusions=exclusions,
            tables=self.tabulated,
            groups=Groups(*arrays) if groups else None,
            n_particles=n_particles,
        )

    def _add_groups(self, groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Kinds of particles by their membership, and how often their pairs interact."""
        member = np.zeros((2, self.n_particles, len(groups)), dtype=np.int64)
        for g, sets in enumerate(groups):
            for s in range(2):
                member[s, sets[s], g] = 1
        signatures, kind = np.zeros((2, 1, 0), dtype=np.int64), np.zeros(self.n_particles, np.int64)
        if groups:
            unique, inverse = np.unique(
                np.concatenate(list(member), -1), axis=0, return_inverse=True
            )
            signatures, kind = np.stack(np.split(unique, 2, axis=-1)), inverse.ravel()
        # Products of integers are slow; these are exact.
        one, two = signatures.astype(np.float64)
        forward = one @ two.T
        # Two particles that both are in both sets interact once, the lower index being first.
        backward = forward - (one * two) @ (one * two).T
        if not groups:
            forward = np.ones_like(forward)
        self.register_buffer("kind", torch.from_numpy(kind), persistent=False)
        for name, weights in (("forward_weights", forward), ("backward_weights", backward)):
            whole = torch.from_numpy(weights.astype(np.int64))
            self.register_buffer(name, whole, persistent=False)
        first, second = np.zeros((2, 0), dtype=np.int64)
        if groups and self.method is Method.NO_CUTOFF:
            first, second = self._list_groups(groups)
        self.register_buffer("group_first", torch.from_numpy(first), persistent=False)
        self.register_buffer("group_second", torch.from_numpy(second), persistent=False)

    def _list_groups(
        self, groups: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of the groups: without a cutoff there may be far fewer than pairs at all."""
        n, excluded = self.n_particles, self.excluded.numpy()
        chosen = [np.zeros((2, 0), dtype=np.int64)]
        for set1, set2 in groups:
            i, j = (a.ravel() for a in np.meshgrid(set1, set2, indexing="ij"))
            both = np.isin(i, set2) & np.isin(j, set1)
            keep = (i != j) & ~(both & (i > j))
            keep &= ~np.isin(np.minimum(i, j) * n + np.maximum(i, j), excluded)
            chosen.append(np.stack([i[keep], j[keep]]))
        first, second = np.concatenate(chosen, axis=1)
        return first, second

    @property
    def _few_listed(self) -> bool:
        """Whether all pairs are listed, and far fewer than loops would have to search."""
        listed, n = len(self.group_first), self.n_particles
        return self.method is Method.NO_CUTOFF and n > _LARGE and 0 < listed < n**2 // 100

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        shared, functions = self.shared_values(global_values), self.functions(values)
        switching = values[self.switching_key] if self.switched else None
        particle = self._particle(self.item_values(values), shared, functions, self.kind, positions)
        if not self._few_listed and self._compiled.serve(positions):
            quantities = (particle, shared, switching, self.entries(values))
            groups = (self.kind, self.forward_weights, self.backward_weights)
            energy = self._compiled.energy(
                positions,
                box,
                *quantities,
                self._plain_sum,
                groups=groups if self.grouped else (),
            )
        else:
            energy = self._plain_sum(positions, box, particle, shared, switching, functions)
        if self.long_range_correction:
            assert box is not None
            coefficient = self._long_range(values, global_values, self.points, bent=self._used)
            energy = energy + coefficient.to(energy.dtype) / volume(box)
        # What no pair depends on has zero derivatives, not missing ones.
        return energy + 0.0 * positions.sum(dim=(-2, -1))

    def _plain_sum(
        self,
        positions: Tensor,
        box: Tensor | None,
        particle: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        switching: Tensor | None,
        functions: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """The sum over pairs, by plain torch operations."""
        listed, weight = self._pairs(positions, box)
        pairs = measure(listed, positions, box, method=self.method, cutoff=self.cutoff)
        variables = pairs.variables(particle, self._energy.variables)
        energies = self._energy({**shared, **variables}, functions, like=positions)
        if switching is not None:
            energies = energies * pair_forms.switch(pairs.r, switching, self.cutoff)
        if weight is not None:
            energies = energies * weight
        return pairs.sum(energies)

    def _particle(
        self,
        items: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        functions: Mapping[str, Callable[..., Tensor]],
        index: Tensor,
        like: Tensor,
    ) -> dict[str, Tensor]:
        """Parameters and computed values by name, shaped like ``index``."""
        found, known = dict(items), {**shared, **items}
        for name, expression in self._computed.items():
            found[name] = expression(known, functions, like=like).expand(index.shape)
        return found

    def _pairs(self, positions: Tensor, box: Tensor | None) -> tuple[Pairs, Tensor | None]:
        """Pairs with particle 1 first, and how often each counts."""
        if self.grouped and self.method is Method.NO_CUTOFF:
            return Pairs(first=self.group_first, second=self.group_second), None
        pairs = list_pairs(positions, box, self.excluded, method=self.method, cutoff=self.cutoff)
        if not self.grouped:
            return pairs, None
        # Particle 1 has the higher index here.
        high, low = self.kind[pairs.first], self.kind[pairs.second]
        lower_first, higher_first = (
            self.forward_weights[low, high],
            self.backward_weights[high, low],
        )
        one, two = lower_first > 0, higher_first > 0
        assert pairs.frame is not None
        listed = Pairs(
            first=torch.cat([pairs.second[one], pairs.first[two]]),
            second=torch.cat([pairs.first[one], pairs.second[two]]),
            frame=torch.cat([pairs.frame[one], pairs.frame[two]]),
        )
        weight = torch.cat([lower_first[one], higher_first[two]])
        return listed, weight.to(positions.dtype)

    def _long_range(
        self,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
        points: int,
        *,
        bent: Sequence[str] = (),
    ) -> Tensor:
        """Product of the correction and the volume, in double precision; see `correction`."""
        values = {name: value.double() for name, value in values.items()}
        shared = {k: v.double() for k, v in self.shared_values(global_values).items()}
        functions = self.functions(values)
        wanted = self._energy.variables

        def pair_energy(r: Tensor, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> Tensor:
            variables = dict(shared)
            for label, items in (("1", one), ("2", two)):
                index = next(iter(items.values()), self.kind[:1])
                found = self._particle(items, shared, functions, index, r)
                variables |= {k + label: v for k, v in found.items() if k + label in wanted}
            return self._energy(variables | {"r": r}, functions, like=r)

        counts = PairCounts(
            kind=self.kind,
            weights=self.forward_weights + self.backward_weights.T,
            itself=not self.grouped,
        )
        return correction(
            pair_energy,
            self.item_values(values),
            counts,
            bent=bent,
            cutoff=self.cutoff,
            switching_distance=values[self.switching_key] if self.switched else None,
            points=points,
        )

    def settle_quadrature(self, global_values: Mapping[str, Tensor]) -> None:
        """Choose so many points that twice as many change the correction by less than 1e-10.

        Parameters
        ----------
        global_values
            Those to choose for.

        Raises
        ------
        InvalidInputError
            If the correction diverges.
        """
        if not self.long_range_correction:
            return
        with torch.no_grad():
            values = self.parameter_values()
            fine, self.points = self._long_range(values, global_values, 32), 16
            while self.points < 2048:
                self.points *= 2
                coarse, fine = fine, self._long_range(values, global_values, 2 * self.points)
                error = float((fine - coarse).abs() / fine.abs().clamp(min=1e-300))
                if error < 1e-10:
                    return
        if not error < 1e-3:
            raise InvalidInputError(
                f"{self.where}: its long-range correction does not converge; does the energy go to "
                "zero faster than 1/r^3? Switch the correction off otherwise"
            )
