"""Expressions evaluated on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from mdgraft.lepton.program import Program
from mdgraft.lepton.simplify import simplify
from mdgraft.lepton.syntax import Call, Parser, Variable


class Expression:
    """A Lepton expression.

    Parameters
    ----------
    text
        The expression, perhaps with definitions after semicolons.
    variables
        Names that it may use.
    functions
        Number of arguments of each function that the caller supplies, such as tabulated ones; a
        function of the language with the same name is hidden.
    geometry
        Number of arguments of each function of particles or groups, such as ``{"distance": 2}``.
    labels
        What those arguments may be, such as ``("p1", "p2")``.
    where
        What errors call the expression, such as ``"CustomBondForce.energy"``.

    Raises
    ------
    InvalidInputError
        For a syntax error, an unknown name or a wrong number of arguments, as OpenMM does; the
        message quotes the expression and marks the place.
    """

    def __init__(
        self,
        text: str,
        *,
        variables: Iterable[str],
        functions: Mapping[str, int] | None = None,
        geometry: Mapping[str, int] | None = None,
        labels: Iterable[str] = (),
        where: str = "expression",
    ) -> None:
        self.text = text
        parser = Parser(
            text,
            where=where,
            variables=frozenset(variables),
            functions=functions or {},
            geometry=geometry or {},
            labels=frozenset(labels),
        )
        parsed = parser.parse()
        if geometry:
            parser.check_names(parsed)
        root = simplify(parsed)
        # Without geometric functions, OpenMM takes no offence at a name that drops out.
        parser.check_names(root)
        #: What there is to compute.
        self.program = Program(root)
        leaves = self.program.steps
        #: Variables that the value depends on.
        self.variables = frozenset(leaf.name for leaf in leaves if isinstance(leaf, Variable))
        #: Geometric functions that the value depends on.
        self.calls = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Call)))

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __call__(
        self,
        values: Mapping[str, Tensor],
        functions: Mapping[str, Callable[..., Tensor]] | None = None,
        *,
        like: Tensor | None = None,
    ) -> Tensor:
        """Evaluate.

        Parameters
        ----------
        values
            A tensor for each of `variables`, and for the ``key`` of each of `calls`; shapes
            broadcast.
        functions
            The functions that the caller supplies.
        like
            Gives dtype and device if the value is a constant; by default any of ``values``.

        Returns
        -------
        Tensor
            Of the broadcast shape; a constant has shape ``()``.
        """
        result = self.program(values, functions or {})
        if isinstance(result, Tensor):
            return result
        example = like if like is not None else next(iter(values.values()), None)
        if example is None:
            return torch.tensor(result, dtype=torch.float64)
        return torch.full((), result, dtype=example.dtype, device=example.device)
