"""Coupled choices: two chains in different discrete states choose alike as often as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft.montecarlo.gradients.couplings import AbstractCoupling, reflected, uniform_numbers
from mdgraft.montecarlo.moves._molecules import available
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, pick
from mdgraft.montecarlo.moves.identity_swap import IdentitySwap
from mdgraft.montecarlo.moves.insertion_deletion import InsertionDeletion
from mdgraft.montecarlo.moves.site_change import PRESENT, SiteChange
from mdgraft.montecarlo.moves.translation import Translation
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


def coupled_choice(
    chosen: Tensor, mine: Tensor, others: Tensor, generator: torch.Generator
) -> Tensor:
    """A uniform choice that agrees with another uniform choice as often as possible.

    The maximal coupling of two uniform distributions A and B: the same entry with probability
    ``min(1, |A| / |B|)`` if B has it, otherwise one from the residual of B (Thorisson, Coupling,
    Stationarity, and Regeneration (2000), section 1.4).

    Parameters
    ----------
    chosen
        ``(C,)`` int64, uniform among the entries of ``mine``.
    mine, others
        ``(C, K)`` booleans, A and B.

    Returns
    -------
    Tensor
        ``(C,)`` int64, uniform among the entries of ``others``; 0 where there is none.
    """
    n_mine, n_others = mine.sum(dim=1).double(), others.sum(dim=1).double()
    u = uniform_numbers(chosen, generator)
    shared = others.gather(1, chosen[:, None])[:, 0] & mine.gather(1, chosen[:, None])[:, 0]
    keep = shared & (u * n_others < n_mine)
    # B - min(A, B); all of B where A is empty.
    share = 1.0 / n_others.clamp(min=1.0)
    taken = torch.where(n_mine > 0, 1.0 / n_mine.clamp(min=1.0), 0.0)
    residual = torch.where(mine, (share - taken).clamp(min=0.0)[:, None], share[:, None]) * others
    empty = residual.sum(dim=1, keepdim=True) <= 0
    weights = torch.where(empty, torch.ones_like(residual), residual)
    drawn = torch.multinomial(weights.to(generator.device), 1, generator=generator)[:, 0]
    return torch.where(keep, chosen, drawn.to(chosen.device)) * (n_others > 0)


def as_uniform(index: Tensor, allowed: Tensor) -> Tensor:
    """A number u for which ``pick(u, allowed)`` is this index, each ``(C,)``."""
    rank = allowed.cumsum(dim=1)
    count = rank[:, -1].clamp(min=1)
    return (rank.gather(1, index[:, None])[:, 0].clamp(min=1) - 0.5) / count


def choose_alike(
    u: Tensor, mine: Tensor, others: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """What u picks from A, the coupled choice from B, and a number that picks it there."""
    first = pick(u, mine)
    second = coupled_choice(first, mine, others, generator)
    return first, second, as_uniform(second, others)


class SiteCoupling(AbstractCoupling):
    """`SiteChange` of the same site; of more than two values, the same new one if possible.

    Two values need nothing more here: chains that propose to change places take antithetic
    numbers for their decisions, see `Coupled`.
    """

    name = "same site"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Choose the new value alike."""
        assert isinstance(move, SiteChange)
        n_values = len(move.values)
        if n_values == 2:
            return noise
        site, places = _site(move, x, noise), torch.arange(n_values)
        here, there = (_index(move, state, site) for state in (x, y))
        places = places.to(here.device)
        step = (noise["value"] * (n_values - 1)).long().clamp(max=n_values - 2) + 1
        new = (here + step) % n_values
        chosen = coupled_choice(new, places != here[:, None], places != there[:, None], generator)
        value = ((chosen - there) % n_values - 0.5) / (n_values - 1)
        return {**noise, "value": value}


class SwapCoupling(AbstractCoupling):
    """`IdentitySwap` of the same two, where both chains can exchange them."""

    name = "same pair"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Choose the first alike, and then the second."""
        assert isinstance(move, IdentitySwap)
        (kinds_x, there_x), (kinds_y, there_y) = (_kinds(move, state) for state in (x, y))
        first_x, first_y, u = choose_alike(noise["first"], there_x, there_y, generator)
        unlike_x = there_x & (kinds_x != kinds_x.gather(1, first_x[:, None]))
        unlike_y = there_y & (kinds_y != kinds_y.gather(1, first_y[:, None]))
        _, _, v = choose_alike(noise["second"], unlike_x, unlike_y, generator)
        return {**noise, "first": u, "second": v}


class InsertionCoupling(AbstractCoupling):
    """`InsertionDeletion` of the same molecule: at the same place, or the one at the same place."""

    name = "same molecule"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Choose the place alike."""
        assert isinstance(move, InsertionDeletion)
        assert x.present is not None and y.present is not None
        places = move.places
        if places is None:
            n_places = x.present.shape[1] if move.molecules is None else len(move.molecules)
            places = torch.arange(n_places)
        places = places.to(x.present.device)
        insert = (noise["insert"] < 0.5)[:, None]
        taken_x, taken_y = x.present[:, places], y.present[:, places]
        mine, others = (torch.where(insert, ~taken, taken) for taken in (taken_x, taken_y))
        _, _, u = choose_alike(noise["which"], mine, others, generator)
        return {**noise, "which": u}


class TranslationCoupling(AbstractCoupling):
    """`Translation` of the same molecule, with `ReflectionMaximal` in its centre."""

    name = "reflection-maximal in the centre"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Choose the molecule alike, and change ``normal`` if it is the same one."""
        assert isinstance(move, Translation)
        there = [available(state, len(move.molecules)) for state in (x, y)]
        first, second, u = choose_alike(noise["which"], there[0], there[1], generator)
        centres = [
            move.molecules.centres(state.positions.double())
            .gather(1, first[:, None, None].expand(-1, 1, 3))
            .squeeze(1)
            for state in (x, y)
        ]
        z = (centres[0] - centres[1]) / move.scale.detach().to(centres[0])
        z = torch.where((first == second)[:, None], z, 0.0)
        return {**noise, "which": u, "normal": reflected(noise["normal"], z, generator)}


def _sites(move: SiteChange, state: ChainState) -> Tensor:
    """The variable of a move, its sites in one row: ``(C, sites)``."""
    value = state.present if move.variable == PRESENT else state.discrete[move.variable]
    assert value is not None
    return value.flatten(1)


def _site(move: SiteChange, state: ChainState, noise: Noise) -> Tensor:
    n_sites = _sites(move, state).shape[1]
    return (noise["which"] * n_sites).long().clamp(max=n_sites - 1)[:, None]


def _index(move: SiteChange, state: ChainState, site: Tensor) -> Tensor:
    """Which of the move's values the site has ``(C,)``."""
    here = _sites(move, state).gather(1, site).long()
    return (here == move.values.to(here.device)).long().argmax(dim=1)


def _kinds(move: IdentitySwap, state: ChainState) -> tuple[Tensor, Tensor]:
    if move.variable is not None:
        kinds = state.discrete[move.variable].flatten(1)
        return kinds, torch.ones_like(kinds, dtype=torch.bool)
    assert move.species is not None
    kinds = move.species.to(state.positions.device).expand(state.n_chains, -1)
    return kinds, available(state, kinds.shape[1])
