"""Calculators around torch models, unwrapped to the models themselves.

Known by the names of their classes, so that none of their packages is imported here. A calculator
of anyone else's may have a method ``as_torch_module(atoms)``, which returns

- a `torch.nn.Module` that maps positions ``(N, 3)`` [Angstrom] and the cell ``(3, 3)`` [Angstrom],
  None if nothing is periodic, to one energy [eV], differentiably; or
- a model of the kind that `mdgraft.neural.AtomicModel` describes, in units of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import ase
import numpy as np
import torch
from ase import units
from ase.data import atomic_numbers
from mdgraft import Potential
from mdgraft.neural import (
    AtomicInputs,
    AtomicModel,
    CHGNetModel,
    MACEModel,
    MatGLModel,
    ModelUnits,
    NequIPModel,
    NeuralTerm,
    SchNetPackModel,
    SevenNetModel,
    TorchANIModel,
)
from mdgraft.potentials.atomistic.module import ModuleTerm
from torch import Tensor, nn

from mdgraft_ase._engine import CalculatorEngine
from mdgraft_ase._units import ANGSTROM, EV, periods

#: Relative agreement of energy and forces that is asked of a model, by its precision.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3}


class NotUnwrappedError(Exception):
    """Why a calculator is not replaced by its model."""


def unwrapped(
    calculator: Any, atoms: ase.Atoms, dtype: torch.dtype, device: torch.device | str
) -> ModuleTerm | NeuralTerm | None:
    """The model inside a calculator as a term, or None if no model is known to be in it.

    The model is copied, since the calculator's own must stay in its precision, and its parameters
    are trainable.

    Parameters
    ----------
    calculator
        Known by its class, or with a method ``as_torch_module``.
    atoms
        What the model is prepared for, and the structure on which both must agree.
    dtype, device
        Precision in which the term will compute, and where.

    Raises
    ------
    NotUnwrappedError
        If there should be a model but it cannot be taken out, or does not agree.
    """
    module = model_of(calculator, atoms)
    if module is None:
        return None
    try:
        own = copy.deepcopy(module)
        floating = [p for p in own.parameters() if p.is_floating_point()]
        single = any(p.dtype != torch.float64 for p in floating)
        for parameter in floating:
            # Calculators freeze them for speed.
            parameter.requires_grad_(True)
        term = _as_term(own, atoms)
        found = _evaluate(term, atoms, dtype, device)
    except Exception as error:
        raise NotUnwrappedError(
            f"its model does not run by itself in {dtype} on {device} "
            f"({type(error).__name__}: {error})"
        ) from error
    allowed = max(_AGREEMENT[torch.float32 if single else torch.float64], _AGREEMENT[dtype])
    _compare(calculator, atoms, *found, allowed)
    return term


def model_of(calculator: Any, atoms: ase.Atoms) -> nn.Module | None:
    """The calculator's own model, not copied; None if no model is known to be in it.

    Raises
    ------
    NotUnwrappedError
        If there should be one but it cannot be taken out.
    """
    recipe = _recipe(calculator)
    if recipe is None:
        return None
    try:
        module = recipe(calculator, atoms)
    except Exception as error:
        raise NotUnwrappedError(
            f"its model cannot be taken out ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(module, nn.Module):
        raise NotUnwrappedError(
            f"as_torch_module gave {type(module).__name__}, wanted a torch.nn.Module"
        )
    return module


def _as_term(module: nn.Module, atoms: ase.Atoms) -> ModuleTerm | NeuralTerm:
    if isinstance(getattr(module, "units", None), ModelUnits):
        return NeuralTerm(module, [int(z) for z in atoms.numbers], pbc=periods(atoms))
    return ModuleTerm(module, length=ANGSTROM, energy=EV, pbc=periods(atoms))


def _evaluate(
    term: ModuleTerm | NeuralTerm,
    atoms: ase.Atoms,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[float, np.ndarray]:
    """Energy [kJ/mol] and gradient [kJ/mol/nm] by the model."""
    potential = Potential({"model": term}, n_particles=len(atoms)).to(dtype=dtype, device=device)
    x = torch.as_tensor(atoms.positions * ANGSTROM, dtype=dtype, device=device)
    x.requires_grad_(True)
    h = torch.as_tensor(np.asarray(atoms.cell.complete()) * ANGSTROM, dtype=dtype, device=device)
    energy = potential(x, h if term.periodic else None)
    (slope,) = torch.autograd.grad(energy, x)
    return float(energy.detach()), slope.double().cpu().numpy()


def _compare(
    calculator: Any, atoms: ase.Atoms, energy: float, gradient: np.ndarray, allowed: float
) -> None:
    engine = CalculatorEngine(atoms, calculator, settings=())
    h = np.asarray(atoms.cell.complete())[None] * ANGSTROM
    arrays = [atoms.positions[None] * ANGSTROM, h if atoms.pbc.any() else np.zeros((1, 0, 3))]
    wanted = float(engine.energies(arrays)[0])
    slope = engine.gradients(arrays, [True, False])[0]
    assert slope is not None
    scale = max(float(np.abs(slope).max(initial=0.0)), 1.0)
    off = float(np.abs(gradient - slope[0]).max(initial=0.0))
    if not (off <= allowed * scale and abs(energy - wanted) <= allowed * max(abs(wanted), 1.0)):
        raise NotUnwrappedError(
            f"its model differs from it: energies {energy:.10g} and {wanted:.10g} kJ/mol, forces "
            f"by {off:.3g} of {scale:.3g} kJ/mol/nm"
        )


def _recipe(calculator: Any) -> Callable[[Any, ase.Atoms], nn.Module] | None:
    own = getattr(calculator, "as_torch_module", None)
    if callable(own):
        return lambda calculator, atoms: own(atoms)
    for cls in type(calculator).__mro__:
        recipe = _RECIPES.get((cls.__module__.partition(".")[0], cls.__name__))
        if recipe is not None:
            return recipe
    return None


class _Mean(AtomicModel):
    """The mean of several models, as a committee's energy is."""

    def __init__(self, models: list[AtomicModel]) -> None:
        first = models[0]
        super().__init__(cutoff=first.cutoff, units=first.units, elements=first.elements)
        self.models = nn.ModuleList(models)

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of frames ``(F,)``."""
        energies = [model(inputs).reshape(-1) for model in self.models]
        return torch.stack(
            [e if e.shape[0] == inputs.n_frames else inputs.per_frame(e) for e in energies]
        ).mean(dim=0)


def _mace(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    sizes = ModelUnits(
        ANGSTROM * float(calculator.length_units_to_A), EV * float(calculator.energy_units_to_eV)
    )
    heads = getattr(calculator, "available_heads", None) or ["default"]
    head = calculator.head if len(heads) > 1 else 0
    models = [MACEModel(model, units=sizes, head=head) for model in calculator.models]
    return models[0] if len(models) == 1 else _Mean(list(models))


def _torchani(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    return TorchANIModel(calculator.model, units=ModelUnits(ANGSTROM, EV * units.Hartree))


def _nequip(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    names = calculator.model.metadata["type_names"]
    symbols = names.split() if isinstance(names, str) else list(names)
    return NequIPModel(
        calculator.model,
        # Types that are no elements end here, and the calculator is left to the host.
        [atomic_numbers[symbol] for symbol in symbols],
        units=ModelUnits(
            ANGSTROM * float(calculator.length_units_to_A),
            EV * float(calculator.energy_units_to_eV),
        ),
    )


def _schnetpack(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    return SchNetPackModel(
        calculator.model,
        units=ModelUnits(ANGSTROM, EV * float(calculator.property_units["energy"])),
        energy=calculator.property_map["energy"],
    )


def _chgnet(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    # As the calculator does itself before it computes anything.
    calculator.model.eval()
    return CHGNetModel(calculator.model)


def _matgl(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    # What its last evaluation left has a graph, and cannot be copied.
    calculator.potential.model.feature_dict = {}
    symbols = calculator.potential.model.element_types
    return MatGLModel(calculator.potential, [atomic_numbers[symbol] for symbol in symbols])


def _sevennet(calculator: Any, atoms: ase.Atoms) -> nn.Module:
    return SevenNetModel(calculator.model, modal=calculator.modal)


#: How the model is taken out, by package and class of the calculator.
_RECIPES: dict[tuple[str, str], Callable[[Any, ase.Atoms], nn.Module]] = {
    ("chgnet", "CHGNetCalculator"): _chgnet,
    ("mace", "MACECalculator"): _mace,
    ("matgl", "PESCalculator"): _matgl,
    ("torchani", "Calculator"): _torchani,
    ("nequip", "NequIPCalculator"): _nequip,
    ("schnetpack", "SpkCalculator"): _schnetpack,
    ("sevenn", "SevenNetCalculator"): _sevennet,
}
