"""Molecules that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError, SimulationError
from mdgraft.kernels.periodic import volume
from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike
from mdgraft.montecarlo.moves._rotations import uniform_rotation
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal, pick, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target

# Distances within a molecule may differ from those of its template by this much [nm].
_RIGID = 1e-4


class InsertionDeletion(AbstractMove):
    """Insert a molecule somewhere in the box, or delete one, with even odds (muVT).

    With n molecules of this species, ``log_ratio = ln V/(n + 1)`` for an insertion and ``ln n/V``
    for a deletion, so that with the target's activity z an insertion is accepted with probability
    ``min(1, z V/(n + 1) exp(-beta dU))`` (Frenkel and Smit, section 5.6). Molecules that are alike
    are not told apart: which place one takes does not matter.

    Parameters
    ----------
    molecules
        Indices of the particles of each place, all of one species; by default each particle is one.
    template
        ``(K, 3)`` [nm] of a rigid molecule, in the order of ``molecules``; inserted with its centre
        anywhere and in any orientation. Left out for single particles. No other move may deform
        these molecules.
    places
        Which places of ``state.present`` the molecules are for; by default the first ones, all of
        them when there is one species.
    truncate
        Whether an insertion is impossible when every place is taken; that is exact for a system
        that cannot hold more. By default it raises, since it truncates the distribution.
    name
        Under which the move is counted.
    """

    changes = frozenset({"numbers"})

    def __init__(
        self,
        *,
        molecules: MoleculesLike | None = None,
        template: Any = None,
        places: Sequence[int] | None = None,
        truncate: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.molecules = None if molecules is None else Groups("molecules", molecules)
        shape = None if template is None else torch.as_tensor(template, dtype=torch.float64)
        if shape is not None:
            if shape.ndim != 2 or shape.shape[1] != 3 or not bool(torch.isfinite(shape).all()):
                raise InvalidInputError(
                    f"template: got shape {tuple(shape.shape)}, wanted (particles, 3) in nm"
                )
            shape = shape - shape.mean(dim=0)
        self.template = shape
        self.places = None if places is None else torch.as_tensor(list(places)).long()
        self.truncate = truncate

    def _groups(self, state: ChainState) -> Groups:
        return Groups.singles(state) if self.molecules is None else self.molecules

    def _places(self, groups: Groups, device: torch.device) -> Tensor:
        if self.places is None:
            return torch.arange(len(groups), device=device)
        return self.places.to(device)

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for a fixed number of molecules, no box, or molecules unlike the template."""
        if state.present is None:
            raise InvalidInputError(
                f"{self.name}: the state has no mask of molecules; pass present= (chains, places)"
            )
        if state.box is None:
            raise MissingBoxError("state: has no box to insert into; pass box=")
        groups = self._groups(state)
        groups.check(state)
        places = self._places(groups, state.positions.device)
        if len(places) != len(groups) or int(places.max()) >= state.present.shape[1]:
            raise InvalidInputError(
                f"places: got {len(places)} below {state.present.shape[1]} for {len(groups)} "
                "molecules"
            )
        if not bool(groups.mask.all()):
            raise InvalidInputError("molecules: differ in size, so they are not of one species")
        if (groups.index.shape[1] > 1) != (self.template is not None) or (
            self.template is not None and len(self.template) != groups.index.shape[1]
        ):
            raise InvalidInputError(
                f"template: wanted positions of the {groups.index.shape[1]} particles of a "
                "molecule, and none for single particles"
            )
        if self.template is not None:
            self._check_rigid(state, groups, places)
        z = target.log_activity
        if z is not None and z.ndim and not bool((z[places.cpu()] == z[places.cpu()][0]).all()):
            raise InvalidInputError("log_activity: must be equal for molecules of one species")

    def _check_rigid(self, state: ChainState, groups: Groups, places: Tensor) -> None:
        assert self.template is not None and state.present is not None
        x = state.positions[:, groups.index.to(state.positions.device)].double()
        found = torch.cdist(x, x)
        wanted = torch.cdist(self.template, self.template).to(found.device)
        off = (found - wanted).abs().amax(dim=(-2, -1)) > _RIGID
        if bool((off & state.present[:, places]).any()):
            raise InvalidInputError(
                "template: some molecule at the start has another geometry, so that deleting it "
                "would not be the inverse of an insertion"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those within a molecule, and those outside."""
        return self._groups(state).keeps(pairs, state)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Insert or delete, which, where ``(C, 3)`` and how turned ``(C, 4)``."""
        return {
            "insert": uniform(state, generator),
            "which": uniform(state, generator),
            "position": uniform(state, generator, 3),
            "orientation": normal(state, generator, 4),
        }

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """With the number of ways there and back as ratio."""
        assert state.present is not None and state.box is not None
        x = state.positions
        groups = self._groups(state)
        places = self._places(groups, x.device)
        taken = state.present[:, places]
        insert = noise["insert"] < 0.5
        candidates = torch.where(insert[:, None], ~taken, taken)
        possible = candidates.any(dim=1)
        if not self.truncate and bool((insert & ~possible).any()):
            raise SimulationError(
                f"{self.name}: all {len(places)} places are taken; give the state more places, or "
                "truncate=True if there cannot be more molecules"
            )
        chosen = pick(noise["which"], candidates)
        place = places[chosen][:, None]
        before = state.present.gather(1, place)
        after = torch.where(possible, insert, before[:, 0])[:, None]
        rows, _ = groups.rows(chosen, x)
        centre = noise["position"].to(x)[:, None] @ state.box.to(x)
        new = centre.expand(-1, rows.shape[1], -1)
        if self.template is not None:
            turn = uniform_rotation(noise["orientation"].to(x))
            new = new + self.template.to(x) @ turn.transpose(-1, -2)
        writes = (insert & possible)[:, None, None]
        index = rows[..., None].expand(-1, -1, 3)
        old = x.gather(1, index)
        n, v = taken.sum(dim=1).double(), volume(state.box.double()).abs()
        log_ratio = torch.where(insert, (v / (n + 1.0)).log(), (n.clamp(min=1.0) / v).log())
        return Proposal(
            state=state.replace(
                positions=x.scatter(1, index, torch.where(writes, new, old)),
                present=state.present.scatter(1, place, after),
            ),
            log_ratio=log_ratio.masked_fill(~possible, -torch.inf),
        )
