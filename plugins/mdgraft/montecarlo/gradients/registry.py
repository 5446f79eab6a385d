"""Which coupling a move has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.gradients.couplings import (
    AbstractCoupling,
    CommonRandomNumbers,
    ReflectionMaximal,
    TorsionCoupling,
    VolumeCoupling,
)
from mdgraft.montecarlo.gradients.discrete import (
    InsertionCoupling,
    SiteCoupling,
    SwapCoupling,
    TranslationCoupling,
)
from mdgraft.montecarlo.gradients.rotations import RotationCoupling
from mdgraft.montecarlo.moves.base import AbstractGaussianMove, AbstractMove, Noise
from mdgraft.montecarlo.moves.displacement import Displacement
from mdgraft.montecarlo.moves.identity_swap import IdentitySwap
from mdgraft.montecarlo.moves.insertion_deletion import InsertionDeletion
from mdgraft.montecarlo.moves.mixture import Mixture
from mdgraft.montecarlo.moves.rotation import Rotation
from mdgraft.montecarlo.moves.site_change import SiteChange
from mdgraft.montecarlo.moves.torsion import Torsion
from mdgraft.montecarlo.moves.translation import Translation
from mdgraft.montecarlo.moves.volume import Volume
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target

_KNOWN: tuple[tuple[type[AbstractMove], type[AbstractCoupling]], ...] = (
    (Displacement, ReflectionMaximal),
    (AbstractGaussianMove, ReflectionMaximal),
    (Torsion, TorsionCoupling),
    (SiteChange, SiteCoupling),
    (IdentitySwap, SwapCoupling),
    (InsertionDeletion, InsertionCoupling),
    (Volume, VolumeCoupling),
    (Translation, TranslationCoupling),
    (Rotation, RotationCoupling),
)


class Couplings:
    """The coupling of every move of a sampler.

    Parameters
    ----------
    moves
        Moves that are accepted or rejected once, mixtures among them.
    chosen
        Couplings by the names of moves, in place of the usual ones.

    Attributes
    ----------
    names
        What each move is coupled by, by name.

    Raises
    ------
    InvalidInputError
        If ``chosen`` names a move that there is not.
    """

    def __init__(
        self, moves: tuple[AbstractMove, ...], chosen: Mapping[str, AbstractCoupling] | None = None
    ) -> None:
        chosen = {} if chosen is None else chosen
        components = {c.name: c for move in moves for c in move.components}
        unknown = sorted(set(chosen) - set(components))
        if unknown:
            raise InvalidInputError(
                f"couplings: no moves {unknown}; there are {sorted(components)}"
            )
        self._components = components
        self._couplings = {n: chosen.get(n, _usual(m)) for n, m in components.items()}
        self.names = {name: coupling.name for name, coupling in self._couplings.items()}

    def prepare(self, state: ChainState) -> None:
        """See `AbstractCoupling.prepare`."""
        for name, coupling in self._couplings.items():
            coupling.prepare(self._components[name], state)

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Random numbers for ``y``, given those for ``x``."""
        if not isinstance(move, Mixture):
            coupling = self._couplings[move.name]
            return coupling.noise(move, x, y, noise, target, generator)
        choice = move.choice(noise)
        made: dict[str, Tensor] = dict(noise)
        for k in sorted(set(choice.tolist())):
            (rows,) = (choice == k).nonzero(as_tuple=True)
            part, prefix = move.components[k], f"{k}."
            own = {
                name.removeprefix(prefix): value[rows]
                for name, value in noise.items()
                if name.startswith(prefix)
            }
            coupling = self._couplings[part.name]
            changed = coupling.noise(part, x[rows], y[rows], own, target, generator)
            for name, value in changed.items():
                whole = made[prefix + name]
                made[prefix + name] = whole.index_copy(0, rows, value.to(whole))
        return made


def _usual(move: AbstractMove) -> AbstractCoupling:
    for kind, coupling in _KNOWN:
        if isinstance(move, kind):
            return coupling()
    return CommonRandomNumbers()
