"""A calculator as an engine: its energy, forces and every other first derivative."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import FileIOCalculator, PropertyNotImplementedError
from ase.calculators.genericfileio import GenericFileIOCalculator
from mdgraft import (
    InvalidInputError,
    MDGraftError,
    SimulationError,
    UnsupportedDerivativeError,
)
from mdgraft.kernels.external import FOUR_POINTS, Arrays, Steps

from mdgraft_ase._settings import change_setting, forget, is_numerical, like
from mdgraft_ase._units import ANGSTROM, EV

# Central differences of exact forces, of those in single precision, of those of iterations.
_DOUBLE = Steps(positions=1e-4, box=1e-4, parameters=5e-3)
_SINGLE = Steps(positions=1e-3, box=1e-3, parameters=2e-2)
#: Relative change of a parameter in differences of energies.
_PARAMETER_STEP = {_DOUBLE: 2e-4, _SINGLE: 1e-2}
# Displacement for forces that the calculator does not have [nm].
_FORCE_STEP = {_DOUBLE: 1e-4, _SINGLE: 1e-3}
# How far atoms are moved where it is tried out what a parameter does [nm].
_TRIAL = 2e-3
# Of these, what a setting does is not tried out, since each try may take hours.
_EXPENSIVE = (FileIOCalculator, GenericFileIOCalculator)
#: What a calculator raises if it has no such property.
_MISSING = (PropertyNotImplementedError, NotImplementedError)


class CalculatorEngine:
    """Evaluates a calculator on a copy of a structure.

    Energies are force-consistent: ``free_energy`` where the calculator has it, otherwise
    ``energy``. Constraints of the structure play no part. Forces come from the calculator, or from
    differences of energies if it has none; the derivative in the box from its stress, or from
    differences; derivatives in its numerical parameters from differences.

    Parameters
    ----------
    atoms
        The structure; a copy is made.
    calculator
        Is copied too if it can be. Otherwise it is used where it is: its settings are restored
        after each use and its results forgotten.
    settings
        Names of numerical parameters of the calculator that are inputs. None takes those that have
        an effect on this structure, which is tried out unless the calculator runs a program.

    Raises
    ------
    InvalidInputError
        If a name is no numerical parameter, or has no effect.
    """

    def __init__(
        self, atoms: ase.Atoms, calculator: Any, *, settings: Collection[str] | None = None
    ) -> None:
        self.name = type(calculator).__name__
        self._calculator, self._copied = _copied(calculator)
        self._atoms: Any = atoms.copy()  # type: ignore[no-untyped-call]
        self._atoms.set_constraint()
        # Directions that have no cell vector stay without.
        self._vectors: np.ndarray = np.abs(np.asarray(atoms.cell)).max(axis=1) > 0
        self._lock = threading.RLock()
        self._last: tuple[list[np.ndarray], np.ndarray, np.ndarray | None] | None = None
        self._settings: dict[str, np.ndarray] = {}
        self._types: dict[str, Any] = {}
        self._force_consistent: bool | None = None
        self._missing = ""
        self._has_forces = True
        self._has_stress = bool(self._vectors.all())
        self._steps = _SINGLE if _coarse(self._calculator) else _DOUBLE
        self._find_settings(settings)

    @property
    def steps(self) -> Steps:
        """Displacements of second-order differences; larger where forces are less precise."""
        return self._steps

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Numerical settings that change the energy or forces, in the calculator's own units."""
        return {name: value.copy() for name, value in self._settings.items()}

    # Engine ------------------------------------------------------------------------------------

    def energy(self, positions: np.ndarray, box: np.ndarray | None) -> float:
        """Energy of one configuration ``(N, 3)``, ``(3, 3)``; nothing else is asked for."""
        with self._lock, self._restored():
            return self._energy(positions, box)

    def energies(self, arrays: Arrays) -> np.ndarray:
        """Energies ``(F,)``."""
        with self._lock:
            return self._evaluate(arrays, forces=False)[0]

    def gradients(self, arrays: Arrays, wanted: Sequence[bool]) -> list[np.ndarray | None]:
        """Forces and box from the calculator where it has them, the rest by differences."""
        with self._lock:
            found: list[np.ndarray | None] = [None] * len(arrays)
            if wanted[0]:
                found[0] = -self._forces(arrays)
            if wanted[1]:
                found[1] = self._box(arrays)
            for k in range(2, len(arrays)):
                if wanted[k]:
                    found[k] = self._parameter(arrays, k, None)
            return found

    def mixed(
        self, arrays: Arrays, wanted: Sequence[bool], along: np.ndarray
    ) -> list[np.ndarray | None]:
        """Differences of the forces along a direction ``(F, N, 3)``."""
        with self._lock:
            found: list[np.ndarray | None] = [None] * len(arrays)
            if wanted[1]:
                found[1] = self._box_by_differences(arrays, along)
            for k in range(2, len(arrays)):
                if wanted[k]:
                    found[k] = self._parameter(arrays, k, along)
            return found

    # Derivatives -------------------------------------------------------------------------------

    def _scalar(self, arrays: Arrays, along: np.ndarray | None) -> np.ndarray:
        """Energy of each frame, or its derivative along a change of the positions."""
        if along is None:
            return self._evaluate(arrays, forces=False)[0]
        result: np.ndarray = -(self._forces(arrays) * along).sum(axis=(-2, -1))
        return result

    def _forces(self, arrays: Arrays) -> np.ndarray:
        if self._has_forces:
            forces = self._evaluate(arrays, forces=True)[1]
            if forces is not None:
                return forces
        forces = np.zeros_like(arrays[0])
        step = _FORCE_STEP[self._steps]
        for entry in np.ndindex(arrays[0].shape[1:]):
            for t, weight in FOUR_POINTS:
                moved = np.array(arrays[0])
                moved[(slice(None), *entry)] += t * step
                energies = self._evaluate([moved, *arrays[1:]], forces=False)[0]
                forces[(slice(None), *entry)] -= weight / step * energies
        return forces

    def _box(self, arrays: Arrays) -> np.ndarray:
        box = arrays[1]
        if not box.size:
            return np.zeros_like(box)
        if self._has_stress:
            found = self._box_by_stress(arrays)
            if found is not None:
                return found
        return self._box_by_differences(arrays, None)

    def _box_by_stress(self, arrays: Arrays) -> np.ndarray | None:
        """``dE/dh = h^-T (V stress - x^T dE/dx)``, since a strain moves box and positions."""
        if not self._has_forces:
            return None
        gradients = []
        with self._restored():
            self._apply(arrays)
            for x, h in zip(arrays[0], arrays[1], strict=True):
                # Of the calculator's last evaluation, both are there already.
                forces, stress = self._ask("forces", x, h), self._ask("stress", x, h)
                if forces is None or stress is None:
                    self._has_stress = False
                    return None
                strained = abs(np.linalg.det(h)) * stress + x.T @ forces
                gradients.append(np.linalg.solve(h.T, strained))
        return np.array(gradients)

    def _box_by_differences(self, arrays: Arrays, along: np.ndarray | None) -> np.ndarray:
        box, step = arrays[1], self._steps.box
        gradient = np.zeros_like(box)
        for i, j in np.ndindex(3, 3) if box.size else ():
            if not self._vectors[i]:
                continue
            for t, weight in FOUR_POINTS:
                moved = box.copy()
                moved[:, i, j] += t * step
                values = self._scalar([arrays[0], moved, *arrays[2:]], along)
                gradient[:, i, j] += weight / step * values
        return gradient

    def _parameter(self, arrays: Arrays, k: int, along: np.ndarray | None) -> np.ndarray:
        array = arrays[k]
        typical = float(np.abs(array).max(initial=0.0)) or 1.0
        gradient = np.zeros((arrays[0].shape[0], *array.shape))
        for entry in np.ndindex(array.shape):
            step = _PARAMETER_STEP[self._steps] * max(abs(float(array[entry])), 0.1 * typical)
            parts = []
            for t, weight in FOUR_POINTS:
                moved = np.array(array)
                moved[entry] += t * step
                changed = [*arrays[:k], moved, *arrays[k + 1 :]]
                try:
                    parts.append(weight / step * self._scalar(changed, along))
                except MDGraftError as error:
                    name = list(self._settings)[k - 2]
                    raise UnsupportedDerivativeError(
                        f"{self.name}.{name}: no derivative in entry {list(entry)}, at "
                        f"{float(array[entry]):g}: {error}; freeze it"
                    ) from error
            gradient[(slice(None), *entry)] = np.sum(parts, axis=0)
        self._apply(arrays)
        return gradient

    # The calculator ----------------------------------------------------------------------------

    def _evaluate(self, arrays: Arrays, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        last = self._last
        if last is not None and (last[2] is not None or not forces):
            same = len(last[0]) == len(arrays) and all(map(np.array_equal, last[0], arrays))
            if same:
                return last[1], last[2]
        with self._restored():
            self._apply(arrays)
            energies, found = [], []
            for f, x in enumerate(arrays[0]):
                h = arrays[1][f] if arrays[1].size else None
                energies.append(self._energy(x, h))
                # Many calculators find both at once; then a batch need not be evaluated again.
                known = "forces" in (getattr(self._calculator, "results", None) or {})
                asked = self._has_forces and (forces or known)
                found.append(self._ask("forces", x, h) if asked else None)
        if forces and any(force is None for force in found):
            self._has_forces = False
        complete = all(force is not None for force in found)
        result = np.array(energies, dtype=np.float64), np.array(found) if complete else None
        self._last = ([np.array(array) for array in arrays], *result)
        return result

    def _energy(self, x: np.ndarray, h: np.ndarray | None) -> float:
        if self._force_consistent is not False:
            value = self._ask("free_energy", x, h)
            if value is not None:
                self._force_consistent = True
                return float(value)
            self._force_consistent = False
        value = self._ask("energy", x, h)
        if value is None:
            raise SimulationError(
                f"{self.name}: the calculator gives no energy for this structure "
                f"({self._missing}), so there is nothing to differentiate"
            )
        return float(value)

    def _ask(self, name: str, x: np.ndarray, h: np.ndarray | None) -> Any:
        """A property in nm and kJ/mol, or None if the calculator does not have it."""
        atoms = self._atoms
        atoms.positions = x / ANGSTROM
        if h is not None:
            atoms.cell[self._vectors] = h[self._vectors] / ANGSTROM
        atoms.calc = self._calculator
        unit = {"forces": EV / ANGSTROM, "stress": EV / ANGSTROM**3}.get(name, EV)
        try:
            # A calculator may itself differentiate with torch, and runs where gradients are off.
            with torch.inference_mode(mode=False), torch.enable_grad():
                value = np.asarray(_PROPERTIES[name](atoms), dtype=np.float64)
        except _MISSING as error:
            self._missing = str(error) or type(error).__name__
            return None
        except MDGraftError:
            raise
        except Exception as error:
            raise SimulationError(
                f"{self.name}: the calculator failed when asked for {name} "
                f"({type(error).__name__}: {error}); try it on the same structure outside the graft"
            ) from error
        finally:
            atoms.calc = None
        if not np.isfinite(value).all():
            raise SimulationError(
                f"{self.name}: the calculator's {name} holds NaN or infinity; look at the structure"
            )
        shape = {"forces": x.shape, "stress": (3, 3)}.get(name, ())
        if value.size == 1 and not shape:
            # Some calculators give an energy as an array of one.
            value = value.reshape(())
        if value.shape != shape:
            raise SimulationError(
                f"{self.name}: the calculator's {name} has shape {value.shape}, wanted {shape}; "
                "look at what it computes"
            )
        return value * unit

    # Settings ----------------------------------------------------------------------------------

    def _find_settings(self, wanted: Collection[str] | None) -> None:
        """Numerical parameters that have an effect near the structure at hand."""
        if wanted is None and isinstance(self._calculator, _EXPENSIVE):
            return
        parameters = getattr(self._calculator, "parameters", None)
        known = {
            name: value
            for name, value in (parameters.items() if isinstance(parameters, Mapping) else ())
            if isinstance(name, str) and "." not in name and is_numerical(value)
        }
        unknown = sorted(set(wanted or ()) - known.keys())
        if unknown:
            raise InvalidInputError(
                f"parameters: {unknown[0]!r} is no numerical parameter of {self.name}; it has "
                f"{sorted(known)}"
            )
        arrays = self._trial_arrays()
        for name in known if wanted is None else wanted:
            value = np.array(known[name], dtype=np.float64)
            others, self._settings, self._types[name] = (
                self._settings,
                {name: value},
                known[name],
            )
            if self._has_effect(arrays):
                self._settings = {**others, name: value}
                continue
            del self._types[name]
            self._settings = others
            if wanted is not None:
                raise InvalidInputError(
                    f"parameters: changing {name!r} through {self.name}.set changes neither energy "
                    "nor forces of these atoms; leave it out"
                )
        self._last = None

    def _has_effect(self, arrays: list[np.ndarray]) -> bool:
        """Whether a change of the one setting reaches the energy or the forces."""
        (value,) = self._settings.values()
        answers = []
        for factor in (1.0, 1.0 + _PARAMETER_STEP[self._steps]):
            changed = np.where(value == 0, factor - 1.0, value * factor)
            given = [*arrays, value if factor == 1.0 else changed]
            try:
                energies, forces = self._evaluate(given, forces=True)
            except MDGraftError:
                return False
            finally:
                self._last = None
                self._apply([*arrays, value])
            answers.append((energies, forces))
        (first, forces), (second, moved) = answers
        same = np.array_equal(first, second)
        if forces is not None and moved is not None:
            same = same and np.array_equal(forces, moved)
        return not same

    def _trial_arrays(self) -> list[np.ndarray]:
        """Near the structure, since at a minimum some parameters change nothing."""
        moves = np.random.default_rng(0).normal(size=(1, len(self._atoms), 3))
        x = self._atoms.positions[None] * ANGSTROM + _TRIAL * moves
        if not self._atoms.pbc.any():
            return [x, np.zeros((1, 0, 3))]
        return [x, np.asarray(self._atoms.cell.complete())[None] * ANGSTROM]

    def _apply(self, arrays: Arrays) -> None:
        """Bring parameters into the calculator, if they are not there yet."""
        for name, value in zip(self._settings, arrays[2:], strict=True):
            present = np.array(self._calculator.parameters[name], dtype=np.float64)
            if not np.array_equal(present, value):
                change_setting(self._calculator, name, like(self._types[name], value))

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """Leave a calculator that is not a copy with its own settings, and nothing to remember."""
        try:
            yield
        finally:
            if not self._copied:
                for name, value in self._types.items():
                    if not np.array_equal(self._calculator.parameters[name], value):
                        change_setting(self._calculator, name, value)
                forget(self._calculator)

    def __deepcopy__(self, memo: dict[int, Any]) -> CalculatorEngine:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._last = None
        made._atoms = self._atoms.copy()
        if self._copied:
            made._calculator = copy.deepcopy(self._calculator)
            made._lock = threading.RLock()
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"]
        state["_last"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


_PROPERTIES: dict[str, Any] = {
    "free_energy": lambda a: a.get_potential_energy(force_consistent=True, apply_constraint=False),
    "energy": lambda a: a.get_potential_energy(apply_constraint=False),
    "forces": lambda a: a.get_forces(apply_constraint=False),
    "stress": lambda a: a.get_stress(voigt=False, apply_constraint=False),
}


def _copied(calculator: Any) -> tuple[Any, bool]:
    """A copy of a calculator, or itself if it cannot be copied, and which of both it is."""
    try:
        return copy.deepcopy(calculator), True
    except Exception:
        # Such as one that holds a running process.
        return calculator, False


def _coarse(calculator: Any) -> bool:
    """Whether energies are single precision or converged only so far."""
    if isinstance(calculator, _EXPENSIVE):
        return True
    results = getattr(calculator, "results", None) or {}
    known = [np.asarray(results[k]).dtype for k in ("energy", "forces") if k in results]
    if any(dtype == np.float32 for dtype in known):
        return True
    for value in vars(calculator).values() if hasattr(calculator, "__dict__") else ():
        for module in value if isinstance(value, list | tuple) else (value,):
            if isinstance(module, torch.nn.Module) and any(
                p.dtype in (torch.float32, torch.float16, torch.bfloat16)
                for p in module.parameters()
            ):
                return True
    return False
