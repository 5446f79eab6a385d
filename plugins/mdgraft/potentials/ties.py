"""One trainable value for many entries of many parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError


class _Tied(NamedTuple):
    """For each entry of one parameter: whether it is tied, to which scalar, and times what.

    Whole parameters cost less than lists of entries: nothing has to find its place.
    """

    tied: Tensor
    #: A number if all have the same scalar.
    label: Tensor | int
    #: None if all are one.
    factor: Tensor | None


def _joined(parts: Sequence[tuple[int, Tensor, Tensor]], n: int) -> _Tied:
    """What ties make of ``n`` entries, from numbers of scalars, places and factors."""
    _, index, factor = parts[0]
    tied = torch.zeros(n, dtype=torch.bool, device=index.device)
    label, factors = torch.zeros_like(tied, dtype=index.dtype), factor.new_ones(n)
    for number, index, factor in parts:
        tied[index], label[index], factors[index] = True, number, factor
    single = {number for number, _, _ in parts}
    return _Tied(
        tied,
        label if len(single) > 1 else single.pop(),
        None if bool((factors == 1).all()) else factors,
    )


class Ties(nn.Module):
    """Scalars, each of which overrides a chosen set of parameter entries.

    The tied entries become ``factor * scalar``; their own storage keeps its old value and gets
    zero gradient, so the trainable number is ``tied.<label>`` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._members: dict[str, tuple[str, ...]] = {}
        #: Identities of the buffers that entries were joined from, and sizes of parameters; these
        #: buffers; the result.
        self._known: tuple[list[tuple[int, int]], list[Tensor], dict[str, _Tied]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Identities belong to this process and to these tensors.
        return self.__dict__ | {"_known": None}

    def add(self, label: str, value: Tensor, members: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a tie.

        Parameters
        ----------
        label
            Name of the scalar.
        value
            Its initial value, shape ``()``.
        members
            For each full parameter name, flat indices ``(n,)`` and factors ``(n,)``.
        """
        if not label or "." in label or label in self._members:
            raise InvalidInputError(
                f"label: got {label!r}; a tie needs a new name without dots, "
                f"and {sorted(self._members)} are taken"
            )
        self._parameters[label] = nn.Parameter(value.detach().clone())
        self._members[label] = tuple(members)
        self._known = None
        for position, (index, factor) in enumerate(members.values()):
            self._buffers[f"{label}_index_{position}"] = index
            self._buffers[f"{label}_factor_{position}"] = factor

    def only(self, terms: Collection[str]) -> Ties:
        """The ties that reach parameters of these terms or global ones, with the same scalars."""
        part, owners = Ties(), {*terms, "globals"}
        for label, names in self._members.items():
            kept = [i for i, name in enumerate(names) if name.partition(".")[0] in owners]
            if not kept:
                continue
            part._parameters[label] = self._parameters[label]
            part._members[label] = tuple(names[i] for i in kept)
            for position, i in enumerate(kept):
                for kind in ("index", "factor"):
                    buffer = self._buffers[f"{label}_{kind}_{i}"]
                    part._buffers[f"{label}_{kind}_{position}"] = buffer
        return part

    def substitute(
        self, values: Mapping[str, Tensor], scalars: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the values with tied entries replaced, by scalars by label."""
        values = dict(values)
        if not self._members:
            return values
        # In double precision, since a derivative adds up what all entries contribute.
        numbers = torch.stack([scalars[label] for label in self._members]).double()
        for name, tied in self._by_parameter(values).items():
            flat = values[name].reshape(-1)
            if isinstance(tied.label, int):
                # Added up in pairs, and ten times as fast.
                entries = numbers[tied.label].to(flat.dtype)
            else:
                entries = numbers.index_select(0, tied.label)
            if tied.factor is not None:
                entries = entries * tied.factor
            chosen = torch.where(tied.tied, entries.to(flat.dtype), flat)
            values[name] = chosen.reshape(values[name].shape)
        return values

    def _by_parameter(self, values: Mapping[str, Tensor]) -> dict[str, _Tied]:
        """What ties make of each parameter, all together: there may be many ties."""
        buffers = [b for b in self._buffers.values() if b is not None]
        present = [(id(b), 0 if b.is_inference() else b._version) for b in buffers]
        # A call may replace a parameter by one of another size.
        present += [(0, values[n].numel()) for names in self._members.values() for n in names]
        if self._known is None or self._known[0] != present:
            parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
            for number, (label, names) in enumerate(self._members.items()):
                for position, name in enumerate(names):
                    index = self._buffers[f"{label}_index_{position}"]
                    factor = self._buffers[f"{label}_factor_{position}"]
                    assert index is not None and factor is not None
                    parts.setdefault(name, []).append((number, index, factor))
            # What is made in inference mode can take part in no gradient afterwards.
            with torch.inference_mode(False):
                joined = {n: _joined(part, values[n].numel()) for n, part in parts.items()}
            # The buffers themselves keep their identities from being used again.
            self._known = present, buffers, joined
        return self._known[2]

    def members(self) -> dict[str, dict[str, Tensor]]:
        """The flat indices that each tie controls: ``{label: {parameter: (n,)}}``."""
        found: dict[str, dict[str, Tensor]] = {}
        for label, names in self._members.items():
            found[label] = {}
            for position, name in enumerate(names):
                index = self._buffers[f"{label}_index_{position}"]
                assert index is not None
                found[label][name] = index
        return found

    def owner(self, name: str, index: Tensor) -> str | None:
        """The label that already controls one of these entries, if any."""
        for label, members in self.members().items():
            if name in members and bool(torch.isin(index, members[name]).any()):
                return label
        return None
