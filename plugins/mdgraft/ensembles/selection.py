"""Which parameters a gradient is asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from mdgraft._errors import InvalidInputError
from mdgraft.potentials import Potential
from mdgraft.potentials.ties import Ties


def select_parameters(potential: Potential, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the parameters that a gradient is taken for, in the potential's order.

    Parameters
    ----------
    potential
        Whose parameters are meant.
    patterns
        Names or shell-style patterns such as ``"NonbondedForce.*"``; frozen parameters may be
        named too. By default every trainable parameter but those of which a tie controls each
        entry, since they have no effect.

    Raises
    ------
    InvalidInputError
        For a pattern without a match, naming what there is.
    """
    named = dict(potential.named_parameters())
    if patterns is None:
        idle = _fully_tied(potential)
        return [name for name, p in named.items() if p.requires_grad and name not in idle]
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise InvalidInputError(
                f"parameters: {pattern!r} matches no parameter; there are {sorted(named)}"
            )
        chosen.update(matches)
    return [name for name in named if name in chosen]


def _fully_tied(potential: Potential) -> set[str]:
    ties = potential._modules.get("tied")
    if not isinstance(ties, Ties):
        return set()
    covered: dict[str, set[int]] = {}
    for members in ties.members().values():
        for name, index in members.items():
            covered.setdefault(name, set()).update(index.tolist())
    named = dict(potential.named_parameters())
    return {name for name, index in covered.items() if len(index) == named[name].numel()}
