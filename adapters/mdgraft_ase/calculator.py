"""A potential as an ASE calculator."""

# ASE's methods have no annotations.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    PropertyNotImplementedError,
    all_changes,
    external_calculators,
    register_calculator_class,
)
from mdgraft import InvalidInputError, SimulationError, graft
from mdgraft._services import service
from torch import Tensor, nn

from mdgraft_ase._configuration import Configuration, ConfigurationReader, has_volume
from mdgraft_ase._consistency import check_gradients
from mdgraft_ase._energy import EnergyFunction, Evaluation, InASEUnits
from mdgraft_ase._state import Snapshot
from mdgraft_ase._units import EV

#: The name by which ASE knows the calculator.
NAME = "mdgraft"

# Options with which a system is loaded anew.
_LOADING = frozenset({"system", "route", "dtype", "device", "trust"})
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


class MDGraftCalculator(Calculator):
    """An ASE calculator over a differentiable potential.

    Energies [eV], forces [eV/Angstrom] and stress [eV/Angstrom^3, Voigt order, positive under
    tension] by automatic differentiation, in one pass. What the calculator returns has no graph;
    for gradients, call the potential itself.

    The cell may be any cell that ASE has: where the potential wants OpenMM's reduced form, cell
    and positions are rotated and the lattice is reduced, and forces and stress are turned back. The
    potential is evaluated at all positions that Atoms have, inside the cell or not; constraints
    are ASE's business. When a parameter of the potential changes, cached results are dropped.

    Parameters
    ----------
    potential
        A `mdgraft.Potential`; a ``torch.nn.Module`` or other callable ``(positions, box) ->
        energy`` in nm and kJ/mol, whose box is None where Atoms are not periodic; or anything
        that `mdgraft.graft` takes, such as an ``openmm.System``.
    atomic_numbers
        If given, Atoms must have these: a sequence, or an ``openmm.app.Topology``. Zero where
        there is no element. Without it, elements are compared with those that neural terms and
        grafts of ASE's calculators were made for.
    particles
        Which of the potential's particles the Atoms are: None for all of them, ``"real"`` for all
        that are not virtual sites, or their indices. Those left out must be virtual sites, which
        the potential places.
    reduced_cell
        Whether ``potential`` wants boxes in reduced form. A `Potential` knows this itself; a
        callable gets cells as they are, unless this is true.
    system
        Path of a serialised ``openmm.System`` to graft, instead of ``potential``.
    route
        How terms of ``system`` are evaluated; see `mdgraft.graft`.
    dtype
        ``"float64"`` or ``"float32"``: the precision of a ``system``, and of the positions that a
        callable without parameters is given. Potentials and modules have a precision already.
    device
        Where a ``system`` is evaluated, and where such a callable gets its positions.
    trust
        Load a ``system`` whose deserialisation runs code.
    check
        Compare the first forces and the first stress of a callable with differences of its energy,
        at the price of ten evaluations each. A `Potential` needs no such check.
    atoms
        Atoms to attach the calculator to.
    options
        ``label`` and ``directory``, which ASE passes to any calculator and this one ignores.

    Raises
    ------
    InvalidInputError
        If there is nothing to evaluate, or an option makes no sense. Later, in calculations, if
        Atoms do not fit the potential: their number, elements, periodic directions or cell.
    UnsupportedHostError
        If ``potential`` is neither callable nor of a class that an adapter knows.
    UntrustedInputError
        If loading ``system`` would run code and ``trust`` is false.

    Warns
    -----
    NonConservativeForceWarning
        In calculations, if ``check`` finds forces or a stress that do not belong to the energy.
    MDGraftWarning
        If a mesh of Ewald sums was chosen for a box of another shape.
    """

    # ASE wants mutable defaults of these names.
    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012
    default_parameters = {  # noqa: RUF012
        "particles": None,
        "reduced_cell": None,
        "system": None,
        "route": "auto",
        "dtype": None,
        "device": None,
        "trust": False,
        "check": True,
    }
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012
    nolabel = True

    def __init__(
        self,
        potential: Any = None,
        *,
        atomic_numbers: Any = None,
        particles: str | Sequence[int] | None = None,
        reduced_cell: bool | None = None,
        system: str | Path | None = None,
        route: str | Mapping[str, str] = "auto",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust: bool = False,
        check: bool = True,
        atoms: Atoms | None = None,
        **options: Any,
    ) -> None:
        unknown = set(options) - {"label", "directory"}
        if unknown:
            raise InvalidInputError(
                f"options: {sorted(unknown)} are not options of this calculator, which has "
                f"atomic_numbers, {', '.join(self.default_parameters)}"
            )
        if (potential is None) == (system is None):
            got = "neither" if potential is None else "both"
            raise InvalidInputError(
                f"potential: got {got} a potential and a system; wanted one of them: what to "
                "evaluate, or the path of a serialised openmm.System"
            )
        if isinstance(potential, str | Path):
            raise InvalidInputError(
                f"potential: got the path {str(potential)!r}; pass it as system= if it is that of "
                "a serialised openmm.System"
            )
        self._given = potential
        self._function: EnergyFunction | None = None
        self._snapshot: Snapshot | None = None
        self._asked: set[str] = set()
        self._stress_follows = False
        self._atomic_numbers = atomic_numbers
        super().__init__(
            particles=particles,
            reduced_cell=reduced_cell,
            system=system,
            route=route,
            dtype=dtype,
            device=device,
            trust=trust,
            check=check,
        )
        if atoms is not None:
            atoms.calc = self

    # Parameters -------------------------------------------------------------------------------

    def set(self, **changes: Any) -> dict[str, Any]:
        """Change options by ASE's rules: results are dropped, a ``system`` is loaded again.

        Returns the options that changed. Raises as the constructor does, and then changes nothing.
        """
        before = dict(self.parameters)
        unknown = set(changes) - set(self.default_parameters)
        if unknown:
            raise InvalidInputError(
                f"changes: {sorted(unknown)} are not options of this calculator, which has "
                f"{', '.join(self.default_parameters)}"
            )
        changed: dict[str, Any] = super().set(**{k: _option(v) for k, v in changes.items()})
        if self._function is not None and not changed:
            return changed
        try:
            self._build(set(changed))
        except Exception:
            self.parameters.clear()
            self.parameters.update(before)
            raise
        self.reset()
        return changed

    def _build(self, changed: Collection[str]) -> None:
        """What to evaluate and how Atoms are read, by the present options."""
        energy = self._function
        if energy is None or _LOADING.intersection(changed):
            energy = self._load()
        self._reader = ConfigurationReader(
            energy,
            particles=self.parameters["particles"],
            reduced_cell=self.parameters["reduced_cell"],
            atomic_numbers=self._atomic_numbers,
        )
        if energy is not self._function:
            self._checked: set[str] = set()
        self._function = energy
        self._snapshot = None
        self.implemented_properties = [*type(self).implemented_properties]
        if energy.has_particle_energies and self._reader.rows is None:
            self.implemented_properties.append("energies")

    def _load(self) -> EnergyFunction:
        options, host = self.parameters, self._given
        name = options["dtype"]
        if name is not None and name not in _DTYPES:
            raise InvalidInputError(f"dtype: got {name!r}, wanted 'float64' or 'float32'")
        dtype = None if name is None else _DTYPES[name]
        if host is not None and options["system"] is not None:
            raise InvalidInputError(
                "system: the calculator has a potential already; make another one for a system"
            )
        if host is None:
            if options["system"] is None:
                raise InvalidInputError("system: got None, and there is no potential to evaluate")
            read = service("openmm", "system")
            host = read(options["system"], trust=bool(options["trust"]))
        if not callable(host):
            grafted = graft(
                host,
                dtype=dtype or torch.float64,
                device=options["device"] or "cpu",
                route=options["route"],
            )
            return EnergyFunction(grafted)
        if options["route"] != "auto":
            raise InvalidInputError(
                f"route: got {options['route']!r}, but the potential is there already; choose the "
                "route when it is grafted"
            )
        energy = EnergyFunction(host, dtype=dtype, device=options["device"])
        if energy.potential is not None and dtype not in (None, energy.potential.dtype):
            raise InvalidInputError(
                f"dtype: got {dtype}, but the potential computes in {energy.potential.dtype}; "
                "leave dtype out, or convert the potential with .to(dtype)"
            )
        return energy

    @property
    def potential(self) -> Any:
        """What is evaluated: the `Potential`, module or callable."""
        return self._energy.function

    def inputs(self, atoms: Atoms) -> tuple[Tensor, Tensor | None]:
        """Positions ``(N, 3)`` and box ``(3, 3)`` [nm] that the potential is called with.

        For gradients of what ASE computes: ``potential(*calculator.inputs(atoms))`` is the energy
        of these Atoms in kJ/mol, with a graph. Where the potential wants a reduced box, both are
        in its frame; virtual sites that Atoms leave out are at the origin, since the potential
        places them. Raises as a calculation does if Atoms do not fit.
        """
        at = self._reader.read(atoms)
        return self._energy.tensors(at.positions, at.box)

    def as_torch_module(self, atoms: Atoms) -> nn.Module:
        """What is evaluated as a module in Angstrom and eV, by which `mdgraft.graft` unwraps it.

        Raises
        ------
        InvalidInputError
            If it wants reduced boxes, or particles that ``atoms`` do not hold.
        """
        at = self._reader.read(atoms)
        if at.reduced is not None or at.rows is not None:
            raise InvalidInputError(
                "atoms: their cell or particles are not those that the potential is called with; "
                "graft the potential itself, or call it with MDGraftCalculator.inputs(atoms)"
            )
        return InASEUnits(self._energy.function)

    @property
    def _energy(self) -> EnergyFunction:
        assert self._function is not None
        return self._function

    def _get_name(self) -> str:
        return NAME

    # Caching ----------------------------------------------------------------------------------

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; everything, if the potential did."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if not changes and not self._current():
            return list(all_changes)
        return changes

    def _current(self) -> bool:
        return self._snapshot is not None and self._snapshot.current()

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """A property by its name in ASE; a copy, from the cache where nothing has changed."""
        if atoms is None:
            if self.atoms is None:
                raise InvalidInputError(
                    "atoms: got None, and nothing was calculated yet; pass Atoms"
                )
            atoms = self.atoms
        result = super().get_property(name, atoms, allow_calculation)
        if allow_calculation:
            self._asked.add(name)
        return result

    # Calculation ------------------------------------------------------------------------------

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Calculate properties into ``results``, and what comes at no cost with them.

        Forces bring the energy, a stress brings both. Where a stress was asked for after the
        forces at the last configuration, it is computed together with the forces at the next.
        """
        if atoms is not None:
            self.atoms = atoms.copy()
        if self.atoms is None:
            raise InvalidInputError("atoms: got None, and nothing was calculated yet; pass Atoms")
        wanted = set(properties)
        missing = wanted - set(self.implemented_properties)
        if missing:
            raise PropertyNotImplementedError(
                f"{', '.join(sorted(missing))}: not defined for this potential, which has "
                f"{', '.join(self.implemented_properties)}"
            )
        if system_changes or not self._current():
            self.results = {}
            self._stress_follows = "stress" in self._asked
            self._asked = set()
        self._asked |= wanted
        if "stress" in wanted and not has_volume(self.atoms):
            raise PropertyNotImplementedError(
                f"stress: the cell {self.atoms.cell.tolist()} has no volume"
            )
        try:
            self._calculate(self.atoms, wanted)
        finally:
            # Afterwards, since a counter that a function keeps while it runs is no change.
            if not self._current():
                self._snapshot = Snapshot(self._energy.function)

    def _calculate(self, atoms: Atoms, wanted: Collection[str]) -> None:
        forces = "forces" in wanted or "stress" in wanted
        stress = "stress" in wanted or (forces and self._stress_follows and has_volume(atoms))
        at = self._reader.read(atoms)
        self._check(at, {name for name, on in (("forces", forces), ("stress", stress)) if on})
        if forces or "energy" not in self.results:
            found = self._energy.evaluate(at.positions, at.box, forces=forces, strain=stress)
            self._store(at, found)
        if "energies" in wanted:
            try:
                parts = self._energy.particle_energies(at.positions, at.box)
            except InvalidInputError as error:
                # A term may learn only now that its model has none.
                raise PropertyNotImplementedError(f"energies: {error}") from error
            self.results["energies"] = parts / EV

    def _check(self, at: Configuration, wanted: Collection[str]) -> None:
        """Check what is wanted for the first time of a function that is no Potential."""
        new = frozenset(wanted) - self._checked
        if not new or not self.parameters["check"] or self._energy.potential is not None:
            return
        self._checked |= new
        check_gradients(self._energy, at.positions, at.box, strain="stress" in new)

    def _store(self, at: Configuration, found: Evaluation) -> None:
        assert self.atoms is not None
        results: dict[str, Any] = {"energy": found.energy / EV, "free_energy": found.energy / EV}
        if found.gradient is not None:
            results["forces"] = at.forces(found.gradient)
        if found.strain_gradient is not None:
            results["stress"] = at.stress(found.strain_gradient, self.atoms.cell.volume)
        if any(np.isnan(value).any() for value in results.values()):
            raise SimulationError(
                "potential: it gave NaN for these positions; look for atoms on top of each other, "
                "and for the first step at which this happens"
            )
        self.results |= results


def _option(value: Any) -> Any:
    """An option as ASE can write it into a database."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device | Path):
        return str(value)
    if isinstance(value, np.ndarray | torch.Tensor | range | tuple):
        return np.asarray(value).tolist()
    return value


# ASE has no entry point for calculators: names are known once the package is imported.
if NAME not in external_calculators:
    register_calculator_class(NAME, MDGraftCalculator)
