"""The potential: a named sum of terms."""

from __future__ import annotations

import copy
import fnmatch
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from mdgraft._errors import InvalidInputError
from mdgraft._types import BoxLike, PositionsLike
from mdgraft.kernels.device.recording import recorder, side_by_side
from mdgraft.kernels.device.replay import Replays, Session, may_replay
from mdgraft.kernels.mapped import mapped_energy
from mdgraft.kernels.pieces import collecting
from mdgraft.kernels.switch import on_device, under_transform
from mdgraft.potentials._inputs import as_frames, check_frames
from mdgraft.potentials._recorded import session_of
from mdgraft.potentials.held import Held
from mdgraft.potentials.term import AbstractTerm
from mdgraft.potentials.ties import Ties


class _Globals(nn.Module):
    """Scalars that terms share by name, as the host's global parameters are."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            if not name or "." in name:
                raise InvalidInputError(
                    f"global_parameters: {name!r} cannot name one; a dot separates modules, "
                    "so replace it by an underscore"
                )
            # Hosts allow names that nn.Module reserves, such as "training".
            self._parameters[name] = nn.Parameter(value)


class Potential(nn.Module):
    """Potential energy as a differentiable function of positions, box and parameters.

    A named sum of terms, one for each force of the host. Parameters appear in
    `named_parameters` as ``<term>.<name>``, global ones as ``globals.<name>``, tied ones as
    ``tied.<label>``. Energies are in kJ/mol, lengths in nm. Batches of frames, derivatives of
    every order, ``torch.func`` transforms, ``to`` and ``state_dict`` work as for any module.

    Parameters
    ----------
    terms
        Energy terms by name.
    n_particles
        Number of particles N, virtual sites included.
    global_parameters
        Initial values of the global parameters by name, each of shape ``()``.
    sites
        A module that maps ``(positions, box)`` to positions in which virtual sites are placed by
        their parents; None when there are none.
    routes
        How each term is evaluated, ``"native"`` or ``"host"``.
    """

    #: ``{"NonbondedForce": "native", ...}``: how each term is evaluated.
    routes: dict[str, str]
    #: ``{"NonbondedForce.charge": "elementary charge", ...}``: the unit of each parameter.
    units: dict[str, str]
    #: Distances and particles that the host holds fixed, which energies know nothing of, or None.
    held: Held | None = None

    def __init__(
        self,
        terms: Mapping[str, AbstractTerm],
        *,
        n_particles: int,
        global_parameters: Mapping[str, Tensor] | None = None,
        sites: nn.Module | None = None,
        routes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.n_particles = n_particles
        self.term_names = tuple(terms)
        for name, term in terms.items():
            if is_reserved(name):
                raise InvalidInputError(f"terms: {name!r} is not free as the name of a term")
            self.add_module(name, term)
        self._modules["globals"] = _Globals(global_parameters or {})
        self._modules["tied"] = Ties()
        self._modules["sites"] = sites
        self.routes = dict(routes) if routes else dict.fromkeys(terms, "native")
        self._replays = Replays()
        self.units = {
            f"{name}.{parameter}": unit
            for name, term in terms.items()
            for parameter, unit in term.units.items()
        } | {f"globals.{name}": "dimensionless" for name in global_parameters or {}}

    # Evaluation -------------------------------------------------------------------------------

    def forward(self, positions: PositionsLike, box: BoxLike = None) -> Tensor:
        """Total energy.

        Parameters
        ----------
        positions
            ``(..., N, 3)`` [nm]. Rows of virtual sites are recomputed from their parents.
        box
            ``(..., 3, 3)`` box vectors as rows [nm], broadcast over frames. Required when
            `periodic`. In reduced form, unless `general_cell` is true.

        Returns
        -------
        Tensor
            ``(...,)`` [kJ/mol].

        Raises
        ------
        InvalidInputError
            For a wrong shape, NaN, or a box that is missing, too small or not in reduced form.
        """
        if on_device(self._like):
            frames, cells, leading = as_frames(self, positions, box)
            session = self._session(frames, cells, lambda p: p)
            if session is not None:
                return session.energy().reshape(leading)
        energies = list(self.energy_by_term(positions, box).values())
        if energies:
            return torch.stack(energies).sum(dim=0)
        frames, _, leading = as_frames(self, positions, box)
        return frames.new_zeros(leading) + 0.0 * frames.sum(dim=(-2, -1)).reshape(leading)

    def energy_by_term(
        self,
        positions: PositionsLike,
        box: BoxLike = None,
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Energy of each term by name, each ``(...,)`` [kJ/mol].

        Arguments are those of `forward`; ``values``, as `values` returns them, replace the
        potential's own parameters.
        """
        frames, cells, leading = as_frames(self, positions, box)
        recording = recorder(frames)
        if recording is None:
            check_frames(frames, cells, reduced=not self.general_cell)
        else:
            recording.require_checked(frames, cells)
        sites = self._modules["sites"]
        if sites is not None:
            frames = sites(frames, cells)
        values = self.values() if values is None else values
        global_values = {
            name.removeprefix("globals."): value
            for name, value in values.items()
            if name.startswith("globals.")
        }
        implied = collecting() or recording is not None

        def energy_of(name: str) -> Tensor:
            term = self.term(name)
            own = {key: values[f"{name}.{key}"] for key in term.parameter_values()}
            for other in term.borrows:
                keys = (f"{other}.{key}" for key in self.term(other).parameter_values())
                own |= {key: values[key] for key in keys}
            box_of_term = cells if term.periodic else None
            if collecting() and not term.collects:
                energy = _mapped(term, frames, box_of_term, own, global_values)
            else:
                energy = term(frames, box_of_term, own, global_values)
            # What a term happens not to use has zero derivatives, not missing ones.
            unused = () if implied else (*own.values(), *global_values.values())
            for value in unused:
                energy = energy + value.reshape(-1)[:0].sum()
            return energy.reshape(leading)

        parts = [functools.partial(energy_of, name) for name in self.term_names]
        made = (t for t in (frames, cells, *values.values()) if t is not None)
        return dict(zip(self.term_names, side_by_side(frames, parts, made), strict=True))

    def forces(self, positions: PositionsLike, box: BoxLike = None) -> Tensor:
        """Forces ``(..., N, 3)`` [kJ/mol/nm], themselves differentiable; zero on virtual sites.

        Under ``torch.no_grad()`` no graph is kept.
        """
        frames, cells, leading = as_frames(self, positions, box)
        # Some versions of torch leave `unpack_dual` without types.
        unpack: Any = unpack_dual
        moving = any(t is not None and unpack(t).tangent is not None for t in (frames, cells))
        if moving or under_transform() or torch.is_inference_mode_enabled():
            gradient: Tensor = torch.func.grad(lambda x: self(x, cells).sum())(frames)
        else:
            gradient = self._gradient(frames, cells)
        return -gradient.reshape(*leading, self.n_particles, 3)

    def _gradient(self, frames: Tensor, cells: Tensor | None) -> Tensor:
        """What `torch.func.grad` finds, which takes three times as long."""
        inputs = (frames, cells, *self.parameters())
        session: Session | None = None
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        with torch.enable_grad():
            # The box may itself depend on the positions, but this is a partial derivative.
            x = frames.view_as(frames) if keep and frames.requires_grad else frames.detach()
            if not x.requires_grad:
                x.requires_grad_()
            if on_device(x):
                # Views are nodes that tell whether a backward pass is about parameters.
                seen = (lambda p: p.view_as(p)) if keep else torch.Tensor.detach
                session = self._session(x, cells, seen)
                if session is not None and not keep:
                    return list(session.first().views())[1]
            if session is not None:
                total = session.energy().sum()
            else:
                values = None if keep else self.values({})
                energies = list(self.energy_by_term(x, cells, values=values).values())
                if not energies:
                    return torch.zeros_like(frames)
                total = torch.stack(energies).sum()
            (gradient,) = torch.autograd.grad(
                total, x, create_graph=keep, allow_unused=True, materialize_grads=True
            )
        return gradient

    def _session(
        self, frames: Tensor, cells: Tensor | None, seen: Callable[[Tensor], Tensor]
    ) -> Session | None:
        """A recorded evaluation of a single frame, if there is one.

        Parameters are taken as ``seen`` returns them.
        """
        kind: Any = type(self)
        if not (self.term_names and may_replay(frames) and _is_plain(kind)):
            return None
        return session_of(self, frames, cells, seen)

    # Structure --------------------------------------------------------------------------------

    def term(self, name: str) -> AbstractTerm:
        """The term of this name."""
        term = self._modules.get(name) if name in self.term_names else None
        if not isinstance(term, AbstractTerm):
            raise InvalidInputError(f"name: no term {name!r}; there are {list(self.term_names)}")
        return term

    @property
    def periodic(self) -> bool:
        """Whether a box is needed."""
        needs_box = bool(getattr(self._modules["sites"], "periodic", False))
        return needs_box or any(self.term(name).periodic for name in self.term_names)

    @property
    def general_cell(self) -> bool:
        """Whether any cell with a volume will do, rather than OpenMM's reduced form alone."""
        periodic = [self.term(name) for name in self.term_names if self.term(name).periodic]
        sites = bool(getattr(self._modules["sites"], "periodic", False))
        return not sites and all(term.general_cell for term in periodic)

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        return all(self.term(name).framewise for name in self.term_names)

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which energies are computed."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where energies are computed."""
        return self._like.device

    @property
    def _like(self) -> Tensor:
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0, dtype=torch.float64)

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by the name that `named_parameters` gives it."""
        *owners, name = target.split(".")
        found: nn.Module | None = self
        for owner in owners:
            # A term may have something else of that name.
            found = None if found is None else found._modules.get(owner)
        parameter = None if found is None else found._parameters.get(name)
        return super().get_parameter(target) if parameter is None else parameter

    def values(self, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every parameter by name as the terms see it, with ties applied.

        Parameters
        ----------
        replaced
            Values that replace parameters, by the names of `named_parameters`; all others are then
            constants of differentiation. The potential itself does not change.
        """
        # Terms may share a parameter, which then has the name that it has in the first of them.
        names = {} if replaced is None else {id(p): name for name, p in self.named_parameters()}

        def of(name: str, parameter: Tensor) -> Tensor:
            if replaced is None:
                return parameter
            if name not in replaced:
                name = names.get(id(parameter), name)
            return replaced.get(name, parameter.detach())

        values = {
            f"{name}.{key}": of(f"{name}.{key}", value)
            for name in self.term_names
            for key, value in self.term(name).parameter_values().items()
        }
        shared = self._modules["globals"]
        assert shared is not None
        for key, parameter in shared._parameters.items():
            if parameter is not None:
                values[f"globals.{key}"] = of(f"globals.{key}", parameter)
        ties = self._modules["tied"]
        assert isinstance(ties, Ties)
        scalars = {
            label: of(f"tied.{label}", scalar)
            for label, scalar in ties._parameters.items()
            if scalar is not None
        }
        return ties.substitute(values, scalars)

    # Selection --------------------------------------------------------------------------------

    def only(self, *patterns: str) -> Potential:
        """The potential of some terms alone.

        Parameters
        ----------
        patterns
            Shell-style patterns of term names. Terms whose parameters a chosen one borrows come
            along.

        Returns
        -------
        Potential
            Shares parameters, ties, global parameters and virtual sites with this one.

        Raises
        ------
        InvalidInputError
            For a pattern without a match.
        """
        names: set[str] = set()
        for pattern in patterns:
            matches = fnmatch.filter(self.term_names, pattern)
            if not matches:
                raise InvalidInputError(
                    f"patterns: {pattern!r} matches no term; there are {list(self.term_names)}"
                )
            names.update(matches)
        names |= {other for name in names for other in self.term(name).borrows}
        part = copy.copy(self)
        part._replays = Replays()
        part.term_names = tuple(name for name in self.term_names if name in names)
        ties = self._modules["tied"]
        assert isinstance(ties, Ties)
        ties = ties.only(part.term_names)
        kept = {k: v for k, v in self._modules.items() if k not in self.term_names or k in names}
        part._modules = kept | {"tied": ties}
        part.routes = {name: self.routes[name] for name in part.term_names}
        tied = {f"tied.{label}" for label in ties.members()}
        part.units = {
            key: unit
            for key, unit in self.units.items()
            if key in tied or key.partition(".")[0] in {*names, "globals"}
        }
        return part

    def freeze(self, *patterns: str) -> Potential:
        """Make the parameters that match a shell-style pattern constant.

        ``potential.freeze("*")`` freezes all, ``potential.freeze("NonbondedForce.*")`` one term.
        Returns the potential itself; raises `InvalidInputError` for a pattern without a match.
        """
        return self._set_trainable(patterns, False)

    def unfreeze(self, *patterns: str) -> Potential:
        """Make the parameters that match a shell-style pattern trainable; see `freeze`."""
        return self._set_trainable(patterns, True)

    def _set_trainable(self, patterns: Sequence[str], trainable: bool) -> Potential:
        named = dict(self.named_parameters())
        for pattern in patterns:
            matches = fnmatch.filter(named, pattern)
            if not matches:
                raise InvalidInputError(
                    f"patterns: {pattern!r} matches no parameter; there are {sorted(named)}"
                )
            for name in matches:
                named[name].requires_grad_(trainable)
        return self

    def tie(
        self, label: str, members: Mapping[str, Any], *, value: float | Tensor | None = None
    ) -> Potential:
        """Give many parameter entries one trainable value, ``tied.<label>``.

        Parameters
        ----------
        label
            Name of the new value.
        members
            For each parameter name, which entries are tied: ``None`` or ``...`` for all of them, a
            boolean mask of the parameter's shape, flat indices, or a pair ``(selection,
            factors)`` when entries are multiples of the value.
        value
            The initial value; by default the present value of the entries, which must agree.

        Returns
        -------
        Potential
            Itself. Energies, gradients, `values` and write-back all use the tied value.

        Raises
        ------
        InvalidInputError
            For an unknown name, a selection that makes no sense, an entry that is tied already,
            a value that is not one finite number, or entries that differ when no value is given.
        """
        current = self.values()
        resolved: dict[str, tuple[Tensor, Tensor]] = {}
        unit, present = None, []
        ties = self._modules["tied"]
        assert isinstance(ties, Ties)
        for name, selection in members.items():
            if name not in current:
                raise InvalidInputError(
                    f"members: no parameter {name!r}; there are {sorted(current)}"
                )
            index, factor = _selection(name, selection, current[name])
            owner = ties.owner(name, index)
            if owner is not None:
                raise InvalidInputError(
                    f"members: some entries of {name!r} are already tied as {owner!r}"
                )
            resolved[name] = (index, factor)
            unit = unit or self.units[name]
            present.append(current[name].detach().reshape(-1)[index] / factor)
        if not present or not sum(len(entries) for entries in present):
            raise InvalidInputError("members: no entry is selected")
        entries = torch.cat(present)
        if value is None:
            if not torch.allclose(entries, entries[0].expand_as(entries), rtol=1e-9, atol=0.0):
                raise InvalidInputError(
                    f"value: the tied entries differ (from {entries.min().item():g} to "
                    f"{entries.max().item():g}); pass value= to say what they become"
                )
            value = entries[0]
        initial = torch.as_tensor(value, dtype=entries.dtype, device=entries.device)
        if initial.numel() != 1 or not bool(torch.isfinite(initial).all()):
            raise InvalidInputError(f"value: got {value!r}, wanted one finite number")
        initial = initial.reshape(())
        ties.add(label, initial, resolved)
        self.units[f"tied.{label}"] = unit or ""
        return self


@functools.lru_cache(maxsize=512)
def _is_plain(kind: Any) -> bool:
    """Whether a class of potentials adds nothing to what `Potential` evaluates."""
    names = ("energy_by_term", "values", "term", "general_cell", "periodic")
    return all(getattr(kind, name) is getattr(Potential, name) for name in names)


def is_reserved(name: str) -> bool:
    """Whether a Potential has a use of its own for this name, so that no term may have it."""
    return not name or "." in name or name in _ATTRIBUTES or hasattr(Potential, name)


#: What a Potential and every module store under a name of their own.
_ATTRIBUTES = frozenset(vars(nn.Module())) | {
    "_replays",
    "globals",
    "n_particles",
    "routes",
    "sites",
    "term_names",
    "tied",
    "units",
}


def _mapped(
    term: AbstractTerm,
    frames: Tensor,
    box: Tensor | None,
    own: Mapping[str, Tensor],
    global_values: Mapping[str, Tensor],
) -> Tensor:
    """A term whose derivatives in every frame `torch.vmap` finds."""

    def energy(x: Tensor, h: Tensor | None, *parameters: Tensor) -> Tensor:
        values = dict(zip(own, parameters, strict=False))
        shared = dict(zip(global_values, parameters[len(own) :], strict=True))
        result: Tensor = term(x, h, values, shared)
        return result

    return mapped_energy(energy, frames, box, [*own.values(), *global_values.values()])


def _selection(name: str, selection: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices and factors of a selection of entries."""
    factors: Any = 1.0
    if isinstance(selection, tuple):
        selection, factors = selection
    if selection is None or selection is ...:
        index = torch.arange(values.numel(), device=values.device)
    else:
        try:
            chosen = torch.as_tensor(selection, device=values.device)
        except (TypeError, ValueError, RuntimeError):
            chosen = values
        if chosen.is_floating_point() and chosen.numel():
            raise InvalidInputError(
                f"members[{name!r}]: got {selection!r}, wanted None, ..., a boolean mask, flat "
                "indices, or a pair (selection, factors)"
            )
        if chosen.dtype == torch.bool:
            if chosen.shape != values.shape:
                raise InvalidInputError(
                    f"members[{name!r}]: the mask has shape {tuple(chosen.shape)}, "
                    f"the parameter {tuple(values.shape)}"
                )
            index = chosen.reshape(-1).nonzero().squeeze(-1)
        else:
            index = chosen.reshape(-1).long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < values.numel():
        raise InvalidInputError(
            f"members[{name!r}]: indices reach from {int(index.min())} to {int(index.max())}, "
            f"the parameter has {values.numel()} entries"
        )
    if len(torch.unique(index)) != len(index):
        raise InvalidInputError(f"members[{name!r}]: an entry is selected more than once")
    factor = torch.as_tensor(factors, dtype=values.dtype, device=values.device)
    if factor.shape not in ((), (1,), index.shape):
        raise InvalidInputError(
            f"members[{name!r}]: {tuple(factor.shape)} factors for {index.numel()} entries"
        )
    return index, factor.expand(index.shape).clone()
