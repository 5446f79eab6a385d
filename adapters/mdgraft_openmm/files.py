"""Reading a user's own files: serialised Systems, and positions from States or structure files."""

from __future__ import annotations

import html
import math
import re
import xml.parsers.expat
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import openmm.app
from mdgraft import (
    BoxTooSmallError,
    InvalidInputError,
    UnsupportedForceError,
    UntrustedInputError,
)

from mdgraft_openmm._converter import number
from mdgraft_openmm.export.availability import COPIES, load_openmm_torch, torch_force_fault

#: Elements of a serialised System or State in which every attribute is a number.
_NUMERIC = {"A", "B", "C", "Angle", "Bond", "Constraint", "Exception", "Particle", "Position"}
_NUMERIC |= {"Torsion"}
#: Forces whose files hold programs, and how; the search is for their names inside others' too.
_WITH_CODE = {
    "PythonForce": "a pickle",
    "PythonTorchForce": "a pickle",
    "TorchForce": "a TorchScript program",
}
_STRUCTURES = {".cif", ".mmcif", ".pdb", ".pdbx"}


def read_system(path: str | Path, *, trust: bool = False) -> openmm.System:
    """Load a System that ``openmm.XmlSerializer`` wrote.

    Parameters
    ----------
    path
        The XML file.
    trust
        Load files whose deserialisation runs code. A ``PythonForce`` is stored as a pickle, also
        inside of a ``CustomCVForce``, a ``TorchForce`` as a TorchScript program, and plug-ins do
        as they like.

    Returns
    -------
    openmm.System

    Raises
    ------
    InvalidInputError
        If the file is missing, is not well-formed XML, holds a value that is not a number where
        one belongs, or serialises something else than a System.
    UntrustedInputError
        If loading it would run code and ``trust`` is false.
    UnsupportedForceError
        If it holds forces of plug-ins; it lists all of them.
    """
    system = _deserialise("system", path, "System", trust)
    if not isinstance(system, openmm.System):
        raise InvalidInputError(
            f"system: {path} holds a {type(system).__name__}, wanted a System such as "
            f"openmm.XmlSerializer.serialize(system) writes"
        )
    for i in range(system.getNumParticles()):
        mass = number(system.getParticleMass(i))
        if not math.isfinite(mass) or mass < 0:
            raise InvalidInputError(
                f"system: {path} gives particle {i} the mass {mass} Da, wanted zero or more"
            )
    return system


def read_positions(
    path: str | Path, *, n_particles: int | None = None, trust: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Load positions and box vectors from a State or a structure file.

    Parameters
    ----------
    path
        A serialised State (``.xml``), or a ``.pdb`` or ``.cif`` file, whose first model is used.
    n_particles
        The number of particles that the System has, virtual sites included; None accepts any.
    trust
        As in `read_system`.

    Returns
    -------
    positions
        ``(N, 3)`` [nm].
    box
        ``(3, 3)`` box vectors as rows [nm]; None if the file has none.

    Raises
    ------
    InvalidInputError
        If the file is missing, unreadable, serialises something else than a State, holds no
        positions or NaN, or has another number of particles.
    """
    source = _existing("state", path)
    if source.suffix.lower() in _STRUCTURES:
        positions, box = _read_structure(source)
    else:
        positions, box = _read_state(source, trust)
    if n_particles is not None and len(positions) != n_particles:
        raise InvalidInputError(
            f"state: {path} holds {len(positions)} particles, the system {n_particles}; "
            "a structure file must list the virtual sites too"
        )
    if not np.isfinite(positions).all():
        particle, _ = np.argwhere(~np.isfinite(positions))[0]
        raise InvalidInputError(
            f"state: {path} has NaN or infinity at particle {particle}; "
            "write the state again from a simulation that has not blown up"
        )
    return positions, box


def check_box(system: openmm.System, box: np.ndarray) -> None:
    """Raise unless a Context of the System can run in this box.

    Parameters
    ----------
    system
        Its forces say which cutoffs are needed.
    box
        ``(3, 3)`` box vectors as rows [nm].

    Raises
    ------
    InvalidInputError
        If the box holds NaN, is not in reduced form, or is skewed and a force cannot take that.
    BoxTooSmallError
        If a cutoff exceeds half of the smallest diagonal element.
    """
    if not system.usesPeriodicBoundaryConditions():
        return
    diagonal = np.diagonal(box)
    slack = 1e-6 * np.abs(box).max()
    reduced = (
        np.isfinite(box).all()
        and (diagonal > 0).all()
        and (np.abs(np.triu(box, 1)) <= slack).all()
        and (np.abs(box[[1, 2, 2], [0, 0, 1]]) <= 0.5 * diagonal[[0, 0, 1]] + slack).all()
    )
    if not reduced:
        raise InvalidInputError(
            f"box: {box.tolist()} nm is not in reduced form: positive diagonal, nothing above it, "
            "off-diagonal elements of at most half the diagonal element of their column "
            "(openmm.app.internal.unitcell.reducePeriodicBoxVectors reduces a box)"
        )
    smallest, skewed = float(diagonal.min()), bool(np.tril(box, -1).any())
    for force in system.getForces():
        if skewed and _has_plain_ewald(force):
            raise InvalidInputError(
                f"box: {box.tolist()} nm is not rectangular, but {force.getName()} uses the "
                "method Ewald, which OpenMM has for rectangular boxes only; use PME instead"
            )
        cutoff = _periodic_cutoff(force)
        if cutoff is not None and cutoff > 0.5 * smallest:
            raise BoxTooSmallError(
                f"box: {force.getName()} has a cutoff of {cutoff:g} nm, more than half of the "
                f"smallest box length {smallest:g} nm; wanted at least {2 * cutoff:g} nm"
            )


def _has_plain_ewald(force: openmm.Force) -> bool:
    return (
        isinstance(force, openmm.NonbondedForce)
        and force.getNonbondedMethod() == openmm.NonbondedForce.Ewald
    )


def _periodic_cutoff(force: openmm.Force) -> float | None:
    """Return the cutoff [nm] of a periodic force that has one."""
    try:
        if force.usesPeriodicBoundaryConditions():
            return number(force.getCutoffDistance())
    except (AttributeError, openmm.OpenMMException):
        pass  # No cutoff, or the class does not say.
    return None


def _read_state(path: Path, trust: bool) -> tuple[np.ndarray, np.ndarray]:
    state = _deserialise("state", path, "State", trust)
    if not isinstance(state, openmm.State):
        raise InvalidInputError(
            f"state: {path} holds a {type(state).__name__}, wanted a State such as "
            "openmm.XmlSerializer.serialize(context.getState(positions=True)) writes, "
            "or a .pdb or .cif file"
        )
    try:
        positions = state.getPositions(asNumpy=True)
    except openmm.OpenMMException as error:
        raise InvalidInputError(
            f"state: {path} holds no positions; write it with context.getState(positions=True)"
        ) from error
    return np.array(positions._value, float), np.array(
        state.getPeriodicBoxVectors(asNumpy=True)._value, float
    )


def _read_structure(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    reader = openmm.app.PDBFile if path.suffix.lower() == ".pdb" else openmm.app.PDBxFile
    try:
        # The readers leave a file that they opened themselves open when they fail.
        with open(path, encoding="utf-8") as stream:
            structure = reader(stream)
        positions = np.array(structure.getPositions(asNumpy=True)._value, float)
        vectors = structure.topology.getPeriodicBoxVectors()
    # The readers raise whatever their parsing runs into.
    except Exception as error:
        raise InvalidInputError(
            f"state: {path} cannot be read as a structure file ({type(error).__name__}: {error})"
        ) from error
    positions = positions.reshape(-1, 3)
    if not len(positions):
        raise InvalidInputError(f"state: {path} holds no atoms")
    if vectors is None:
        return positions, None
    return positions, np.array([[number(x) for x in row] for row in vectors])


def _existing(argument: str, path: str | Path) -> Path:
    source = Path(path)
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "does not exist"
        raise InvalidInputError(f"{argument}: {path} {what}; wanted a file")
    return source


def _deserialise(argument: str, path: str | Path, wanted: str, trust: bool) -> Any:
    """Deserialise a file after checks that OpenMM's lenient parser leaves out."""
    source = _existing(argument, path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{argument}: {path} cannot be read as UTF-8 text ({error}); wanted the XML of a "
            f"serialised {wanted}"
        ) from error
    if not trust:
        _refuse_code(argument, path, text)
    forces = _inspect(argument, path, text, wanted)
    foreign = sorted(kind for kind in forces if not hasattr(openmm, kind))
    # Plug-ins crash on faulty input, and nothing could be done with their forces anyway.
    if foreign and not trust:
        raise _foreign(argument, path, foreign)
    if trust and not {"TorchForce", "PythonTorchForce"}.isdisjoint(foreign):
        _load_openmm_torch(argument, path)
    try:
        return openmm.XmlSerializer.deserialize(text)
    except (ValueError, openmm.OpenMMException) as error:
        if foreign and "no serialization proxy" in str(error):
            raise _foreign(argument, path, foreign) from error
        raise InvalidInputError(
            f"{argument}: {path} is XML, but not that of a serialised {wanted} ({error})"
        ) from error


def _load_openmm_torch(argument: str, path: str | Path) -> None:
    """Register its classes, unless that would end the process."""
    if fault := torch_force_fault("Reference") or torch_force_fault(COPIES):
        raise UnsupportedForceError(
            f"{argument}: {path} holds a force of openmm-torch, which does not work here: {fault}"
        )
    load_openmm_torch()


def _foreign(argument: str, path: str | Path, kinds: list[str]) -> UnsupportedForceError:
    return UnsupportedForceError(
        f"{argument}: {path} holds {', '.join(kinds)}, which OpenMM {openmm.__version__} does not "
        "have itself; files with forces of plug-ins are not read. Graft the System in Python "
        "instead, where OpenMM evaluates such forces, or remove them from the file"
    )


def _refuse_code(argument: str, path: str | Path, text: str) -> None:
    """Raise if deserialising the text might unpickle something."""
    # OpenMM's parser also decodes character references, so they are decoded before the search.
    decoded = text
    while (again := html.unescape(decoded)) != decoded:
        decoded = again
    for kind, stored in _WITH_CODE.items():
        if kind.lower() in decoded.lower():
            raise UntrustedInputError(
                f"{argument}: {path} mentions a {kind}, which is stored as {stored}: loading it "
                "would run code from that file. Pass --trust (trust=True) if you trust where it "
                "comes from"
            )
    if re.search(r"<!(DOCTYPE|ENTITY)", decoded, re.IGNORECASE):
        raise UntrustedInputError(
            f"{argument}: {path} declares XML entities, which no serialised object needs and which "
            "could hide code; remove them or pass --trust (trust=True)"
        )


def _inspect(argument: str, path: str | Path, text: str, wanted: str) -> set[str]:
    """Check that the XML is complete and its numbers are numbers; return the classes of force."""
    forces: set[str] = set()
    # Whatever the declaration says: OpenMM gets this text as UTF-8.
    parser = xml.parsers.expat.ParserCreate("UTF-8")

    def start(element: str, attributes: dict[str, str]) -> None:
        if element == "Force" and "type" in attributes:
            forces.add(attributes["type"])
        if element not in _NUMERIC:
            return
        for name, value in attributes.items():
            try:
                float(value)
            except ValueError:
                raise InvalidInputError(
                    f"{argument}: {path} line {parser.CurrentLineNumber}: {name}={value!r} of "
                    f"<{element}> is not a number"
                ) from None

    parser.StartElementHandler = start
    try:
        parser.Parse(text.encode(), True)
    except xml.parsers.expat.ExpatError as error:
        raise InvalidInputError(
            f"{argument}: {path} is not well-formed XML ({error}); is it truncated? Wanted a "
            f"serialised {wanted}"
        ) from error
    return forces
