"""Isotropic changes of the box."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError, WrongEnsembleError
from mdgraft.kernels.periodic import volume
from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Volume(AbstractMove):
    """Change the logarithm of the volume by a normal number; molecules move with their centres.

    Box and geometric centres of the n molecules are scaled by ``s = (V'/V)^(1/3)``, molecules
    themselves are not. The Jacobian of the centres is ``(V'/V)^n``, that of a uniform step in
    ``ln V`` one more factor ``V'/V``: ``log_ratio = (n + 1) ln(V'/V)`` (Frenkel and Smit,
    section 5.4).

    Parameters
    ----------
    scale
        Standard deviation of ``ln V``.
    molecules
        Indices of the particles of each molecule, every particle in one; by default each particle
        is a molecule. Molecules must be whole, not wrapped into the box.
    smallest
        [nm^3]; smaller volumes are rejected without an evaluation, such as those where a cutoff
        would exceed half the box, which potentials refuse. The ensemble is restricted accordingly.
    name
        Under which the move is counted.
    """

    changes = frozenset({"volume"})

    def __init__(
        self,
        scale: float | Tensor,
        *,
        molecules: MoleculesLike | None = None,
        smallest: float = 0.0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, scale=scale)
        self.molecules = None if molecules is None else Groups("molecules", molecules)
        if not 0.0 <= smallest < torch.inf:
            raise InvalidInputError(f"smallest: got {smallest!r}, wanted a volume [nm^3]")
        self.smallest = float(smallest)
        self.target_acceptance = 0.4

    def largest_scale(self, state: ChainState) -> float:
        """A factor of e."""
        return 1.0

    def _groups(self, state: ChainState) -> Groups:
        return Groups.singles(state) if self.molecules is None else self.molecules

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for a constant volume, or molecules that leave particles out."""
        if target.pressure is None:
            raise WrongEnsembleError(
                f"{self.name}: changes the volume, but the target has no pressure; give "
                "Target(..., pressure=) in bar, or leave the move out"
            )
        if state.box is None:
            raise MissingBoxError("state: has no box, whose volume could change; pass box=")
        if state.present is not None:
            raise InvalidInputError(
                f"{self.name}: volume and number of molecules cannot both vary: their conjugates "
                "are not independent"
            )
        groups = self._groups(state)
        sites = set() if target.sites is None else set(target.sites.indices)
        members = [row[used].tolist() for row, used in zip(groups.index, groups.mask, strict=True)]
        alone = [molecule for molecule in members if sites.issuperset(molecule)]
        if alone:
            raise InvalidInputError(
                f"molecules: that of particles {alone[0]} is a virtual site alone, which "
                "has no place of its own to scale; give molecules= that hold it with its parents"
            )
        if self.molecules is not None:
            self.molecules.check(state)
            if int(self.molecules.mask.sum()) != state.n_particles:
                raise InvalidInputError(
                    f"molecules: hold {int(self.molecules.mask.sum())} of {state.n_particles} "
                    "particles; every particle must be in one"
                )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those within a molecule."""
        return self._groups(state).keeps(pairs, state)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """The step of ``ln V``, ``(C,)``."""
        return {"normal": normal(state, generator)}

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """With the Jacobian as ratio."""
        assert state.box is not None
        x = state.positions
        change = self.scale * noise["normal"]
        too_small = volume(state.box.double()).abs() * change.exp() < self.smallest
        factor = (change / 3.0).exp().to(x)[:, None, None]
        if self.molecules is None:
            n_molecules, moved = state.n_particles, x * factor
        else:
            n_molecules = len(self.molecules)
            centres = self.molecules.centres(x)
            index = self.molecules.index.to(x.device)
            owner = torch.empty(state.n_particles, dtype=torch.long, device=x.device)
            inside = self.molecules.mask.to(x.device)
            rows = torch.arange(n_molecules, device=x.device)[:, None].expand_as(index)
            owner[index[inside]] = rows[inside]
            moved = x + (factor - 1.0) * centres[:, owner]
        return Proposal(
            state=state.replace(positions=moved, box=state.box * factor.to(state.box)),
            log_ratio=((n_molecules + 1) * change).masked_fill(too_small, -torch.inf),
        )
