"""Derivatives in global parameters for forces that have none of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import openmm
from mdgraft import InvalidInputError, UnavailableBackendError

from mdgraft_openmm.export.callbacks import ENERGY, python_force
from mdgraft_openmm.export.evaluator import Evaluator
from mdgraft_openmm.export.subset import of_some

#: Names of the variables inside, kept from parameters by their prefix.
_PREFIX = "mdgraft_"
VARIABLE = f"{_PREFIX}energy"
_SLOPE = f"{_PREFIX}slope"
#: A power of two: multiplying and dividing by it rounds nothing. Doubles between 1e-134 and 1e158,
#: and zero, are multiples of its inverse.
_GRID = 2.0**500
#: OpenMM evaluates each variable by a force group of its own.
_MOST_VARIABLES = 32


def with_derivatives(
    evaluator: Evaluator, kind: Any, particles: Sequence[int] | None
) -> openmm.CustomCVForce:
    """A force whose derivatives in global parameters OpenMM reports.

    A ``PythonForce`` has none, but a ``CustomCVForce`` differentiates its expression. In

    ``U + sum_p (p - floor(p K) / K) dU_p``,  K = 2^500

    ``U`` and ``dU_p`` are variables that one evaluation of the module gives. The factor of
    ``dU_p`` is exactly zero, so that it changes neither energy nor forces, and its derivative in
    ``p`` is 1, since that of the floor is 0: OpenMM finds ``dU_p`` for the derivative in ``p``.

    Raises
    ------
    InvalidInputError
        If the name of a parameter cannot stand in the expression.
    UnavailableBackendError
        If there are more parameters than the expression can have.
    """
    if len(evaluator.slopes) >= _MOST_VARIABLES:
        raise UnavailableBackendError(
            f"parameter_derivatives: got {len(evaluator.slopes)} parameters, but OpenMM takes at "
            f"most {_MOST_VARIABLES - 1} for a force that runs Python; name those that are needed, "
            "or pass parameter_derivatives=False"
        )
    for name in evaluator.function.defaults:
        if name.startswith(_PREFIX):
            raise InvalidInputError(
                f"global_parameters: {name!r} begins like a variable inside of the force; use "
                "another name, or pass parameter_derivatives=False"
            )
    terms = [VARIABLE]
    for i, name in enumerate(evaluator.slopes):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise InvalidInputError(
                f"parameter_derivatives: {name!r} cannot stand in an expression of OpenMM; use a "
                "name of letters, digits and underscores, or leave it out of parameter_derivatives"
            )
        terms.append(f"({name}-floor({name}*{_GRID!r})/{_GRID!r})*{_SLOPE}{i}")
    kind_of_sum = of_some(openmm.CustomCVForce) if particles else openmm.CustomCVForce
    force: openmm.CustomCVForce = kind_of_sum("+".join(terms))
    if particles:
        force.last_particle = max(particles)
    force.addCollectiveVariable(VARIABLE, python_force(evaluator, ENERGY, kind, particles))
    for i, name in enumerate(evaluator.slopes):
        slope = python_force(evaluator, name, kind, particles)
        force.addCollectiveVariable(f"{_SLOPE}{i}", slope)
    for name, default in evaluator.function.defaults.items():
        force.addGlobalParameter(name, default)
        if name in evaluator.slopes:
            force.addEnergyParameterDerivative(name)
    return force
