"""What the logarithm of a target's density is differentiated by."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError
from mdgraft._units import BAR_NM3
from mdgraft.ensembles import per_frame_gradients
from mdgraft.ensembles.per_frame import per_frame_jacobian
from mdgraft.ensembles.selection import select_parameters
from mdgraft.frames import Frames
from mdgraft.kernels.periodic import volume
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target
from mdgraft.potentials import Potential

#: Parameters of the distribution itself.
THERMODYNAMIC = ("temperature", "pressure", "log_activity", "chemical_potential")


class Conjugates:
    """Derivatives of ``ln pi``, the unnormalised log density, at fixed configurations.

    For a parameter of the energy it is ``-beta dU/dtheta``; for ``temperature`` [K] it is
    ``(U + P V) / kT^2`` at fixed activity, for ``pressure`` [bar] ``-beta V``, for
    ``log_activity`` the number of molecules (of each place, if it has a value for each), and for
    ``chemical_potential`` [kJ/mol] beta times the number of molecules. The covariance of any
    observable with it is the derivative of the observable's average.

    Parameters
    ----------
    target
        The distribution.
    parameters
        Names or shell-style patterns of parameters of the energy, which must be a `Potential` or
        another ``nn.Module``, and names from `THERMODYNAMIC`; by default all trainable parameters
        of the energy.
    scales
        Names of the scales of moves, ``<move>.scale``, that may be asked for as well. The density
        does not depend on them.

    Attributes
    ----------
    names
        Names in the order of the derivatives.
    shapes
        Shapes by name; P scalars in all.

    Raises
    ------
    InvalidInputError
        For a name without a match, or one that the target lacks.
    """

    def __init__(
        self,
        target: Target,
        parameters: Sequence[str] | None = None,
        *,
        scales: Sequence[str] = (),
    ) -> None:
        self.target = target
        self.scales: tuple[str, ...] = ()
        if isinstance(parameters, str):
            parameters = [parameters]
        if parameters is None:
            chosen, patterns = [], None
        else:
            chosen = [name for name in THERMODYNAMIC if name in parameters]
            self.scales = tuple(name for name in scales if name in parameters)
            for name in (*chosen, *self.scales):
                if name in self._named():
                    raise InvalidInputError(
                        f"parameters: {name!r} is the name of a parameter of the energy and of "
                        "something else; rename that of the energy"
                    )
            patterns = [name for name in parameters if name not in (*chosen, *self.scales)]
        self.energy_names = self._selected(patterns)
        if parameters is None and not self.energy_names:
            raise InvalidInputError(
                "parameters: got None, but the energy has no trainable parameter; make it an "
                f"nn.Module with parameters that require gradients, or name one of {THERMODYNAMIC}"
            )
        self.shapes = {name: self._named()[name].shape for name in self.energy_names}
        for name in chosen:
            self.shapes[name] = self._thermodynamic_shape(name)
        self.thermodynamic = tuple(chosen)
        self.shapes |= dict.fromkeys(self.scales, torch.Size())
        self.names = tuple(self.shapes)

    @property
    def n_scalars(self) -> int:
        """Number of scalars P."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def n_energy_scalars(self) -> int:
        """Number of those that are parameters of the energy; they come first."""
        return sum(self.shapes[name].numel() for name in self.energy_names)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of the energy, in order."""
        named = self._named()
        return [named[name] for name in self.energy_names]

    def __call__(self, state: ChainState) -> Tensor:
        """Derivatives ``(C, P)`` of ``ln pi`` at the configurations of C chains, float64."""
        columns = [-self.target.beta * self.energy_gradients(state)]
        columns.append(self.thermodynamic_columns(state))
        columns.append(columns[0].new_zeros(state.n_chains, len(self.scales)))
        return torch.cat(columns, dim=1)

    def thermodynamic_columns(self, state: ChainState) -> Tensor:
        """Derivatives of ``ln pi`` by the parameters of the distribution alone."""
        columns = [self._thermodynamic(name, state) for name in self.thermodynamic]
        if columns:
            return torch.cat(columns, dim=1)
        return state.positions.new_zeros(state.n_chains, 0, dtype=torch.float64)

    def energy_gradients(self, state: ChainState) -> Tensor:
        """Derivatives of the energies, float64 ``(C, P)`` [kJ/mol per unit of the parameter]."""
        if not self.energy_names:
            return state.positions.new_zeros(state.n_chains, 0, dtype=torch.float64)
        energy = self.target.energy
        if isinstance(energy, Potential):
            frames = Frames(positions=state.positions, box=state.box)
            found = per_frame_gradients(energy, frames, self.energy_names)
        else:
            (found,) = self.jacobian(lambda chains: (self.target.energies(chains),), state)
        return found.to(state.positions.device)

    def jacobian(
        self, function: Callable[[ChainState], tuple[Tensor, ...]], state: ChainState
    ) -> tuple[Tensor, ...]:
        """Derivatives of quantities ``(C, *S)`` of each chain by parameters of the energy.

        Returns
        -------
        tuple of Tensor
            ``(C, *S, P)`` for each, P counting parameters of the energy only.
        """
        module = self._module()
        assert module is not None
        wrapped = cast(Any, _Chains(state))

        def of(chains: Any) -> tuple[Tensor, ...]:
            return function(chains.state)

        return per_frame_jacobian(module, of, wrapped, self.energy_names)

    def split(self, columns: Tensor) -> dict[str, Tensor]:
        """Bring ``(*S, P)`` to one tensor ``(*S, *shape)`` for each name."""
        parts = torch.split(columns, [shape.numel() for shape in self.shapes.values()], dim=-1)
        return {
            name: part.reshape((*columns.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    # Details ----------------------------------------------------------------------------------

    def _module(self) -> nn.Module | None:
        energy = self.target.energy
        return energy if isinstance(energy, nn.Module) else None

    def _named(self) -> dict[str, nn.Parameter]:
        module = self._module()
        return {} if module is None else dict(module.named_parameters())

    def _selected(self, patterns: Sequence[str] | None) -> list[str]:
        module = self._module()
        if isinstance(module, Potential):
            return select_parameters(module, patterns)
        named = self._named()
        if patterns is None:
            return [name for name, p in named.items() if p.requires_grad]
        chosen: set[str] = set()
        for pattern in patterns:
            matches = fnmatch.filter(named, pattern)
            if not matches:
                hint = "" if module is not None else ", which is no nn.Module that could have any"
                raise InvalidInputError(
                    f"parameters: {pattern!r} matches no parameter; there are {sorted(named)} of "
                    f"the energy{hint}, and {THERMODYNAMIC} of the distribution"
                )
            chosen.update(matches)
        return [name for name in named if name in chosen]

    def _thermodynamic_shape(self, name: str) -> torch.Size:
        target = self.target
        if name == "pressure" and target.pressure is None:
            raise InvalidInputError(
                "parameters: got 'pressure', but the target has none; sample at constant pressure"
            )
        if name in ("log_activity", "chemical_potential"):
            if target.log_activity is None:
                raise InvalidInputError(
                    f"parameters: got {name!r}, but the target has no log_activity; sample with a "
                    "reservoir of molecules"
                )
            if name == "log_activity":
                return target.log_activity.shape
        return torch.Size()

    def _thermodynamic(self, name: str, state: ChainState) -> Tensor:
        target = self.target
        if name == "temperature":
            enthalpy = target.energies(state) if state.energies is None else state.energies
            if target.pressure is not None:
                assert state.box is not None
                enthalpy = enthalpy + target.pressure * BAR_NM3 * volume(state.box.double()).abs()
            return (enthalpy.detach() * target.beta / target.temperature)[:, None]
        if name == "pressure":
            assert state.box is not None
            return -target.beta * BAR_NM3 * volume(state.box.double()).abs()[:, None]
        assert state.present is not None and target.log_activity is not None
        present = state.present.double()
        if name == "log_activity" and target.log_activity.ndim:
            return present
        numbers = present.sum(dim=-1, keepdim=True)
        return numbers if name == "log_activity" else target.beta * numbers


@contextlib.contextmanager
def trainable(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Let all of them require gradients inside this context."""
    frozen = [leaf for leaf in leaves if not leaf.requires_grad]
    try:
        for leaf in frozen:
            leaf.requires_grad_(True)
        yield
    finally:
        for leaf in frozen:
            leaf.requires_grad_(False)


class _Chains:
    """Lets chains pass for frames where only their number and size matter."""

    def __init__(self, state: ChainState) -> None:
        self.state = state

    def __len__(self) -> int:
        return self.state.n_chains

    @property
    def n_particles(self) -> int:
        return max(1, self.state.n_particles)

    def batches(self, size: int) -> Iterator[_Chains]:
        for start in range(0, len(self), size):
            yield _Chains(self.state[start : start + size])
