"""Writing a potential's parameters back into calculators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
import torch
from mdgraft import InvalidInputError, ParameterMismatchError, Potential
from mdgraft.neural import NeuralTerm
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.module import ModuleTerm
from mdgraft.potentials.atomistic.subset import Subset
from mdgraft.potentials.atomistic.weighted import Weighted
from mdgraft.potentials.external import ExternalTerm
from torch import Tensor

from mdgraft_ase._adapter import WithoutBox, as_host, own_potential
from mdgraft_ase._engine import CalculatorEngine
from mdgraft_ase._parts import Part, is_mixture, parts, sums
from mdgraft_ase._settings import change_setting, forget, like
from mdgraft_ase.forms import form_of
from mdgraft_ase.torch_calculators import model_of


def write_parameters(potential: Potential, atoms_or_calculator: Any) -> None:
    """Write every parameter of a potential, ties included, back into its calculators.

    A value that did not change is left as the calculator has it. Nothing is written if a value is
    not finite or shapes do not match. The calculator forgets its last results.

    Parameters
    ----------
    potential
        A potential grafted from this calculator or from one of the same kind.
    atoms_or_calculator
        ``ase.Atoms`` with the calculator, or the calculator, which has seen its atoms.

    Raises
    ------
    InvalidInputError
        If ``potential`` is not one.
    ParameterMismatchError
        If calculators do not match the terms, a value is not finite, or a calculator has no place
        for it: EMT has one table for all, and weights of sums within sums are products.
    """
    if not isinstance(potential, Potential):
        raise InvalidInputError(
            f"potential: got {type(potential).__name__}, wanted what mdgraft.graft returns"
        )
    atoms, calculator = as_host(atoms_or_calculator)
    own = own_potential(calculator)
    if own is not None:
        _write_own(potential, own)
        forget(calculator)
        return
    summands = parts(calculator, atoms)
    if tuple(summands) != potential.term_names:
        raise ParameterMismatchError(
            f"atoms_or_calculator: has the calculators {list(summands)}, the potential the terms "
            f"{list(potential.term_names)}; write into the calculator that was grafted or a copy"
        )
    values = {name: value.detach() for name, value in potential.values().items()}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ParameterMismatchError(f"{name}: holds NaN or infinity; nothing was written")
    _check_shared(summands, values)
    for write in (False, True):
        for name, part in summands.items():
            own_values = _of(values, name)
            term = potential.term(name)
            if isinstance(term, Weighted) and part.weight is not None:
                weight = own_values["weight"]
                _write_weight(name, calculator, part.calculator, part.weight, weight, write)
                own_values, term = _of(own_values, "term"), term.inner_terms()["term"]
            if isinstance(term, Subset):
                own_values, term = _of(own_values, "term"), term.inner_terms()["term"]
            _write_part(name, part.calculator, part.atoms, term, own_values, write)
    # Sums within sums have results of their own, which would be asked for again.
    for each in (calculator, *sums(calculator)):
        forget(each)


def _of(values: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _check_shared(summands: Mapping[str, Part], values: Mapping[str, Tensor]) -> None:
    """Raise if terms of one and the same calculator have come to differ."""
    first: dict[int, str] = {}
    for name, part in summands.items():
        other = first.setdefault(id(part.calculator), name)
        own, theirs = (_bare(_of(values, key)) for key in (name, other))
        differ = [k for k, v in own.items() if k not in theirs or not torch.equal(v, theirs[k])]
        if differ:
            raise ParameterMismatchError(
                f"{name}.{differ[0]}: differs from that of {other}, but both are one and the same "
                "calculator; tie them, or use two calculators"
            )


def _bare(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A calculator's own parameters, without the weight and the names of wrappers."""
    while any(key.startswith("term.") for key in values):
        values = _of(values, "term")
    return dict(values)


def _write_part(
    name: str,
    calculator: Any,
    atoms: ase.Atoms,
    term: AbstractTerm,
    values: Mapping[str, Tensor],
    write: bool,
) -> None:
    """Check one calculator's values against it, or write them."""
    if isinstance(term, ExternalTerm):
        assert isinstance(term.engine, CalculatorEngine)
        for key, value in values.items():
            parameters = getattr(calculator, "parameters", None) or {}
            if key not in parameters:
                raise ParameterMismatchError(
                    f"{name}.{key}: {type(calculator).__name__} has no such parameter; write into "
                    "the calculator that was grafted or a copy"
                )
            present = parameters[key]
            old = np.asarray(present, dtype=np.float64)
            new = _merged(f"{name}.{key}", old, value)
            if write and not np.array_equal(new, old):
                change_setting(calculator, key, like(present, new))
        return
    if isinstance(term, ModuleTerm | NeuralTerm):
        inner = own_potential(calculator)
        model = inner if inner is not None else model_of(calculator, atoms)
        if model is None:
            raise ParameterMismatchError(
                f"{name}: this {type(calculator).__name__} gives no model to write into; write "
                "into the calculator that was grafted"
            )
        # Names of the model's parameters, without what the term puts in front of them.
        own = _of(values, "model" if isinstance(term, NeuralTerm) else "module")
        if isinstance(term, ModuleTerm) and isinstance(term.module, WithoutBox):
            own = _of(own, "potential")
        _write_module(name, model, own, write)
        if write:
            forget(calculator)
        return
    form = form_of(calculator)
    if form is None:
        raise ParameterMismatchError(
            f"{name}: {type(calculator).__name__} has no torch form; write into the calculator "
            "that was grafted"
        )
    current = {
        key: value.detach().numpy().astype(np.float64)
        for key, value in form.read(calculator, atoms).parameter_values().items()
    }
    if current.keys() != values.keys():
        raise ParameterMismatchError(
            f"{name}: the calculator has the parameters {sorted(current)}, the potential "
            f"{sorted(values)}; write into a calculator with the same options"
        )
    merged = {key: _merged(f"{name}.{key}", old, values[key]) for key, old in current.items()}
    changed = frozenset(k for k, v in merged.items() if not np.array_equal(v, current[k]))
    form.check(calculator, changed)
    if write and changed:
        form.write(calculator, atoms, merged, changed)


def _write_module(
    name: str, model: torch.nn.Module, values: Mapping[str, Tensor], write: bool
) -> None:
    own = dict(model.named_parameters())
    if own.keys() != values.keys():
        raise ParameterMismatchError(
            f"{name}: the model has other parameters than the term, {sorted(own)[:3]}... and "
            f"{sorted(values)[:3]}...; write into the calculator that was grafted"
        )
    for key, value in values.items():
        _same_shape(f"{name}.{key}", tuple(own[key].shape), value)
        if write:
            with torch.no_grad():
                own[key].copy_(value)


def _write_own(potential: Potential, own: Potential) -> None:
    if own is potential:
        return
    new = dict(potential.named_parameters())
    for write in (False, True):
        _write_module("potential", own, {k: v.detach() for k, v in new.items()}, write)


def _write_weight(
    name: str, calculator: Any, part: Any, weight: float, value: Tensor, write: bool
) -> None:
    new = float(_merged(f"{name}.weight", np.asarray(weight), value))
    if new == weight:
        return
    mixer = calculator.mixer if is_mixture(calculator) else None
    members = list(mixer.calcs) if mixer is not None else []
    places = [k for k, member in enumerate(members) if member is part]
    if any(is_mixture(member) for member in members) or len(places) != 1 or mixer is None:
        raise ParameterMismatchError(
            f"{name}.weight: is a product of weights, or its calculator occurs more than once, so "
            "that no single weight can take it; freeze it"
        )
    if write:
        weights = list(mixer.weights)
        weights[places[0]] = new
        mixer.weights = weights


def _merged(name: str, old: np.ndarray, value: Tensor) -> np.ndarray:
    """The new values, except where they equal the old ones in the potential's precision."""
    _same_shape(name, old.shape, value)
    new = value.cpu()
    rounded = torch.tensor(old, dtype=new.dtype)
    return np.where((rounded == new).numpy(), old, new.double().numpy())


def _same_shape(name: str, shape: tuple[int, ...], value: Tensor) -> None:
    if tuple(value.shape) != shape:
        raise ParameterMismatchError(
            f"{name}: the potential has shape {tuple(value.shape)}, the calculator {shape}; write "
            "into the calculator that was grafted or a copy"
        )
