"""mdgraft's neural potentials under the name ``mdgraft`` in OpenMM-ML.

OpenMM-ML finds the factory by its entry point, while it is being imported itself; so it is not
imported here, but when a potential is made. Nothing else of mdgraft needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdgraft_openmm.ml_implementation import MDGraftPotentialImpl


class MDGraftPotentialImplFactory:
    """Makes what ``openmmml.MLPotential("mdgraft", model=...)`` asks for."""

    def createImpl(  # noqa: N802
        self, name: str, *, model: Any = None, **options: Any
    ) -> MDGraftPotentialImpl:
        """Read the model.

        Parameters
        ----------
        name
            ``"mdgraft"``.
        model
            A model of atoms (see `mdgraft.neural.AtomicModel`), a function of positions [nm] and a
            box that returns an energy [kJ/mol], a `Potential`, or the path of a file that
            `MessagePassingNetwork.save` wrote; nothing in such a file is executed.
        **options
            Those of `MDGraftPotentialImpl`: ``dtype`` and ``backend``.

        Raises
        ------
        InvalidInputError
            If there is no model or it is of none of these kinds, or there are other options.
        ImportError
            If OpenMM-ML is not installed.
        """
        try:
            from mdgraft_openmm.ml_implementation import MDGraftPotentialImpl
        except ImportError as error:
            if not str(error.name).startswith("openmmml"):
                raise
            raise ImportError(
                "mdgraft_openmm.ml_potential: OpenMM-ML cannot be imported; install it by "
                "'pip install openmmml', or use mdgraft_openmm.mixed_system, which does without"
            ) from error
        return MDGraftPotentialImpl(model, **options)
