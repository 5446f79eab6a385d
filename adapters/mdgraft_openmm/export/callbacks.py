"""What OpenMM calls: Python functions of a State that can be pickled, copied and found again."""

from __future__ import annotations

import io
import pickle
import re
import sys
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from mdgraft_openmm.export.evaluator import Evaluator
from mdgraft_openmm.export.subset import of_some

#: Role of the callback that gives the energy; the others give slopes in a global parameter.
ENERGY = ""


class Callback:
    """Computation of a ``PythonForce``: energy and forces, or a slope, of a State.

    Parameters
    ----------
    evaluator
        What several callbacks of one force share.
    role
        `ENERGY`, or the name of a global parameter in which the energy is differentiated.
    particles
        Those that the module gets, where OpenMM does not choose them itself; none for all.
    borrowed
        Whether another callback, which lives longer, holds on to the evaluator.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        role: str = ENERGY,
        particles: Sequence[int] = (),
        *,
        borrowed: bool = False,
    ) -> None:
        self._evaluator = weakref.ref(evaluator) if borrowed else lambda: evaluator
        self.role = role
        self.particles = tuple(particles)
        self._rows = np.array(self.particles, dtype=np.intp)

    @property
    def evaluator(self) -> Evaluator:
        """What evaluates the module."""
        found = self._evaluator()
        if found is None:
            raise RuntimeError("this force, or the System that it belongs to, is gone")
        return found

    def __call__(self, state: Any, positions: Any = None) -> tuple[Any, Any]:
        """Energy [kJ/mol] and forces [kJ/mol/nm] of a State.

        A ``PythonTorchForce`` hands over a tensor of positions and gets tensors back.
        """
        try:
            evaluator = self.evaluator
            function = evaluator.function
            values = {}
            if function.defaults:
                parameters = state.getParameters()
                values = {name: parameters[name] for name in function.defaults}
            box = box_of(state) if function.periodic else None
            if positions is not None:
                return self._tensors(positions, box, values)
            positions = everything = positions_of(state)
            if self.particles:
                positions = everything[self._rows]
            if self.role != ENERGY:
                # Its factor is zero, see `with_derivatives`.
                slope = evaluator.slope_of_arrays(self.role, positions, box, values)
                return slope, np.zeros(everything.shape)
            energy, forces = evaluator.energy_and_forces(positions, box, values)
            if self.particles:
                chosen, forces = forces, np.zeros(everything.shape)
                forces[self._rows] = chosen
            return energy, forces
        except Exception as error:
            # OpenMM keeps the text of an exception and drops its type.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def _tensors(
        self, positions: Tensor, box: np.ndarray | None, values: dict[str, float]
    ) -> tuple[Tensor, Tensor]:
        h = None if box is None else torch.from_numpy(box)
        if self.role != ENERGY:
            slope = _finite(self.evaluator.slope(self.role, positions, h, values))
            return slope, torch.zeros_like(positions)
        return self.evaluator.energy_and_forces_of_tensors(positions, h, values)

    def __reduce__(self) -> tuple[Any, ...]:
        token = _token(self.evaluator)
        payload = _payload(self.evaluator) if self.role == ENERGY else None
        return load_callback, (token, self.role, self.particles, payload)


def box_of(state: Any) -> np.ndarray:
    """Box vectors of a State as rows ``(3, 3)`` [nm]."""
    return np.array([(v.x, v.y, v.z) for v in state.getPeriodicBoxVectors()._value])


def _public_positions(state: Any) -> np.ndarray:
    """Positions of a State ``(N, 3)`` [nm]."""
    found: np.ndarray = state.getPositions(asNumpy=True)._value
    return found


def _direct_positions(state: Any) -> np.ndarray:
    """The same without a Quantity around them, which costs as much as all else together."""
    found = np.empty((state._getNumParticles(), 3))
    state._getVectorAsNumpy(_POSITIONS, found)
    return found


_POSITIONS = openmm.State.Positions
positions_of = (
    _direct_positions if hasattr(openmm.State, "_getVectorAsNumpy") else _public_positions
)


def _finite(slope: Tensor) -> Tensor:
    """A slope whose product with zero is zero, so that the energy is right where it is infinite."""
    return torch.nan_to_num(slope.to(torch.float64), nan=sys.float_info.max)


class _Broken:
    """Stands for a callback that could not be loaded; OpenMM itself would crash there."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, *arguments: Any) -> Any:
        raise RuntimeError(self.why)


#: Evaluators of this process by a token that pickles of their callbacks carry.
_LIVE: weakref.WeakValueDictionary[str, Evaluator] = weakref.WeakValueDictionary()
#: Those that files brought along, by the token in the file, with the roles that are taken.
_LOADED: weakref.WeakValueDictionary[str, Evaluator] = weakref.WeakValueDictionary()
_ROLES: weakref.WeakKeyDictionary[Evaluator, set[str]] = weakref.WeakKeyDictionary()


def _token(evaluator: Evaluator) -> str:
    for token, live in _LIVE.items():
        if live is evaluator:
            return token
    token = uuid.uuid4().hex
    _LIVE[token] = evaluator
    return token


def _payload(evaluator: Evaluator) -> bytes | None:
    """The pickled evaluator; an error if there is none, unless OpenMM must make copies."""
    try:
        buffer = io.BytesIO()
        torch.save(evaluator, buffer)
        return buffer.getvalue()
    except Exception:
        # A force inside another one is copied by OpenMM, and then finds the live evaluator.
        if evaluator.slopes:
            return None
        raise


def load_callback(token: str, role: str, particles: tuple[int, ...], payload: bytes | None) -> Any:
    """What a pickled callback becomes.

    A copy that is made in memory shares the evaluator of the original, so that the module is the
    same object; what is read from a file has a module of its own, as it was when it was written.
    """
    asked = _asked_for()
    live = None if asked == _TEXT else _LIVE.get(token)
    if live is not None:
        return Callback(live, role, particles, borrowed=asked == _CONTEXT)
    evaluator = _LOADED.get(token)
    if evaluator is None or role in _ROLES[evaluator]:
        if payload is None:
            return _Broken(
                "this force was written without its module, which cannot be pickled; export it "
                "again with mdgraft_openmm.to_force"
            )
        try:
            # Whoever unpickles this trusts its source, as OpenMM had to.
            where = None if torch.cuda.is_available() else "cpu"
            evaluator = torch.load(io.BytesIO(payload), map_location=where, weights_only=False)
            if where is not None:
                evaluator.move(torch.device(where))
        except Exception as error:
            return _Broken(
                f"the module of this force cannot be loaded ({type(error).__name__}: {error}); "
                "make the code that defines it importable, or export it again with "
                "mdgraft_openmm.to_force"
            )
        _LOADED[token] = evaluator
        _ROLES[evaluator] = set()
    _ROLES[evaluator].add(role)
    return Callback(evaluator, role, particles)


_TEXT, _CONTEXT, _COPY = "text", "context", "copy"
#: What makes a Context from a System, which lives at least as long.
_MAKE_CONTEXTS = {"Context.__init__", "Context.reinitialize", "LocalEnergyMinimizer.minimize"}


def _asked_for() -> str:
    """What OpenMM makes: what a text holds, a Context with its own copies of forces, or a copy.

    OpenMM never lets go of functions of forces that it copies. Those inside of Contexts must not
    keep every module alive for that.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        ("openmm", "mdgraft_openmm.export.callbacks")
    ):
        if frame.f_code.co_name == "deserialize":
            return _TEXT
        if frame.f_code.co_qualname in _MAKE_CONTEXTS:
            return _CONTEXT
        frame = frame.f_back  # type: ignore[assignment]
    return _COPY


# Forces that hold a callback ------------------------------------------------------------------

_HOLDERS: weakref.WeakValueDictionary[int, Callback] = weakref.WeakValueDictionary()


def python_force(
    evaluator: Evaluator, role: str, kind: Any, particles: Sequence[int] | None
) -> Any:
    """A ``PythonForce``, or a ``PythonTorchForce``, that computes by a callback."""
    function = evaluator.function
    chosen = list(particles or ())
    # OpenMM 8.5 has PythonForces of all particles only.
    by_openmm = hasattr(kind, "setParticles")
    callback = Callback(evaluator, role, () if by_openmm else chosen)
    force = (of_some(kind) if chosen else kind)(callback, function.defaults)
    force.setUsesPeriodicBoundaryConditions(function.periodic)
    if chosen:
        force.last_particle = max(chosen)
        if by_openmm:
            force.setParticles(chosen)
    # Nothing but the force holds on to its callback, so the entry goes when the force does.
    _HOLDERS[int(force.this)] = callback
    return force


def particles_of(force: Any, callback: Callback) -> list[int]:
    """Particles that the module of a force gets; none for all."""
    if callback.particles:
        return list(callback.particles)
    return list(force.getParticles()) if hasattr(force, "getParticles") else []


def callback_of(force: Any) -> Callback | None:
    """The callback of a force that `python_force` made, or of a copy of one."""
    found = _HOLDERS.get(int(force.this))
    if found is not None:
        return found
    if not _LIVE:
        return None
    # A copy, or what was read from a file: the pickle inside names the evaluator.
    try:
        text = openmm.XmlSerializer.serialize(force)
    except openmm.OpenMMException:
        return None
    function = re.search(r'\bfunction="([0-9a-f]+)"', text)
    if function is None:
        return None
    pickled = bytes.fromhex(function[1])
    if any(token.encode() in pickled for token in list(_LIVE)):
        # In memory, so that whatever runs when it is loaded has run already.
        found = pickle.loads(pickled)
        return found if isinstance(found, Callback) else None
    return None
