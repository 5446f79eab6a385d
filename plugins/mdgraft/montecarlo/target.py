"""The distribution that a chain samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError, UnsupportedDerivativeError
from mdgraft._units import BAR_NM3, BOLTZMANN
from mdgraft.constraints import VirtualSites
from mdgraft.ensembles.ensemble import _pressure, _temperature
from mdgraft.ensembles.recompute import leaves_of
from mdgraft.kernels.periodic import volume
from mdgraft.montecarlo.state import PATHWISE, ChainState
from mdgraft.potentials import Potential
from mdgraft.potentials.held import Held

#: A potential, or anything that maps the state of C chains to energies ``(C,)`` [kJ/mol].
EnergyLike = Potential | Callable[[ChainState], Tensor]


@runtime_checkable
class HasForces(Protocol):
    """An energy that comes with forces of its own, as those of a host do."""

    def energies_and_forces(self, state: ChainState) -> tuple[Tensor, Tensor]:
        """Energies ``(C,)`` [kJ/mol] and forces ``(C, N, 3)`` [kJ/mol/nm]."""


class Target:
    """An unnormalised density, ``exp(-beta (U + P V) + sum_m ln z_m)``.

    The sum runs over the molecules that are present. The measure is ``dx`` at constant volume,
    ``dx dV`` at constant pressure, and ``dx / n!`` over n molecules that are alike when their
    number varies, as in Frenkel and Smit, Understanding Molecular Simulation, chapter 5.

    Parameters
    ----------
    energy
        A `Potential`, which is called with positions and box, or a callable that maps a
        `ChainState` to energies ``(C,)`` [kJ/mol]; an ``nn.Module`` whose ``forward`` does that
        shows its parameters to estimators. All chains are one call. If it has a method
        ``energies_and_forces(state)``, that gives the forces; otherwise automatic differentiation
        does. The energy may be ``+inf`` where a configuration is impossible.
    temperature
        [K], a number or a quantity.
    pressure
        [bar], a number or a quantity; None for a constant box.
    log_activity
        ``ln z`` of every place for a molecule, ``()`` or ``(S,)``, with ``z = exp(beta mu) /
        Lambda^3`` [1/nm^3] (for sites of a lattice, no unit); None for a fixed number of
        molecules. A rigid molecule's z includes its rotational partition function.
    ignore_constraints
        Sample the positions of all particles, whatever a host holds fixed. By default a sampler
        refuses moves that change distances which the energy's host constrains, or move particles
        which it keeps in place (see `held`).

    Raises
    ------
    InvalidInputError
        For a value that makes no sense.
    UnsupportedDerivativeError
        If ``log_activity`` requires a gradient.
    """

    def __init__(
        self,
        energy: EnergyLike,
        *,
        temperature: Any,
        pressure: Any = None,
        log_activity: float | Tensor | None = None,
        ignore_constraints: bool = False,
    ) -> None:
        if not callable(energy):
            raise InvalidInputError(
                f"energy: got {type(energy).__name__}, wanted a Potential or a callable that maps "
                "a ChainState to energies (chains,)"
            )
        self.energy = energy
        self.temperature = _temperature(temperature)
        self.pressure = _pressure(pressure)
        self.ignore_constraints = ignore_constraints
        self.log_activity: Tensor | None = None
        if log_activity is not None:
            value = torch.as_tensor(log_activity, dtype=torch.float64)
            if value.requires_grad:
                raise UnsupportedDerivativeError(f"log_activity: requires a gradient; {PATHWISE}")
            if value.ndim > 1 or not bool(torch.isfinite(value).all()):
                raise InvalidInputError(
                    f"log_activity: got {log_activity!r}, wanted finite numbers, () or (places,)"
                )
            self.log_activity = value

    @property
    def beta(self) -> float:
        """Inverse temperature ``1 / kT`` [mol/kJ]."""
        return 1.0 / (BOLTZMANN * self.temperature)

    @property
    def sites(self) -> VirtualSites | None:
        """Virtual sites of the energy, which follow the particles; None if it has none."""
        found = getattr(self.energy, "sites", None)
        return found if isinstance(found, VirtualSites) else None

    @property
    def held(self) -> Held | None:
        """What the host of the energy holds fixed, as far as it is known; None for nothing.

        A grafted `Potential` and a host's own energy know it, a function of yours does not.
        """
        found = getattr(self.energy, "held", None)
        return found if isinstance(found, Held) else None

    def placed(self, state: ChainState) -> ChainState:
        """The same state with virtual sites where they belong; energies do not depend on that."""
        sites = self.sites
        if sites is None:
            return state
        like = next(buffer for buffer in sites.buffers() if buffer.is_floating_point())
        box = None if state.box is None else state.box.to(like)
        positions = sites(state.positions.to(like), box).to(state.positions)
        return state.replace(positions=positions, energies=state.energies, forces=state.forces)

    # Energies ---------------------------------------------------------------------------------

    def energies(self, state: ChainState) -> Tensor:
        """Potential energies ``(C,)`` [kJ/mol], float64; with a graph where gradients are on.

        Raises
        ------
        InvalidInputError
            If the energy returns something else than one number for each chain.
        """
        energy = self.energy
        if isinstance(energy, Potential):
            found = energy(state.positions, state.box)
        else:
            found = energy(state)
        if not torch.is_tensor(found) or found.shape != (state.n_chains,):
            got = f"shape {tuple(found.shape)}" if torch.is_tensor(found) else type(found).__name__
            raise InvalidInputError(
                f"energy: returned {got}, wanted a tensor ({state.n_chains},) with one energy for "
                "each chain"
            )
        return found.to(device=state.positions.device, dtype=torch.float64)

    def energies_and_forces(self, state: ChainState) -> tuple[Tensor, Tensor]:
        """Energies ``(C,)`` [kJ/mol] and forces ``(C, N, 3)`` [kJ/mol/nm].

        With a graph where gradients are on; an energy with forces of its own never has one.

        Raises
        ------
        InvalidInputError
            If the energy has no derivative in the positions.
        """
        if isinstance(self.energy, HasForces):
            energies, forces = self.energy.energies_and_forces(state)
            return energies.to(torch.float64), forces.to(state.positions)
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = state.positions
            own = not (keep and x.requires_grad)
            if own:
                x = x.detach().requires_grad_()
            energies = self.energies(state.replace(positions=x))
            gradient = None
            if energies.requires_grad:
                (gradient,) = torch.autograd.grad(
                    energies.sum(), x, create_graph=keep, allow_unused=True
                )
        if gradient is None:
            raise InvalidInputError(
                "energy: has no derivative in the positions; use moves that need no forces, such "
                "as Displacement, or give the energy a method energies_and_forces(state)"
            )
        if not keep or (own and all(leaf is x for leaf in leaves_of([energies]))):
            # Nothing but this function's own leaf.
            energies, gradient = energies.detach(), gradient.detach()
        return energies, -gradient

    def log_density(self, state: ChainState, energies: Tensor | None = None) -> Tensor:
        """Logarithm of the unnormalised density ``(C,)``.

        Parameters
        ----------
        state
            The configurations.
        energies
            Their potential energies [kJ/mol]; by default those of the state, or else computed.
        """
        if energies is None:
            energies = self.energies(state) if state.energies is None else state.energies
        log = -self.beta * energies
        if self.pressure is not None:
            assert state.box is not None
            log = log - self.beta * self.pressure * BAR_NM3 * volume(state.box.double()).abs()
        if self.log_activity is not None:
            assert state.present is not None
            log_z = self.log_activity.to(log.device)
            log = log + (state.present * log_z).sum(dim=-1)
        return log

    def check(self, state: ChainState) -> None:
        """Raise unless the state has what this distribution is a distribution of."""
        if self.pressure is not None and state.box is None:
            raise MissingBoxError("state: has no box, but a pressure is given; pass box=")
        if (self.log_activity is None) != (state.present is None):
            raise InvalidInputError(
                "log_activity: goes with state.present, which says which molecules there are; got "
                f"{'no' if self.log_activity is None else 'an'} activity and "
                f"present={'None' if state.present is None else 'a mask'}"
            )
        z = self.log_activity
        n_places = 0 if state.present is None else state.present.shape[1]
        if z is not None and z.ndim and z.shape[0] != n_places:
            raise InvalidInputError(f"log_activity: got {z.shape[0]} values for {n_places} places")
