"""Sums of an expression over all pairs, or over each particle's pairs, as compiled loops."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.fused.lepton import describe, symmetric
from mdgraft.kernels.kernel import Kernel
from mdgraft.kernels.routes import Route, pair_kernel, route
from mdgraft.kernels.sums import particle_sums
from mdgraft.kernels.switch import compiled_kernels, on_device
from mdgraft.lepton import Expression, TabulatedFunction
from mdgraft.lepton.program import Step
from mdgraft.potentials.nonbonded import Method

if TYPE_CHECKING:
    from mdgraft.kernels.fused.thinning import Kinds

#: So many particles may be looped over frame by frame, see `mdgraft.kernels.fused.pairs_by_frame`.
LARGEST = 128
#: Longer expressions take many seconds to compile.
MOST_STEPS = 500
#: An entry that a table is asked for, for all lanes one after the other, takes as long as so many.
_STEPS_PER_LOOKUP = 8
#: Each frame takes time, and derivatives memory, for all entries of tables: with more of them for
#: each particle that is more than for its pairs.
MOST_ENTRIES = 1000
#: Single precision counts no further.
_LARGEST_INDEX = 2**24

#: ``(positions, box, particle quantities, shared ones, switching distance, tabulated functions) ->
#: energies``, or sums ``(frames, N)``.
PlainSum = Callable[
    [
        Tensor,
        "Tensor | None",
        Mapping[str, Tensor],
        Mapping[str, Tensor],
        "Tensor | None",
        Mapping[str, Callable[..., Tensor]],
    ],
    Tensor,
]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Kinds of particles, and how often pairs of them count.

    Attributes
    ----------
    kind
        ``(N,)`` int64.
    forward
        ``(kinds, kinds)``, of the particles of lower and higher index, the former as particle 1.
    backward
        ``(kinds, kinds)``, of the particles of higher and lower index, the former as particle 1.
    """

    kind: np.ndarray
    forward: np.ndarray
    backward: np.ndarray

    @property
    def kinds(self) -> Kinds:
        """For lists."""
        from mdgraft.kernels.fused.thinning import Kinds

        total = self.forward + self.backward.T
        return Kinds(self.kind, (total + total.T) > 0)


class CompiledPairs:
    """An expression of pairs that is compiled when it is first evaluated.

    Parameters
    ----------
    expression
        Of ``r``, ``<name>1`` and ``<name>2`` of each particle quantity, and shared quantities.
    particle, shared
        Names of these quantities.
    method, cutoff
        See `CustomNonbonded`.
    switched
        Whether there is a switching distance.
    exclusions
        ``(exclusions, 2)`` particle indices.
    n_particles
        Number of particles.
    framed
        Names of particle quantities that differ between frames.
    tables
        Tabulated functions by name.
    groups
        Of particles of which not all interact, or None.
    gathered
        Whether each particle sums over the pairs in which it is particle 1, instead of all pairs
        being summed, once each.
    """

    def __init__(
        self,
        expression: Expression,
        *,
        particle: Sequence[str],
        shared: Sequence[str],
        method: Method,
        cutoff: float,
        switched: bool,
        exclusions: Tensor,
        n_particles: int,
        framed: Collection[str] = (),
        tables: Mapping[str, TabulatedFunction] | None = None,
        groups: Groups | None = None,
        gathered: bool = False,
    ) -> None:
        used = expression.variables
        self._particle = [name for name in particle if {f"{name}1", f"{name}2"} & used]
        names = {
            f"{name}{label}": f"{k}_{label}"
            for k, name in enumerate(self._particle)
            for label in "12"
        } | {"r": "r"}
        # Quantities of particles hide shared ones.
        self._shared = [name for name in shared if name in used and name not in names]
        names |= {name: f"shared{k}" for k, name in enumerate(self._shared)}
        self._framed = tuple(k for k, name in enumerate(self._particle) if name in framed)
        self._method, self._switched, self._gathered = method, switched, gathered
        self._cutoff = math.inf if method is Method.NO_CUTOFF else cutoff
        self._n_particles = n_particles
        # An array: inside a torch.func transform tensors do not show theirs.
        self._exclusions = exclusions.cpu().numpy()
        steps = expression.program.steps
        called = [s.operation for s in steps if isinstance(s, Step) and s.custom]
        self._tables = {name: t for name, t in (tables or {}).items() if name in called}
        # Each corner of a cell has an entry in every column.
        lookups = sum(self._tables[name].n_columns ** 2 for name in called if name in self._tables)
        self._description = None
        if len(steps) + _STEPS_PER_LOOKUP * lookups <= MOST_STEPS:
            self._description = describe(expression.program, names, self._tables)
        self._ordered = ""
        if self._description is not None and not gathered:
            exchanged = {f"{k}_{i}": f"{k}_{3 - i}" for k in range(len(names)) for i in (1, 2)}
            if not symmetric(self._description, exchanged):
                self._ordered = "lower" if method is Method.NO_CUTOFF else "higher"
        self._groups = groups
        self._sizes = tuple(
            math.prod(table.sizes)
            for table in self._tables.values()
            for _ in range(table.n_columns)
        )
        counts = 0 if groups is None else (1 + bool(self._ordered)) * groups.forward.size
        most = min(MOST_ENTRIES * n_particles, _LARGEST_INDEX)
        if sum(self._sizes) + counts > most:
            self._description = None
        self._kernels: dict[Route, Kernel] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to this process.
        return self.__dict__ | {"_kernels": {}}

    def serve(self, positions: Tensor, *, n_particles: int | None = None) -> bool:
        """Whether the expression can be compiled, and these positions make it worth while.

        It is as worth while as for ``n_particles`` particles; by default, for as many as there are.
        """
        if bool(self._tables) or self._groups is not None:
            if on_device(positions):
                # GPUs add derivatives in entries up in another order each time.
                if torch.are_deterministic_algorithms_enabled():
                    return False
            elif self._n_particles <= LARGEST:
                # Loops over many small systems at once have no tables.
                return False
        return self._description is not None and compiled_kernels(
            positions, n_particles=self._n_particles if n_particles is None else n_particles
        )

    def energy(
        self,
        positions: Tensor,
        box: Tensor | None,
        particle: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        switching: Tensor | None,
        entries: Mapping[str, Tensor],
        plain: PlainSum,
        *,
        groups: Sequence[Tensor] = (),
    ) -> Tensor:
        """Energies ``(frames,)`` [kJ/mol].

        Parameters
        ----------
        positions, box
            ``(frames, N, 3)``, ``(frames, 3, 3)`` [nm].
        particle, shared
            Quantities ``(N,)``, or ``(frames, N)``, and ``()`` by name.
        switching
            ``()`` [nm], or None.
        entries
            Of tables ``(entries,)`` by the names of the functions.
        plain
            The same sum by torch operations.
        groups
            What `Groups` holds, on the device of the positions, if there are any.
        """
        quantities = (particle, shared, switching, entries)
        return self._evaluate(differentiable_energy, positions, box, *quantities, plain, groups)

    def sums(
        self,
        positions: Tensor,
        box: Tensor | None,
        particle: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        entries: Mapping[str, Tensor],
        plain: PlainSum,
    ) -> Tensor:
        """Sums ``(frames, N)`` at particle 1, of what is gathered; arguments as in `energy`."""
        quantities = (particle, shared, None, entries)
        return self._evaluate(particle_sums, positions, box, *quantities, plain, ())

    def _evaluate(
        self,
        function: Callable[..., Tensor],
        positions: Tensor,
        box: Tensor | None,
        particle: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        switching: Tensor | None,
        entries: Mapping[str, Tensor],
        plain: PlainSum,
        groups: Sequence[Tensor],
    ) -> Tensor:
        inputs = [particle[name] for name in self._particle]
        for name, quantity in zip(self._particle, inputs, strict=True):
            # Loops would read beyond the end of what is too short.
            if quantity.shape[-1:] != (self._n_particles,):
                raise InvalidInputError(
                    f"{name}: got values of shape {tuple(quantity.shape)}, wanted one for each of "
                    f"the {self._n_particles} particles; replace all of them"
                )
        dtype, device = positions.dtype, positions.device
        if groups:
            inputs.append(groups[0].to(dtype))
        if self._ordered:
            inputs.append(torch.arange(self._n_particles, dtype=dtype, device=device))
        inputs += [shared[name] for name in self._shared]
        inputs += [switching] if switching is not None else []
        for name, table in self._tables.items():
            inputs += table.columns(entries[name])
        if groups:
            _, forward, backward = groups
            # Their sum if it does not matter which particle is 1.
            counts = (forward, backward) if self._ordered else (forward + backward.T,)
            inputs += [count.to(dtype).reshape(-1) for count in counts]
        cell = box if self._method.periodic else None
        return function(self._kernel(positions, plain), positions, cell, inputs)

    def _kernel(self, positions: Tensor, plain: PlainSum) -> Kernel:
        key = route(positions)
        kernel = self._kernels.get(key)
        if kernel is None:
            from mdgraft.potentials.custom.pair_formula import expression_kernel

            assert self._description is not None
            kernel = expression_kernel(
                self._description,
                n_particle=len(self._particle),
                n_shared=len(self._shared),
                ordered=self._ordered,
                switched=self._switched,
                sizes=self._sizes,
                kinds=None if self._groups is None else self._groups.kinds,
                framed=self._framed,
                gathered=self._gathered,
                cutoff=self._cutoff,
                exclusions=self._exclusions,
                n_particles=self._n_particles,
                dtype=positions.dtype,
                make=pair_kernel(positions),
                reference=functools.partial(self._reference, plain),
            )
            self._kernels[key] = kernel
        return kernel

    def _reference(
        self, plain: PlainSum, positions: Tensor, box: Tensor, *quantities: Tensor
    ) -> Tensor:
        """The plain sum of the kernel's inputs."""
        weight = quantities[0] if self._gathered else None
        inputs = quantities[1:] if self._gathered else quantities
        particle = dict(zip(self._particle, inputs, strict=False))
        labels = (self._groups is not None) + bool(self._ordered)
        rest = inputs[len(self._particle) + labels :]
        shared = dict(zip(self._shared, rest, strict=False))
        columns = iter(rest[len(self._shared) + self._switched :])
        functions = {
            name: functools.partial(table.at, list(itertools.islice(columns, table.n_columns)))
            for name, table in self._tables.items()
        }
        switching = rest[len(self._shared)] if self._switched else None
        cell = box if box.shape[1] else None
        total = plain(positions, cell, particle, shared, switching, functions)
        return total if weight is None else (weight * total).sum(dim=-1)
