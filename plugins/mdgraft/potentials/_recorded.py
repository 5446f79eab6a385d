"""Recorded evaluations of a potential, and what decides what its modules compute.

A recording holds as long as nothing changes but positions, box and parameters; see
`mdgraft.kernels.device.replay`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from mdgraft.kernels.device.replay import Session
from mdgraft.potentials._inputs import check_frames

if TYPE_CHECKING:
    from mdgraft.potentials.potential import Potential


def session_of(
    potential: Potential,
    frames: Tensor,
    cells: Tensor | None,
    seen: Callable[[Tensor], Tensor],
) -> Session | None:
    """A recorded evaluation of a single frame, if there is one.

    Parameters are taken as ``seen`` returns them.
    """
    found = _state(potential)
    if found is None:
        return None
    own, held, key = found
    box = frames.new_empty(0, 3, 3) if cells is None else cells
    inputs = (frames, box, *map(seen, own))

    def energy(tensors: Sequence[Tensor]) -> Tensor:
        x, h, *parameters = tensors
        names = [name for name, _ in potential.named_parameters()]
        values = potential.values(dict(zip(names, parameters, strict=True)))
        by_term = potential.energy_by_term(x, None if cells is None else h, values=values)
        return torch.stack(list(by_term.values())).sum(dim=0)

    def check(tensors: Sequence[Tensor]) -> None:
        box = None if cells is None else tensors[1]
        check_frames(tensors[0], box, reduced=not potential.general_cell)

    needed = [torch.is_grad_enabled() and t.requires_grad for t in inputs]
    key = (potential.term_names, potential.n_particles, *key)
    return potential._replays.session(energy, check, inputs, needed, key, held)


def _state(
    potential: nn.Module,
) -> tuple[list[Tensor], list[object], tuple[Hashable, ...]] | None:
    """What may be recorded of the modules in a potential, and when it holds.

    Returns
    -------
    tuple or None
        Their parameters, each once, in the order of `torch.nn.Module.parameters`; modules and
        buffers; a key that stays equal as long as these are kept and only parameters change. None
        if they may do something else at any time.
    """
    any_hook: Any = torch_modules._has_any_global_hook
    if any_hook() or potential._parameters or potential._buffers:
        return None
    own: dict[int, Tensor] = {}
    slots: list[int] = []
    held: list[object] = []
    marks: list[Hashable] = []
    for part in _parts(potential)[1:]:
        kind: Any = type(part)
        if not _says_so(kind) or (
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
        ):
            return None
        held.append(part)
        marks += (id(part), part.training, part.__dict__.get("_changes"))
        for parameter in part._parameters.values():
            if parameter is not None:
                slots.append(id(parameter))
                own[id(parameter)] = parameter
        for buffer in part._buffers.values():
            if buffer is not None:
                if buffer.is_inference():
                    return None
                held.append(buffer)
                marks += (id(buffer), buffer._version)
    order = {identity: n for n, identity in enumerate(own)}
    shared = () if len(own) == len(slots) else tuple(order[slot] for slot in slots)
    return list(own.values()), held, (*marks, shared)


def _parts(module: nn.Module) -> list[nn.Module]:
    """What `torch.nn.Module.modules` finds, several times faster."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if id(part) not in found:
            found[id(part)] = part
            waiting.extend(m for m in reversed(part._modules.values()) if m is not None)
    return list(found.values())


@functools.lru_cache(maxsize=512)
def _says_so(kind: Any) -> bool:
    """Whether a class `replays`; what a user derives from one has to say so again."""
    for known in kind.__mro__:
        if "replays" in vars(known):
            return bool(vars(known)["replays"])
        package = known.__module__.partition(".")[0]
        if package != "mdgraft":
            return bool(package == "torch")
    return False
