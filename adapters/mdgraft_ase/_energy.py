"""Energy, forces and virial of one configuration, from any energy in torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mdgraft import InvalidInputError, Potential
from mdgraft.potentials.atomistic.subset import Subset
from mdgraft.potentials.atomistic.weighted import Weighted
from torch import Tensor, nn

from mdgraft_ase._units import ANGSTROM, EV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass gave, in nm and kJ/mol.

    Attributes
    ----------
    energy
        [kJ/mol]
    gradient
        ``(N, 3)`` dU/dx [kJ/mol/nm], or None.
    strain_gradient
        ``(3, 3)`` sum_a x_ai dU/dx_aj + sum_k h_ki dU/dh_kj [kJ/mol]: the derivative by a strain
        that moves atoms and box vectors alike; or None.
    """

    energy: float
    gradient: np.ndarray | None = None
    strain_gradient: np.ndarray | None = None


class EnergyFunction:
    """A potential, module or callable, and what is known about its input.

    Parameters
    ----------
    function
        ``(positions, box) -> energy`` in nm and kJ/mol.
    dtype, device
        Of what it is called with; by default those of its first floating-point parameter or
        buffer, else float64 on the CPU.

    Raises
    ------
    InvalidInputError
        If ``function`` cannot be called.
    """

    def __init__(
        self,
        function: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(function):
            raise InvalidInputError(
                f"potential: got {type(function).__module__}.{type(function).__qualname__}, wanted "
                "a Potential, a torch.nn.Module or another callable (positions, box) -> energy"
            )
        self.function: Callable[..., Any] = function
        self.potential = _potential_of(function)
        self._dtype = dtype
        self._device = device
        # Parameters are constants here; a subclass may compute more than the sum of its terms.
        self._plain = (
            isinstance(function, Potential) and type(function).forward is Potential.forward
        )

    @property
    def n_particles(self) -> int | None:
        """Number of particles, virtual sites included, where it is known."""
        return None if self.potential is None else self.potential.n_particles

    @property
    def pbc(self) -> tuple[bool, bool, bool] | None:
        """The periodic directions, where the potential says which; all of them if it is reduced."""
        if self.potential is None:
            return None
        if not self.potential.periodic:
            return (False, False, False)
        if not self.potential.general_cell:
            return (True, True, True)
        for name in self.potential.term_names:
            pbc = getattr(self.potential.term(name), "pbc", None)
            if self.potential.term(name).periodic and pbc is not None:
                x, y, z = (bool(p) for p in pbc)
                return (x, y, z)
        return None

    @property
    def reduced(self) -> bool:
        """Whether the box must be in OpenMM's reduced form."""
        potential = self.potential
        return potential is not None and potential.periodic and not potential.general_cell

    def elements(self) -> np.ndarray:
        """Atomic numbers ``(N,)`` that terms were made for; -1 for particles of which none says."""
        found = np.full(self.n_particles or 0, -1)
        potential = self.potential
        for term in () if potential is None else map(potential.term, potential.term_names):
            places = np.arange(len(found))
            while isinstance(term, Weighted | Subset):
                if isinstance(term, Subset):
                    places = places[term.particles.cpu().numpy()]
                term = term.inner_terms()["term"]
            numbers = getattr(term, "atomic_numbers", None)
            if isinstance(numbers, Tensor):
                own = getattr(term, "particles", None)
                places = places if own is None else places[own.cpu().numpy()]
                found[places] = numbers.cpu().numpy()
        return found

    def sites(self) -> np.ndarray:
        """Indices of the virtual sites, which the potential places by itself."""
        placed = None if self.potential is None else self.potential._modules["sites"]
        return np.array(getattr(placed, "indices", ()), dtype=int)

    @torch.inference_mode(False)
    def evaluate(
        self, positions: np.ndarray, box: np.ndarray | None, *, forces: bool, strain: bool
    ) -> Evaluation:
        """Compute in one pass.

        Parameters
        ----------
        positions
            ``(N, 3)`` [nm].
        box
            ``(3, 3)`` [nm], or None.
        forces
            Whether the gradient is wanted.
        strain
            Whether the strain gradient is; the gradient then comes as well.

        Raises
        ------
        InvalidInputError
            If what the callable returns is not one energy, or has no graph.
        """
        x, h = self.tensors(positions, box)
        if not (forces or strain):
            with torch.set_grad_enabled(not self._plain):
                return Evaluation(energy=float(self._energy(x, h).detach()))
        x.requires_grad_()
        inputs = [x]
        if strain and h is not None:
            inputs.append(h.requires_grad_())
        with torch.enable_grad():
            energy = self._energy(x, h)
            if not energy.requires_grad:
                raise InvalidInputError(
                    "potential: its energy has no graph, so there are no forces; it was detached, "
                    "converted to a number or computed under torch.no_grad()"
                )
            found = torch.autograd.grad(energy, inputs, allow_unused=True)
        if found[0] is None:
            raise InvalidInputError(
                "potential: its energy does not depend on the positions that it was handed, so "
                "there are no forces; were they detached or copied to NumPy?"
            )
        gradient = _array(found[0])
        total = None
        if strain:
            total = positions.T @ gradient
            if box is not None and found[1] is not None:
                total = total + box.T @ _array(found[1])
        return Evaluation(energy=float(energy.detach()), gradient=gradient, strain_gradient=total)

    @torch.inference_mode(False)
    def particle_energies(self, positions: np.ndarray, box: np.ndarray | None) -> np.ndarray:
        """Energies ``(N,)`` [kJ/mol] of particles; only if `has_particle_energies`."""
        x, h = self.tensors(positions, box)
        with torch.no_grad():
            own = getattr(self.function, "particle_energies", None)
            if callable(own):
                return _array(own(x, h)).reshape(len(positions))
            assert self.potential is not None
            total = x.new_zeros(len(x))
            values = self.potential.values({})
            for name in self.potential.term_names:
                term: Any = self.potential.term(name)
                cell = h[None] if term.periodic and h is not None else None
                mine, shared = _under(name, values), _under("globals", values)
                total = total + term.particle_energies(x[None], cell, mine, shared)[0]
            return _array(total)

    @property
    def has_particle_energies(self) -> bool:
        """Whether energies of particles are defined: by the function, or by all of its terms."""
        if callable(getattr(self.function, "particle_energies", None)):
            return True
        potential = self.potential
        return (
            self._plain
            and potential is not None
            and bool(potential.term_names)
            and potential._modules["sites"] is None
            and all(
                callable(getattr(potential.term(name), "particle_energies", None))
                and not potential.term(name).borrows
                for name in potential.term_names
            )
        )

    def _energy(self, x: Tensor, h: Tensor | None) -> Tensor:
        if self._plain:
            assert self.potential is not None
            values = self.potential.values({})
            terms = self.potential.energy_by_term(x, h, values=values)
            energies = list(terms.values())
            return torch.stack(energies).sum() if energies else 0.0 * x.sum()
        energy = self.function(x, h)
        if not isinstance(energy, Tensor) or energy.numel() != 1:
            shape = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise InvalidInputError(
                f"potential: it returned {shape}, wanted a tensor with one energy [kJ/mol]"
            )
        return energy.reshape(())

    def tensors(
        self, positions: np.ndarray, box: np.ndarray | None
    ) -> tuple[Tensor, Tensor | None]:
        """Copies as the function takes them: Atoms must not move when a module works in place."""
        dtype, device = self._dtype, self._device
        if dtype is None or device is None:
            # Asked anew each time: modules move and change their precision.
            like = _first_tensor(self.function)
            dtype = dtype or (torch.float64 if like is None else like.dtype)
            device = device or ("cpu" if like is None else like.device)
        x = torch.tensor(positions, dtype=dtype, device=device)
        return x, None if box is None else torch.tensor(box, dtype=dtype, device=device)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()


class InASEUnits(nn.Module):
    """A module or callable in Angstrom and eV, as grafts of calculators expect it.

    Parameters
    ----------
    function
        ``(positions, box) -> energy`` in nm and kJ/mol.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, positions: Tensor, cell: Tensor | None) -> Tensor:
        """Energy [eV] of positions and cell [Angstrom]."""
        box = None if cell is None else cell * ANGSTROM
        energy: Tensor = self.function(positions * ANGSTROM, box) / EV
        return energy


def _under(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _potential_of(function: Any) -> Potential | None:
    """The potential itself, or the one that a module, compiled or not, or a method wraps."""
    for item in (function, getattr(function, "__self__", None)):
        for name in (None, "_orig_mod", "potential"):
            candidate = item if name is None else getattr(item, name, None)
            if isinstance(candidate, Potential):
                return candidate
    return None


def _first_tensor(function: Any) -> Tensor | None:
    if isinstance(function, Potential):
        return torch.empty(0, dtype=function.dtype, device=function.device)
    module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(module, nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None
