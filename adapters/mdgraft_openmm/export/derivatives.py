"""Derivatives in global parameters for forces that have none of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import openmm
from mdgraft import InvalidInputError

from mdgraft_openmm.export.callbacks import ENERGY, python_force
from mdgraft_openmm.export.evaluator import Evaluator

#: Names of the variables inside: unlikely as names of parameters.
VARIABLE = "mdgraft_energy"
_SLOPE = "mdgraft_slope"
#: A power of two: multiplying and dividing by it rounds nothing.
_GRID = 2.0**60


def with_derivatives(
    evaluator: Evaluator, kind: Any, particles: Sequence[int] | None
) -> openmm.CustomCVForce:
    """A force whose derivatives in global parameters OpenMM reports.

    A ``PythonForce`` has none, but a ``CustomCVForce`` differentiates its expression. In

    ``U + sum_p (p - floor(p K) / K) dU_p``,  K = 2^60

    ``U`` and ``dU_p`` are variables that one evaluation of the module gives. The factor of
    ``dU_p`` is below 1e-18, so that it changes neither energy nor forces, and its derivative in
    ``p`` is 1, since that of the floor is 0: OpenMM finds ``dU_p`` for the derivative in ``p``.
    """
    terms = [VARIABLE]
    for i, name in enumerate(evaluator.slopes):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise InvalidInputError(
                f"parameter_derivatives: {name!r} cannot stand in an expression of OpenMM; use a "
                "name of letters, digits and underscores"
            )
        terms.append(f"({name}-floor({name}*{_GRID:.0f})/{_GRID:.0f})*{_SLOPE}{i}")
    force = openmm.CustomCVForce("+".join(terms))
    force.addCollectiveVariable(VARIABLE, python_force(evaluator, ENERGY, kind, particles))
    for i, name in enumerate(evaluator.slopes):
        slope = python_force(evaluator, name, kind, particles)
        force.addCollectiveVariable(f"{_SLOPE}{i}", slope)
    for name, default in evaluator.function.defaults.items():
        force.addGlobalParameter(name, default)
        if name in evaluator.slopes:
            force.addEnergyParameterDerivative(name)
    return force
