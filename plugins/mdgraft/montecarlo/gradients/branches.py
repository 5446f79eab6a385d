"""Alternative histories of a chain: what would have followed, had it decided otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft.montecarlo.gradients.couplings import uniform_numbers
from mdgraft.montecarlo.gradients.registry import Couplings
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.moves.insertion_deletion import InsertionDeletion
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.montecarlo.transition import Transition, transition

_STATES = "states."
#: Relative rounding errors of positions that the same proposals leave between two chains.
_ROUNDING = 64.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coalescence:
    """How long alternative branches lived.

    Attributes
    ----------
    lifetimes
        Updates from the birth of a branch until it met the chain again, one number for each that
        did; int64.
    n_alive
        Branches that had not met the chain at the end.
    n_cut
        Branches that were cut because they grew too old; each cut is a bias.
    couplings
        What each move was coupled by, by name.
    """

    lifetimes: Tensor
    n_alive: int
    n_cut: int
    couplings: dict[str, str]

    def summary(self) -> str:
        """One line for people."""
        ages = self.lifetimes.double()
        how = (
            f"mean {ages.mean():.3g}, longest {int(ages.max())} updates"
            if len(ages)
            else "none met the chain"
        )
        return (
            f"{len(ages)} branches coalesced ({how}), {self.n_alive} alive at the end, "
            f"{self.n_cut} cut"
        )

    __str__ = summary


class Branches:
    """One alternative branch for each chain and parameter scalar, with a weight.

    Smoothed perturbation analysis: where the acceptance probability p of an update depends on a
    parameter, the branch that was not taken is born with weight ``p'/(1 - p)`` if ``p' > 0`` and
    the proposal was rejected, ``|p'|/p`` if ``p' < 0`` and it was accepted. Of two branches only
    one is kept, with a probability proportional to its weight, and takes over the sum of both
    (Arya, Schauer, Schafer and Rackauckas, NeurIPS 35 (2022); Arya, Seyer, Schafer, Chandra,
    Lew, Huot, Mansinghka, Ragan-Kelley, Rackauckas and Schauer, arXiv:2306.07961). It evolves
    with coupled random numbers until it meets the chain.

    Branch ``p C + c`` belongs to scalar p and chain c.

    Parameters
    ----------
    sampler
        The chains.
    n_scalars
        Number of parameter scalars P.
    couplings
        How proposals are coupled.
    generator
        Of the choices between branches, and of the couplings.
    max_age
        Updates after which a branch is cut, or None.
    tolerance
        Distance [nm] of every particle below which a branch and its chain are the same; never
        less than what rounding of the positions leaves.
    """

    def __init__(
        self,
        sampler: Metropolis,
        n_scalars: int,
        couplings: Couplings,
        generator: torch.Generator,
        *,
        max_age: int | None,
        tolerance: float,
    ) -> None:
        self.n_chains, self.n_scalars = sampler.state.n_chains, n_scalars
        self.target: Target = sampler.target
        self.couplings = couplings
        self.generator = generator
        self.max_age = max_age
        x = sampler.state.positions
        largest = max(1.0, float(x.abs().max())) if x.numel() else 1.0
        self.tolerance = max(tolerance, _ROUNDING * torch.finfo(x.dtype).eps * largest)
        couplings.prepare(sampler.state)
        #: What couplings were prepared for ``(N, 3)``.
        self._reference = x[0].clone()
        start = dataclasses.replace(sampler.state, generator_state=None, forces=None)
        self.states = start[torch.arange(self.n_chains).repeat(n_scalars)]
        device = start.positions.device
        n_branches = n_scalars * self.n_chains
        self.weights = torch.zeros(n_branches, dtype=torch.float64, device=device)
        self.ages = torch.zeros(n_branches, dtype=torch.long, device=device)
        self._places = _places(sampler)
        self._lifetimes: list[Tensor] = []
        self._n_cut = 0

    @property
    def alive(self) -> Tensor:
        """Indices of the branches that have a weight."""
        return self.weights.nonzero()[:, 0]

    def coalescence(self) -> Coalescence:
        """What happened so far."""
        empty = torch.empty(0, dtype=torch.long)
        return Coalescence(
            lifetimes=torch.cat(self._lifetimes) if self._lifetimes else empty,
            n_alive=len(self.alive),
            n_cut=self._n_cut,
            couplings=self.couplings.names,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later histories depend on, as tensors by name."""
        return {_STATES + name: value for name, value in self.states.state_dict().items()} | {
            "weights": self.weights.clone(),
            "ages": self.ages.clone(),
            "lifetimes": self.coalescence().lifetimes,
            "n_cut": torch.tensor(self._n_cut),
            "generator_state": self.generator.get_state(),
            "reference": self._reference,
        }

    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` of branches of the same chains returned."""
        device = self.weights.device
        states = {k.removeprefix(_STATES): v for k, v in values.items() if k.startswith(_STATES)}
        self.states = ChainState.from_state_dict(states).to(device)
        self.weights, self.ages = values["weights"].to(device), values["ages"].to(device)
        self._lifetimes, self._n_cut = [values["lifetimes"].cpu()], int(values["n_cut"])
        self.generator.set_state(values["generator_state"].cpu())
        self._reference = values["reference"].to(device)
        self.couplings.prepare(ChainState(positions=self._reference[None]))

    @torch.no_grad()
    def evolve(self, update: Update) -> None:
        """Take the living branches through an update of their chains, coupled to these."""
        alive = self.alive
        if not len(alive):
            return
        chains = alive % self.n_chains
        done = update.transition
        before, after = done.before[chains], done.after[chains]
        mine = self.states[alive]
        noise = {name: value[chains] for name, value in update.noise.items()}
        other = self.couplings.noise(update.move, before, mine, noise, self.target, self.generator)
        u = update.u[chains]
        moved = transition(mine, update.move, self.target, other, u)
        if update.move.adjusted:
            moved = self._antithetic(moved, before, done.proposed[chains], u)
        met = self.same(moved.after, after)
        self.states = self.states.put(alive, _bare(moved.after))
        self.ages[alive] += 1
        self._lifetimes.append(self.ages[alive[met]].cpu())
        self.weights[alive[met]] = 0.0
        if self.max_age is not None:
            old = alive[~met & (self.ages[alive] >= self.max_age)]
            self._n_cut += len(old)
            self.weights[old] = 0.0

    def _antithetic(
        self, moved: Transition, x: ChainState, x_proposed: ChainState, u: Tensor
    ) -> Transition:
        """Decide by 1 - u where chain and branch propose to change places.

        They then meet when exactly one of them accepts, which this makes as likely as possible.
        """
        crossed = self.same(moved.proposed, x) & self.same(x_proposed, moved.before)
        if not bool(crossed.any()):
            return moved
        accepted = torch.where(crossed, (-u).log1p() < moved.log_alpha, moved.accepted)
        after = moved.before.where(accepted, moved.proposed)
        return dataclasses.replace(moved, accepted=accepted, after=after)

    @torch.no_grad()
    def give_birth(self, result: Transition, slopes: Tensor) -> None:
        """Let branches be born where a decision depends on parameters.

        Parameters
        ----------
        result
            An update of the chains.
        slopes
            ``(C, P)``: derivatives of ``log_alpha``; finite also where it does not matter.
        """
        log_alpha = result.log_alpha.detach()[None]
        alpha = log_alpha.clamp(max=0.0).exp()
        accepted = result.accepted[None]
        slope = slopes.T
        # p' = alpha slope below one; |p'|/p = |slope|, p'/(1 - p) = slope alpha / (1 - alpha).
        odds = alpha / (-torch.expm1(log_alpha.clamp(max=0.0))).clamp(min=1e-300)
        rejected = torch.where(~accepted & (slope > 0), slope * odds, 0.0)
        taken = torch.where(accepted & (slope < 0), -slope, 0.0)
        weights = torch.where((log_alpha < 0) & (alpha > 0), rejected + taken, 0.0).reshape(-1)
        self.add(weights, result.before.where(~result.accepted, result.proposed))

    def add(self, weights: Tensor, candidates: ChainState) -> None:
        """Offer each branch a candidate with a weight ``(P C,)``.

        Parameters
        ----------
        weights
            Zero where there is none.
        candidates
            The state of the candidate of each chain, the same for all parameters, or of each
            branch.
        """
        total = self.weights + weights
        u = uniform_numbers(total, self.generator)
        (chosen,) = ((weights > 0) & (u * total < weights)).nonzero(as_tuple=True)
        self.weights = total
        if not len(chosen):
            return
        rows = chosen if candidates.n_chains == len(total) else chosen % self.n_chains
        self.states = self.states.put(chosen, _bare(candidates[rows]))
        self.ages[chosen] = 0

    def same(self, a: ChainState, b: ChainState) -> Tensor:
        """For which chains ``(C,)`` two states are the same within the tolerance."""
        far = (a.positions - b.positions).abs() > self.tolerance
        if a.present is not None and b.present is not None and self._places is not None:
            # Where a molecule is absent its positions mean nothing.
            owner = self._places.to(a.present.device)
            there = (a.present | b.present)[:, owner.clamp(min=0)] | (owner < 0)
            far = far & there[..., None]
        same = ~far.flatten(1).any(dim=1)
        if a.box is not None and b.box is not None:
            same = same & ~((a.box - b.box).abs() > self.tolerance).flatten(1).any(dim=1)
        pairs = [(value, b.discrete[name]) for name, value in a.discrete.items()]
        if a.present is not None and b.present is not None:
            pairs.append((a.present, b.present))
        for mine, others in pairs:
            same = same & (mine == others).flatten(1).all(dim=1)
        return same


def _bare(state: ChainState) -> ChainState:
    """Without forces, which not every move keeps."""
    return dataclasses.replace(state, forces=None)


def _places(sampler: Metropolis) -> Tensor | None:
    """The place ``(N,)`` in ``present`` that each particle belongs to; -1 for none."""
    state = sampler.state
    if state.present is None:
        return None
    n_places, n_particles = state.present.shape[1], state.n_particles
    owner = torch.full((n_particles,), -1)
    for move in sampler.moves.components:
        if not isinstance(move, InsertionDeletion):
            continue
        n_groups = n_places if move.molecules is None else len(move.molecules)
        places = torch.arange(n_groups) if move.places is None else move.places.cpu()
        if move.molecules is None:
            owner[: len(places)] = places[:n_particles]
        else:
            for place, row, used in zip(
                places, move.molecules.index, move.molecules.mask, strict=True
            ):
                owner[row[used]] = place
    return owner
