"""A model, a configuration, and what both can be asked."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mdgraft._differences import Difference
from mdgraft._errors import InvalidInputError
from mdgraft._types import BoxLike, PositionsLike
from mdgraft._units import plain
from mdgraft.neural import NeuralTerm, neural_potential
from mdgraft.potentials import Potential

#: Energy, or energy and forces, of positions ``(N, 3)`` and a box ``(3, 3)`` or None.
Function: TypeAlias = Callable[[Tensor, "Tensor | None"], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """One property of a model.

    Attributes
    ----------
    name
        The property.
    error
        How far the model is from it [kJ/mol for energies, kJ/mol/nm for forces]; NaN if it was not
        looked at.
    allowed
        The largest error that passes, in the same unit.
    detail
        What was compared, or why nothing was.
    """

    name: str
    error: float
    allowed: float
    detail: str

    @property
    def status(self) -> str:
        """``"passed"``, ``"failed"`` or ``"skipped"``."""
        if self.allowed < 0:
            return "skipped"
        # Written so that NaN fails.
        return "passed" if self.error <= self.allowed else "failed"

    def __str__(self) -> str:
        if self.status == "skipped":
            return f"{self.name:14s} skipped  {self.detail}"
        return (
            f"{self.name:14s} {self.status}   {self.error:.2e} <= {self.allowed:.2e}  {self.detail}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What `check_model` found: one `ModelCheck` for each property."""

    checks: tuple[ModelCheck, ...]

    def __getitem__(self, name: str) -> ModelCheck:
        """The check of this name; where there are several, the one that is nearest to failing."""
        found = [check for check in self.checks if check.name == name]
        if not found:
            names = sorted({check.name for check in self.checks})
            raise InvalidInputError(f"name: no check {name!r}; there are {names}")
        return max(found, key=lambda check: check.error / check.allowed)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


class Subject:
    """A model, a configuration, and what both can be asked."""

    def __init__(
        self,
        model: Any,
        positions: PositionsLike,
        box: BoxLike,
        atomic_numbers: Sequence[int] | Tensor | None,
        *,
        pbc: bool | Sequence[bool] | None,
        dtype: torch.dtype | None,
        seed: int,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.cutoff: float | None = None
        self.rtol = self.difference_rtol = 0.0
        #: Of finite differences.
        self.step, self.levels = 1e-3, 9
        self.numbers = None if atomic_numbers is None else torch.as_tensor(atomic_numbers).cpu()
        directions = box is not None if pbc is None else pbc
        if isinstance(directions, bool):
            directions = (directions, directions, directions)
        self.pbc = tuple(bool(d) for d in directions)
        self.potential: Potential | None = None
        if isinstance(model, Potential):
            self.potential = _in_precision(model, dtype)
        elif isinstance(model, nn.Module) and hasattr(model, "units"):
            if self.numbers is None:
                raise InvalidInputError(
                    "atomic_numbers: got None, but a model of atoms needs one for each atom"
                )
            own = _in_precision(model, dtype)
            self.potential = neural_potential(own, self.numbers, pbc=self.pbc)
        elif not callable(model):
            raise InvalidInputError(
                f"model: got {type(model).__name__}, wanted a Potential, a model of atoms or a "
                "function of positions and box"
            )
        self.function: Function = self.potential or _function(model, dtype)
        self.dtype, self.device = _kind(self.potential or model, dtype)
        self.x = self._tensor("positions", positions, (3,))
        self.h = None if box is None else self._tensor("box", box, (3, 3))
        if self.numbers is not None and self.numbers.shape != self.x.shape[:1]:
            raise InvalidInputError(
                f"atomic_numbers: got {tuple(self.numbers.shape)} for {len(self.x)} particles"
            )
        term = self.neural_term
        if term is not None:
            self.cutoff = float(term.model.cutoff) * term.model_units.nanometers  # type: ignore[arg-type]
        self.energy0, self.forces0 = self.energy(self.x, self.h), self.forces(self.x, self.h)
        #: Magnitudes against which errors of energies and forces are judged.
        sizes = self.forces0.norm(dim=-1)
        self.energy_scale = max(0.01 * float(sizes.sum()), 0.1)
        self.force_scale = max(float(sizes.sum()), 1.0)
        self.largest_force = max(float(sizes.max()), 1.0)
        self.largest_energy = max(abs(float(self.energy0)), 1.0)

    def _tensor(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.as_tensor(plain(value), dtype=self.dtype, device=self.device).detach()
        if tensor.ndim != 2 or tensor.shape[-len(shape) :] != shape:
            wanted = "(N, 3)" if len(shape) == 1 else "(3, 3)"
            raise InvalidInputError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
        return tensor

    @property
    def neural_term(self) -> NeuralTerm | None:
        """The one term of a neural potential, if that is what is checked."""
        if self.potential is None or len(self.potential.term_names) != 1:
            return None
        term = self.potential.term(self.potential.term_names[0])
        return term if isinstance(term, NeuralTerm) else None

    @property
    def periodic(self) -> bool:
        return self.h is not None and any(self.pbc)

    @property
    def any_cell(self) -> bool:
        """Whether cells may have any shape."""
        return self.potential is None or self.potential.general_cell or not self.periodic

    def energy(self, x: Tensor, h: Tensor | None) -> Tensor:
        """Energy ``()``, without a graph."""
        with torch.no_grad():
            return self.split(self.function(x, h))[0].detach()

    def forces(self, x: Tensor, h: Tensor | None) -> Tensor:
        """Forces ``(N, 3)``: the model's own if it returns some, else by autograd."""
        moved = x.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            energy, forces = self.split(self.function(moved, h))
        if forces is not None:
            return forces.detach()
        if not energy.requires_grad:
            return torch.zeros_like(x)
        (slope,) = torch.autograd.grad(energy, moved, allow_unused=True, materialize_grads=True)
        return -slope

    def split(self, found: Any) -> tuple[Tensor, Tensor | None]:
        """A function's result as energy ``()`` and, if it returns them, forces ``(N, 3)``."""
        try:
            energy, forces = found if isinstance(found, tuple) else (found, None)
            energy = torch.as_tensor(energy)
            forces = None if forces is None else torch.as_tensor(forces)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"model: returned {type(found).__name__}, wanted an energy, or a tuple of energy "
                f"and forces ({error})"
            ) from error
        if energy.numel() != 1:
            raise InvalidInputError(
                f"model: returned an energy of shape {tuple(energy.shape)} for one frame"
            )
        if forces is not None and forces.shape != self.x.shape:
            raise InvalidInputError(
                f"model: returned forces of shape {tuple(forces.shape)} for positions of shape "
                f"{tuple(self.x.shape)}"
            )
        return energy.reshape(()), forces

    def allowed(self, *energies: Any) -> float:
        """The error that an energy may have: relative to what forces do, and by rounding."""
        largest = max(abs(float(e)) for e in (self.energy0, *energies))
        return self.rtol * self.energy_scale + 1e3 * torch.finfo(self.dtype).eps * largest

    def rand(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        found = torch.randn(*shape, generator=self.random, dtype=torch.float64)
        return found.to(self.x)

    def compare(
        self, name: str, detail: str, x: Tensor, h: Tensor | None, expected: Tensor
    ) -> Iterator[ModelCheck]:
        """Energy and forces of a configuration that should be like the first one."""
        change = (self.energy(x, h) - self.energy0).abs()
        yield check(name, change, self.allowed(), f"energy after {detail}")
        off = (self.forces(x, h) - expected).abs().max()
        yield check(name, off, self.rtol * self.force_scale, f"forces after {detail}")


_M = TypeVar("_M", bound=nn.Module)


def _in_precision(model: _M, dtype: torch.dtype | None) -> _M:
    """The model itself if it has this precision, otherwise a copy that has."""
    tensors = [*model.parameters(), *model.buffers()]
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    return model if dtype is None or kinds <= {dtype} else copy.deepcopy(model).to(dtype)


def _function(model: Any, dtype: torch.dtype | None) -> Function:
    """A function of positions and box; one of positions alone does not want the box."""
    if isinstance(model, nn.Module):
        model = _in_precision(model, dtype)
    try:
        inspect.signature(getattr(model, "forward", model)).bind(0, 0)
    except TypeError:
        return lambda x, h: model(x)
    except ValueError:
        pass
    function: Function = model
    return function


def _kind(model: Any, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.device]:
    """Precision and device of the positions that a model gets."""
    if isinstance(model, Potential):
        return model.dtype, model.device
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    for weight in weights:
        if weight.is_floating_point():
            return dtype or weight.dtype, weight.device
    return dtype or torch.float64, torch.device("cpu")


def check(name: str, error: Any, allowed: float, detail: str) -> ModelCheck:
    return ModelCheck(name=name, error=float(error), allowed=allowed, detail=detail)


def skipped(name: str, why: str) -> ModelCheck:
    return ModelCheck(name=name, error=float("nan"), allowed=-1.0, detail=why)


def against_difference(
    subject: Subject,
    name: str,
    found: Any,
    truth: Difference,
    *,
    size: float,
    noise: float,
    detail: str,
) -> ModelCheck:
    """A derivative against differences of a quantity of magnitude ``noise``, which is rounded."""
    error = float(np.linalg.norm(np.asarray(found) - truth.value))
    uncertain = float(np.linalg.norm(truth.error))
    size = max(float(np.linalg.norm(truth.value)), size)
    # Of sums of many terms, at the largest steps, which rounding leaves as the best ones.
    rounding = 100 * torch.finfo(subject.dtype).eps * noise / subject.step
    if rounding > 0.1 * subject.force_scale:
        return skipped(
            name, f"differences of energies of {noise:.1e} are lost in {subject.dtype}; use more"
        )
    if not uncertain <= max(1e-3, subject.difference_rtol) * size + rounding:
        detail += f"; differences are uncertain by {uncertain:.1e}: the energy is not smooth here"
        return check(name, max(uncertain, error), subject.difference_rtol * size, detail)
    allowed = subject.difference_rtol * size + 10 * uncertain + rounding
    return check(name, error, allowed, detail)
