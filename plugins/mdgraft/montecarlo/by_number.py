"""Energies of numbers of molecules that vary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike
from mdgraft.montecarlo.state import ChainState
from mdgraft.potentials import Potential
from mdgraft.potentials.held import Held


class PotentialByNumber:
    """One `Potential` for each number of molecules, for `Target` with an activity.

    Most potentials know a fixed number of particles. This one makes a potential for each number
    that occurs, keeps it, and evaluates the chains that have this number together: the molecules
    that are present, in the order of their places, after the particles that never leave.

    Parameters
    ----------
    factory
        ``n -> Potential`` of the fixed particles followed by n molecules, such as
        ``lambda n: mdgraft.graft(system_with(n))``.
    molecules
        Indices of the particles of each place, all molecules alike.
    fixed
        Indices of particles that are always there, such as those of an adsorbent.

    Raises
    ------
    InvalidInputError
        For molecules of different sizes, or a potential of another number of particles.

    Notes
    -----
    Each number has parameters of its own. For derivatives in parameters write the energy as an
    ``nn.Module`` that maps a `ChainState` to energies.
    """

    def __init__(
        self,
        factory: Callable[[int], Potential],
        molecules: MoleculesLike,
        *,
        fixed: Sequence[int] = (),
    ) -> None:
        self._factory = factory
        self._groups = Groups("molecules", molecules)
        if not bool(self._groups.mask.all()):
            raise InvalidInputError("molecules: differ in size, so they are not all alike")
        self._fixed = torch.tensor([int(i) for i in fixed], dtype=torch.long)
        #: The potentials made so far, by number of molecules.
        self.potentials: dict[int, Potential] = {}

    def potential(self, n: int) -> Potential:
        """The potential of n molecules, made when first asked for."""
        if n not in self.potentials:
            made = self._factory(n)
            wanted = len(self._fixed) + n * self._groups.index.shape[1]
            if not isinstance(made, Potential) or made.n_particles != wanted:
                got = made.n_particles if isinstance(made, Potential) else type(made).__name__
                raise InvalidInputError(
                    f"factory: gave {got} for {n} molecules, wanted a Potential of {wanted} "
                    "particles"
                )
            self.potentials[n] = made
        return self.potentials[n]

    @property
    def held(self) -> Held | None:
        """What the host of the potential of one molecule holds fixed, for every place."""
        one = self.potential(1).held
        if one is None:
            return None
        places = [one.shifted(torch.cat((self._fixed, place))) for place in self._groups.index]
        lengths = {
            (int(i), int(j)): float(length)
            for held in places
            for (i, j), length in zip(held.pairs, held.lengths, strict=True)
        }
        pinned = torch.cat([held.pinned for held in places])
        return Held.of(list(lengths), list(lengths.values()), pinned.tolist())

    def __call__(self, state: ChainState) -> Tensor:
        """Energies ``(C,)`` [kJ/mol]."""
        present = state.present
        if present is None or present.shape[1] != len(self._groups):
            got = None if present is None else tuple(present.shape)
            raise InvalidInputError(
                f"state: present is {got}, wanted (chains, {len(self._groups)}) booleans"
            )
        device = state.positions.device
        index, fixed = self._groups.index.to(device), self._fixed.to(device)
        numbers = state.numbers
        # Places that are taken first, in their order.
        order = present.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        energies = torch.zeros(state.n_chains, dtype=torch.float64, device=device)
        for n in sorted(set(numbers.tolist())):
            (rows,) = (numbers == n).nonzero(as_tuple=True)
            if n == 0 and not len(fixed):
                continue
            particles = index[order[rows, :n]].flatten(1)
            particles = torch.cat((fixed.expand(len(rows), -1), particles), dim=1)
            x = state.positions[rows].gather(1, particles[..., None].expand(-1, -1, 3))
            box = None if state.box is None else state.box[rows]
            energies = energies.index_copy(0, rows, self.potential(n)(x, box).to(energies))
        return energies
