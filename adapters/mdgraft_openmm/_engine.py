"""One Force evaluated by OpenMM: its energy, forces and every other first derivative."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, MissingBoxError, UnsupportedDerivativeError
from mdgraft.kernels.external import FOUR_POINTS, Arrays, Steps

from mdgraft_openmm._classes import known_class
from mdgraft_openmm._converter import AbstractConverter, global_key, number
from mdgraft_openmm._copies import (
    faithful_copy,
    foreign_classes,
    forgotten_settings,
    restore_settings,
)
from mdgraft_openmm.forces import WITHOUT_ENERGY

#: Forces that are only complete together.
COMPANIONS = (openmm.AmoebaMultipoleForce, openmm.AmoebaGeneralizedKirkwoodForce)
_FIVE_POINTS: tuple[tuple[float, float], ...] = (
    (0.0, -25 / 12),
    (1.0, 4.0),
    (2.0, -3.0),
    (3.0, 4 / 3),
    (4.0, -1 / 4),
)
# Of a parameter in which the energy is a polynomial any step is exact; a large one rounds least.
_LARGE_STEP = 0.25
# Force groups while a force is evaluated.
_OWN, _OTHERS = 0, 1
# Forces that are evaluated where they are may share a System.
_IN_PLACE = threading.RLock()
_REDUCED = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))


class ForceEngine:
    """Evaluates one Force in a Context of its own.

    Parameters
    ----------
    system
        Holds the force.
    index
        Of the force in the System.
    converter
        Reads and writes the force's parameters; None if its class is unknown.
    names
        The force's parameters in order.
    platform, properties
        What the Context runs on.
    companions
        Converters of forces that share this one's energy, by the names of their terms; their
        parameters are among ``names``, as ``<term>.<parameter>``.

    Raises
    ------
    InvalidInputError
        If OpenMM cannot run the force.
    """

    def __init__(
        self,
        system: openmm.System,
        index: int,
        *,
        converter: AbstractConverter | None,
        names: Sequence[str],
        platform: str,
        properties: Mapping[str, str],
        companions: Mapping[str, AbstractConverter] | None = None,
    ) -> None:
        self._converter = converter
        self._companions = dict(companions or {})
        self._names = tuple(names)
        self._platform, self._properties = platform, dict(properties)
        self._system, self._force = _alone(system, index)
        self._copied = self._system is not system
        self._pointer = _pointer(self._force)
        self._lock = threading.RLock() if self._copied else _IN_PLACE
        # A System that is no copy places its virtual sites itself, and moves their forces.
        n_particles = 0 if self._copied else system.getNumParticles()
        self._sites = [i for i in range(n_particles) if system.isVirtualSite(i)]
        self._last: tuple[list[np.ndarray], np.ndarray, np.ndarray] | None = None
        self._open()
        self.global_defaults = self._own_globals()
        self._globals = tuple(self.global_defaults)
        self._exact = tuple(
            self._force.getEnergyParameterDerivativeName(i)
            for i in range(getattr(self._force, "getNumEnergyParameterDerivatives", lambda: 0)())
        )
        self._written: list[np.ndarray] | None = None
        double = platform == "Reference" or properties.get("Precision") == "double"
        self._steps = Steps() if double else Steps(positions=1e-3, box=1e-3, parameters=2e-2)
        self._small_step, self._rounding = (1e-3, 2e-16) if double else (5e-3, 1e-7)

    @property
    def steps(self) -> Steps:
        """Displacements of second-order differences; larger where forces are single precision."""
        return self._steps

    @property
    def platform(self) -> str:
        """Name of the platform that evaluates."""
        return self._platform

    # Engine ------------------------------------------------------------------------------------

    def energies(self, arrays: Arrays) -> np.ndarray:
        """Energies ``(F,)``."""
        with self._lock:
            return self._evaluate(arrays)[0]

    def gradients(self, arrays: Arrays, wanted: Sequence[bool]) -> list[np.ndarray | None]:
        """Forces from OpenMM, declared derivatives from OpenMM, the rest by differences."""
        with self._lock:
            found = self._derivatives(arrays, wanted, None)
            if wanted[0]:
                found[0] = -self._evaluate(arrays)[1]
        return found

    def mixed(
        self, arrays: Arrays, wanted: Sequence[bool], along: np.ndarray
    ) -> list[np.ndarray | None]:
        """Differences of the forces along a direction ``(F, N, 3)``."""
        with self._lock:
            return self._derivatives(arrays, wanted, along)

    # Differences -------------------------------------------------------------------------------

    def _derivatives(
        self, arrays: Arrays, wanted: Sequence[bool], along: np.ndarray | None
    ) -> list[np.ndarray | None]:
        """Those in box and parameters."""
        found: list[np.ndarray | None] = [None] * len(arrays)
        if wanted[1]:
            found[1] = self._box(arrays, along)
        for k in range(2, len(arrays)):
            if wanted[k]:
                found[k] = self._parameter(arrays, k, along)
        return found

    def _scalar(self, arrays: Arrays, along: np.ndarray | None) -> np.ndarray:
        """Energy of each frame, or its derivative along a change of the positions."""
        energies, forces = self._evaluate(arrays)
        if along is None:
            return energies
        result: np.ndarray = -(forces * along).sum(axis=(-2, -1))
        return result

    def _box(self, arrays: Arrays, along: np.ndarray | None) -> np.ndarray:
        box, step = arrays[1], self._steps.box
        gradient = np.zeros_like(box)
        for i, j in _REDUCED if box.size else ():
            for t, weight in FOUR_POINTS:
                moved = box.copy()
                moved[:, i, j] += t * step
                values = self._scalar([arrays[0], moved, *arrays[2:]], along)
                gradient[:, i, j] += weight / step * values
        return gradient

    def _parameter(self, arrays: Arrays, k: int, along: np.ndarray | None) -> np.ndarray:
        name = [*self._names, *self._globals][k - 2]
        if along is None and k - 2 >= len(self._names) and name in self._exact:
            return self._declared_derivative(arrays, name)
        array = arrays[k]
        typical = float(np.abs(array).max(initial=0.0)) or 1.0
        polynomial = self._converter is not None and name in self._converter.polynomial
        for term, companion in self._companions.items():
            polynomial |= name.removeprefix(f"{term}.") in companion.polynomial
        gradient = np.zeros((arrays[0].shape[0], *array.shape))
        for entry in np.ndindex(array.shape):
            size = max(abs(float(array[entry])), 0.1 * typical)
            step = size * (_LARGE_STEP if polynomial else self._small_step)
            gradient[(slice(None), *entry)] = self._difference(arrays, k, entry, step, along)
        self._set(arrays)
        return gradient

    def _difference(
        self,
        arrays: Arrays,
        k: int,
        entry: tuple[int, ...],
        step: float,
        along: np.ndarray | None,
    ) -> np.ndarray:
        """Slope in one entry of each frame's scalar: central, or one-sided at a border."""

        def slope(size: float, stencil: Sequence[tuple[float, float]]) -> np.ndarray:
            moved = ((_changed(arrays, k, entry, t * size), weight) for t, weight in stencil)
            parts = [weight / size * self._scalar(a, along) for a, weight in moved]
            scale.append(np.abs(parts).max(initial=0.0))
            result: np.ndarray = np.sum(parts, axis=0)
            return result

        why: Exception | str = "OpenMM accepts no other value"
        scale: list[float] = []
        for size, stencil in ((step, FOUR_POINTS), (step, _FIVE_POINTS), (-step, _FIVE_POINTS)):
            ends = (stencil[0][0], stencil[-1][0])
            if not all(self._allowed(arrays, k, entry, t * size) for t in ends if t):
                continue
            try:
                found = slope(size, stencil)
                if not np.isfinite(found).all():
                    why = "its energy there, or near there, is not finite"
                    continue
                # A border may be where a root starts, with a vertical tangent.
                if stencil is _FIVE_POINTS:
                    nearer = slope(size / 4, stencil)
                    noise = 1e3 * self._rounding * scale[-1]
                    change = np.abs(found - nearer)
                    if (change > 1e-3 * np.abs(nearer) + noise).any():
                        why = "differences of OpenMM's energy do not converge there"
                        continue
            except InvalidInputError as error:
                why = error
                continue
            return found
        key, converter = [*self._names, *self._globals][k - 2], self._converter
        if converter is not None and key in converter.flat_at_zero and arrays[k][entry] == 0:
            return np.zeros(arrays[0].shape[0])
        own = [f"{self._force.getName()}.{name}" for name in self._names]
        name = [*own, *(f"globals.{global_key(name)}" for name in self._globals)][k - 2]
        raise UnsupportedDerivativeError(
            f"{name}: no derivative in entry {list(entry)} alone, at "
            f"{float(arrays[k][entry]):g}: {why}; freeze it, or use the native route"
        )

    def _declared_derivative(self, arrays: Arrays, name: str) -> np.ndarray:
        self._set(arrays)
        values = []
        for x, h in self._frames(arrays):
            self._put(x, h)
            state = self._state(parameterDerivatives=True)
            values.append(state.getEnergyParameterDerivatives()[name])
        return np.array(values)

    def _allowed(self, arrays: Arrays, k: int, entry: tuple[int, ...], change: float) -> bool:
        if self._converter is None or k - 2 >= len(self._names):
            return True
        moved = dict(zip(self._names, _changed(arrays, k, entry, change)[2:], strict=False))
        if self._converter.refused(moved, self._force) is None:
            return True
        return self._copied and self._converter.rebuilt(moved, self._force) is not None

    # OpenMM ------------------------------------------------------------------------------------

    def _evaluate(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        if self._last is not None and all(map(np.array_equal, self._last[0], arrays)):
            return self._last[1], self._last[2]
        self._set(arrays)
        energies, forces = [], []
        for x, h in self._frames(arrays):
            try:
                self._put(x, h)
                state = self._state(energy=True, forces=True)
            except openmm.OpenMMException as error:
                raise InvalidInputError(
                    f"{self._force.getName()}: OpenMM cannot evaluate it here ({error})"
                ) from error
            energies.append(number(state.getPotentialEnergy()))
            forces.append(np.array(state.getForces(asNumpy=True)._value, dtype=np.float64))
        result = np.array(energies), np.array(forces).reshape(arrays[0].shape)
        # Handed to the parents already.
        result[1][:, self._sites] = 0.0
        self._last = ([array.copy() for array in arrays], *result)
        return result

    def _frames(self, arrays: Arrays) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for f, x in enumerate(arrays[0]):
            yield x, arrays[1][f] if arrays[1].size else None

    def _put(self, x: np.ndarray, h: np.ndarray | None) -> None:
        if not self._copied and self._pointer not in map(_pointer, self._system.getForces()):
            raise InvalidInputError(
                "host_object: a force that is evaluated where it is was removed from its System; "
                "graft the System again"
            )
        if h is not None:
            self._context.setPeriodicBoxVectors(*h)
        elif uses_box(self._force):
            raise MissingBoxError(f"{self._force.getName()}: is periodic; pass box vectors")
        self._context.setPositions(x)
        if self._sites:
            self._context.computeVirtualSites()

    def _state(self, **wanted: bool) -> openmm.State:
        # A force may itself differentiate with torch, and runs where gradients are off.
        with self._in_own_group(), torch.inference_mode(mode=False), torch.enable_grad():
            return self._context.getState(groups=1 << _OWN, **wanted)

    def _set(self, arrays: Arrays) -> None:
        """Bring parameters into the Context, if they are not there yet."""
        new = [np.array(array) for array in arrays[2:]]
        old = self._written
        if old is not None and all(map(np.array_equal, old, new)):
            return
        own = dict(zip(self._names, new, strict=False))
        before = None if old is None else dict(zip(self._names, old, strict=False))
        if self._converter is not None and not _same(before, own):
            self._write(self._converter, own)
        for name, value in zip(self._globals, new[len(self._names) :], strict=True):
            self._context.setParameter(name, float(value))
        self._written = new

    def _write(self, converter: AbstractConverter, values: Mapping[str, np.ndarray]) -> None:
        refused = converter.refused(values, self._force)
        if refused is None:
            structural = converter.structural(values, self._force)
            converter.write(values, self._force)
            for name, companion in self._companions.items():
                other, own = self._companion(), _of_term(values, name)
                structural += companion.structural(own, other)
                companion.write(own, other)
                companion.settle(other, self._system)
            self._update(reopen=bool(structural))
            return
        new = converter.rebuilt(values, self._force) if self._copied else None
        if new is None:
            raise InvalidInputError(f"{refused}. Clamp it, or train a transform of it")
        new.setForceGroup(self._force.getForceGroup())
        self._system.removeForce(index_of(self._system, self._force))
        self._force = self._system.getForce(self._system.addForce(new))
        self._open()

    def _update(self, *, reopen: bool) -> None:
        if not reopen and hasattr(self._force, "updateParametersInContext"):
            with contextlib.suppress(openmm.OpenMMException):
                self._force.updateParametersInContext(self._context)
                if self._companions:
                    self._companion().updateParametersInContext(self._context)
                return
        self._open()

    def _companion(self) -> Any:
        """The other force that shares the energy."""
        return next(
            f
            for f in self._system.getForces()
            if isinstance(f, COMPANIONS) and _pointer(f) != _pointer(self._force)
        )

    def _open(self) -> None:
        platform = openmm.Platform.getPlatformByName(self._platform)
        integrator = openmm.VerletIntegrator(0.001)
        try:
            with self._in_own_group():
                self._context = openmm.Context(self._system, integrator, platform, self._properties)
        except openmm.OpenMMException as error:
            raise InvalidInputError(
                f"{self._force.getName()}: OpenMM cannot run it on the {self._platform} platform "
                f"({error})"
            ) from error

    def _own_globals(self) -> dict[str, float]:
        """Global parameters that the force adds to a Context, with their defaults."""
        if not self._copied and hasattr(self._force, "getGlobalParameters"):
            return {name: float(v) for name, v in self._force.getGlobalParameters().items()}
        # Among other forces, those of all: which ones it reads nobody tells.
        hidden = {name for f in self._system.getForces() for name in _of_ensemble(f)}
        parameters = dict(self._context.getParameters())
        return {name: float(v) for name, v in parameters.items() if name not in hidden}

    @contextlib.contextmanager
    def _in_own_group(self) -> Iterator[None]:
        """Groups are their owner's business, except while the force is evaluated here."""
        changes: list[tuple[Any, str, int]] = [(self._force, "ForceGroup", _OWN)]
        for force in [] if self._copied else map(known_class, self._system.getForces()):
            if _pointer(force) != self._pointer:
                changes += [
                    (force, kind, _OTHERS)
                    for kind in ("ForceGroup", "ReciprocalSpaceForceGroup")
                    if getattr(force, f"get{kind}", lambda: _OTHERS)() == _OWN
                ]
        before = [getattr(force, f"get{kind}")() for force, kind, _ in changes]
        try:
            for force, kind, group in changes:
                getattr(force, f"set{kind}")(group)
            yield
        finally:
            for (force, kind, _), group in zip(changes, before, strict=True):
                getattr(force, f"set{kind}")(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForceEngine:
        made = object.__new__(type(self))
        if self._copied:
            made.__setstate__(self.__getstate__())
        else:
            # In a Context of its own of the same System: where the force is, it stays.
            made.__dict__.update(self.__dict__)
            made._last = made._written = None
            made._open()
        return made

    def __getstate__(self) -> dict[str, Any]:
        if not self._copied:
            raise TypeError(
                f"{self._force.getName()}: a force of a plug-in, and one whose function cannot be "
                "pickled, can be copied but not pickled; graft the System again instead"
            )
        state = self.__dict__.copy()
        del state["_context"], state["_force"], state["_lock"]
        state["_system"] = openmm.XmlSerializer.serialize(self._system)
        state["_forgotten"] = forgotten_settings(self._system)
        state["_index"] = index_of(self._system, self._force)
        state["_last"] = state["_written"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        index, forgotten = state.pop("_index"), state.pop("_forgotten")
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._system = openmm.XmlSerializer.deserialize(state["_system"])
        restore_settings(self._system, forgotten)
        self._force = self._system.getForce(index)
        self._open()


def _alone(system: openmm.System, index: int) -> tuple[openmm.System, openmm.Force]:
    """A System with little else than a copy of the force, and the copy."""
    force = known_class(system.getForce(index))
    try:
        if foreign_classes(force):
            raise TypeError(foreign_classes(force))
        copied = openmm.System()
        for i in range(system.getNumParticles()):
            copied.addParticle(system.getParticleMass(i))
        copied.setDefaultPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())
        copied.addForce(faithful_copy(force))
        if isinstance(force, COMPANIONS):
            for other in system.getForces():
                if isinstance(other, COMPANIONS) and _pointer(other) != _pointer(force):
                    copied.addForce(faithful_copy(other))
        for other in copied.getForces():
            other.setForceGroup(_OTHERS)
            if isinstance(other, openmm.NonbondedForce):
                other.setReciprocalSpaceForceGroup(-1)
        return copied, copied.getForce(0)
    except Exception:
        # Such as a function that cannot be pickled: evaluate it where it is, among the others.
        return system, force


def uses_box(force: openmm.Force) -> bool:
    """Whether a force says that it is periodic."""
    try:
        return bool(force.usesPeriodicBoundaryConditions())
    except openmm.OpenMMException:
        # A class that does not say may use the box.
        return False


def _of_ensemble(force: openmm.Force) -> Iterator[str]:
    """Global parameters of a thermostat or barostat: static methods say what they are called."""
    cls = type(force)
    if cls.__name__ in WITHOUT_ENERGY:
        for name in vars(cls):
            if name[0].isupper() and isinstance(vars(cls)[name], staticmethod):
                yield str(getattr(cls, name)())


def index_of(system: openmm.System, force: openmm.Force) -> int:
    """Place of a force in its System."""
    return list(map(_pointer, system.getForces())).index(_pointer(force))


def _pointer(force: openmm.Force) -> int:
    return int(force.this)


def _same(first: Mapping[str, np.ndarray] | None, second: Mapping[str, np.ndarray]) -> bool:
    return first is not None and all(np.array_equal(first[k], v) for k, v in second.items())


def _of_term(values: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _changed(arrays: Arrays, k: int, entry: tuple[int, ...], change: float) -> list[np.ndarray]:
    moved = np.array(arrays[k])
    moved[entry] += change
    return [*arrays[:k], moved, *arrays[k + 1 :]]
