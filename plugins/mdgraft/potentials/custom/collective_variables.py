"""An expression of collective variables, each of which is a term itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mdgraft.lepton import Expression
from mdgraft.potentials.custom.base import AbstractCustomTerm, Tables, parameter_keys
from mdgraft.potentials.custom.bonds import per_frame
from mdgraft.potentials.term import AbstractTerm


class CollectiveVariables(AbstractCustomTerm):
    """An expression of the energies of other terms.

    Parameters
    ----------
    energy
        Expression [kJ/mol] of the variables and of global parameters.
    variables
        Terms by the names that the expression gives them. Their parameters become
        ``<variable>.<parameter>``; global parameters are shared.
    global_names
        Global parameters that the expression may use.
    tables
        Tabulated functions.
    where
        What errors call the expression.

    Raises
    ------
    InvalidInputError
        If the expression is one that OpenMM refuses.
    """

    def __init__(
        self,
        energy: str,
        variables: Mapping[str, AbstractTerm],
        *,
        global_names: Sequence[str] = (),
        tables: Tables | None = None,
        where: str = "energy",
    ) -> None:
        periodic = any(term.periodic for term in variables.values())
        super().__init__({}, global_names=global_names, tables=tables, periodic=periodic)
        self.variable_keys = dict(zip(variables, parameter_keys([*variables]), strict=True))
        for name, term in variables.items():
            self.add_term(self.variable_keys[name], term)
        self.energy = Expression(
            energy, variables=(*variables, *global_names), functions=self.arities, where=where
        )

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        variables = self.shared_values(global_values)
        terms = self.inner_terms()
        for name, key in self.variable_keys.items():
            if name in self.energy.variables:
                variables[name] = terms[key](
                    positions,
                    box if terms[key].periodic else None,
                    self.inner_values(key, values),
                    global_values,
                )
        energies = self.energy(variables, self.functions(values), like=positions)
        example = positions.sum(dim=-1)[:, :1]
        return per_frame(self, energies.reshape(-1, 1), example, values)
