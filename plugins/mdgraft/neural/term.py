"""An energy model of atoms as a term of a potential."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError
from mdgraft.kernels.images import image_pairs
from mdgraft.neural._opaque import is_mapped, is_transformed, opaque
from mdgraft.neural.model import AtomicInputs
from mdgraft.neural.units import ModelUnits
from mdgraft.potentials import AbstractTerm, Potential

#: What parameters of a model are measured in: nothing that anyone else can name.
_UNIT = "model units"


class NeuralTerm(AbstractTerm):
    """Energy by a model of atoms, see `mdgraft.neural.AtomicModel`.

    Its parameters are those of the model, as ``model.<name>``. Forces are gradients of the energy,
    whatever the model says about them. The model is shared, not copied.

    Parameters
    ----------
    model
        A module with ``cutoff``, ``units`` and a ``forward`` that takes `AtomicInputs`.
    atomic_numbers
        ``(n,)``, one for each atom that the model sees.
    particles
        ``(n,)`` the particles that these atoms are; all of them, in order, if None.
    pbc
        Whether the system is periodic, for all directions of the box or for each one.

    Raises
    ------
    InvalidInputError
        If the model lacks what it needs, does not know an element, or numbers make no sense.
    """

    atomic_numbers: Tensor

    def __init__(
        self,
        model: nn.Module,
        atomic_numbers: Sequence[int] | Tensor,
        *,
        particles: Sequence[int] | Tensor | None = None,
        pbc: bool | Sequence[bool] = False,
    ) -> None:
        directions = _directions(pbc)
        super().__init__(periodic=any(directions))
        self.pbc = directions
        self.general_cell = bool(getattr(model, "general_cell", True))
        self.model = _checked_model(model)
        numbers = _integers("atomic_numbers", atomic_numbers)
        if not numbers.numel() or int(numbers.min()) < 1:
            raise InvalidInputError(
                f"atomic_numbers: got {numbers.tolist()[:10]}, wanted one positive number for each "
                "atom that the model sees; leave sites without an element out by particles="
            )
        _check_elements(model, numbers)
        self.register_buffer("atomic_numbers", numbers, persistent=False)
        picked = None if particles is None else _checked_particles(particles, len(numbers))
        self.register_buffer("particles", picked, persistent=False)
        self.units = {f"model.{name}": _UNIT for name, _ in model.named_parameters()}
        self._connected = False

    def parameter_values(self) -> dict[str, Tensor]:
        """The model's parameters by name."""
        return {f"model.{name}": value for name, value in self.model.named_parameters()}

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol].

        Raises
        ------
        InvalidInputError
            If the model's result has a wrong shape.
        UnsupportedDerivativeError
            If the model cuts the graph, so that its forces would be zero.
        """
        cells = () if box is None else (box,)
        mappable = bool(getattr(self.model, "mappable", False))
        if mappable or not is_transformed([positions, box, *values.values()]):
            return self._evaluate(positions, box, values)

        def energy(x: Tensor, *rest: Tensor) -> tuple[Tensor]:
            own = dict(zip(values, rest[len(cells) :], strict=True))
            return (self._evaluate(x, rest[0] if cells else None, own),)

        return opaque(energy, positions, *cells, *values.values())[0]

    def _evaluate(
        self, positions: Tensor, box: Tensor | None, values: Mapping[str, Tensor]
    ) -> Tensor:
        inputs = self.inputs(positions, box)
        return self._energies(self._call(inputs, values), inputs) * self.model_units.kilojoules

    def _call(self, inputs: AtomicInputs, values: Mapping[str, Tensor]) -> Any:
        own = {name.removeprefix("model."): value for name, value in values.items()}
        return torch.func.functional_call(self.model, own, (inputs,))

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol], zero for those outside the model.

        Raises
        ------
        InvalidInputError
            If the model does not say how its energy is shared among atoms.
        """
        inputs = self.inputs(positions, box)
        found = _flat(self._call(inputs, values))
        if found.shape != (inputs.n_atoms,):
            raise InvalidInputError(
                f"model: {type(self.model).__name__} gives energies of frames, not of atoms"
            )
        shared = inputs.split(found) * self.model_units.kilojoules
        particles = self._buffers["particles"]
        if particles is None:
            return shared
        return shared.new_zeros(positions.shape[:2]).index_add(1, particles, shared)

    def inputs(self, positions: Tensor, box: Tensor | None) -> AtomicInputs:
        """What the model is given for frames ``(F, N, 3)`` [nm] and boxes ``(F, 3, 3)`` [nm]."""
        particles = self._buffers["particles"]
        x = positions if particles is None else positions[:, particles]
        n_frames, n = x.shape[:2]
        if n != len(self.atomic_numbers):
            raise InvalidInputError(
                f"positions: {n} particles, but the model was given {len(self.atomic_numbers)} "
                "atomic numbers; say by particles= which ones they belong to"
            )
        length = self.model_units.nanometers
        cutoff = float(self.model.cutoff)  # type: ignore[arg-type]
        cell = None if box is None else box.expand(n_frames, 3, 3)
        pairs = image_pairs(x, cell, cutoff=cutoff * length, pbc=self.pbc, half=False)
        displacements = pairs.displacements(x, cell) / length
        if is_mapped([x, cell]):
            # The list of one frame serves all of them.
            displacements = _at_most(displacements, cutoff)
        frames = torch.arange(n_frames, device=x.device)
        return AtomicInputs(
            positions=(x / length).reshape(n_frames * n, 3),
            atomic_numbers=self.atomic_numbers.repeat(n_frames),
            frame=frames.repeat_interleave(n),
            n_frames=n_frames,
            cells=None if cell is None else cell / length,
            pbc=self.pbc,
            first=pairs.frame * n + pairs.first,
            second=pairs.frame * n + pairs.second,
            shifts=pairs.shifts,
            displacements=displacements,
        )

    @property
    def model_units(self) -> ModelUnits:
        """Units that the model computes in."""
        units = self.model.units
        assert isinstance(units, ModelUnits)
        return units

    def _energies(self, found: Any, inputs: AtomicInputs) -> Tensor:
        """The model's result as energies of frames ``(F,)``."""
        energies = _flat(found)
        if energies.shape not in ((inputs.n_frames,), (inputs.n_atoms,)):
            raise InvalidInputError(
                f"model: {type(self.model).__name__} returned shape {tuple(found.shape)}, wanted "
                f"energies of frames ({inputs.n_frames},) or of atoms ({inputs.n_atoms},)"
            )
        if torch.is_grad_enabled() and inputs.displacements.numel():
            self._check_graph(energies, inputs)
        return energies if energies.shape[0] == inputs.n_frames else inputs.per_frame(energies)

    def _check_graph(self, energies: Tensor, inputs: AtomicInputs) -> None:
        """Raise if the energy's graph does not reach the positions, though those have one."""
        if self._connected or not inputs.displacements.requires_grad:
            return
        given = (inputs.displacements, inputs.positions, inputs.cells)
        sources = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
        # Weights have graphs as well, so that the graph has to be followed; once will do. Under
        # transforms it is out of sight.
        hidden = is_transformed(sources)
        self._connected = not hidden and _reaches(energies, sources)
        if not (energies.requires_grad if hidden else self._connected):
            raise UnsupportedDerivativeError(
                f"model: the energy of {type(self.model).__name__} does not depend on positions by "
                "its graph although they have one, so that its forces would be zero; remove "
                "detach(), .data or torch.no_grad() from its forward. An energy that is constant "
                "may add 0 * inputs.displacements.sum()"
            )


def neural_potential(
    model: nn.Module,
    atomic_numbers: Sequence[int] | Tensor,
    *,
    n_particles: int | None = None,
    particles: Sequence[int] | Tensor | None = None,
    pbc: bool | Sequence[bool] = False,
    name: str = "neural",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Potential:
    """A potential whose energy a model of atoms gives.

    Parameters
    ----------
    model
        A module with ``cutoff``, ``units`` and a ``forward`` that takes `AtomicInputs`, see
        `AtomicModel`. It is shared: training the potential trains the model.
    atomic_numbers
        ``(n,)``, one for each atom that the model sees.
    n_particles
        Number of particles N of the system; by default the atoms, or the last of ``particles``.
    particles
        ``(n,)`` the particles that the atoms are; all of them, in order, if None.
    pbc
        Whether the system is periodic, for all directions of the box or for each one. Boxes may
        have any shape, and may be small against the cutoff.
    name
        Name of the term; parameters are ``<name>.model.<parameter of the model>``.
    dtype, device
        Where the model, and with it the potential, is moved; by default it stays as it is.

    Returns
    -------
    Potential
        In nm and kJ/mol.

    Raises
    ------
    InvalidInputError
        If the model lacks what it needs, does not know an element, or numbers make no sense.

    Examples
    --------
    >>> network = MessagePassingNetwork(elements=[1, 8], cutoff=0.5)
    >>> potential = neural_potential(network, [8, 1, 1])
    >>> potential(torch.rand(3, 3)).shape
    torch.Size([])
    """
    term = NeuralTerm(model, atomic_numbers, particles=particles, pbc=pbc)
    picked = term._buffers["particles"]
    least = len(term.atomic_numbers) if picked is None else int(picked.max()) + 1
    n = least if n_particles is None else int(n_particles)
    if n < least or (picked is None and n != least):
        raise InvalidInputError(
            f"n_particles: got {n}, but the model sees {len(term.atomic_numbers)} atoms, up to "
            f"particle {least - 1}; say by particles= which ones they are"
        )
    potential = Potential({name: term}, n_particles=n)
    if dtype is None and device is None:
        return potential
    return potential.to(device=device, dtype=dtype)


def _directions(pbc: bool | Sequence[bool]) -> tuple[bool, bool, bool]:
    if isinstance(pbc, bool):
        return pbc, pbc, pbc
    found = tuple(bool(p) for p in pbc)
    if len(found) != 3:
        raise InvalidInputError(f"pbc: got {pbc!r}, wanted True, False, or three of them")
    return found


def _checked_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"model: got {type(model).__name__}, wanted a torch.nn.Module; see "
            "mdgraft.neural.AtomicModel"
        )
    cutoff, units = getattr(model, "cutoff", None), getattr(model, "units", None)
    if not isinstance(units, ModelUnits) or cutoff is None:
        raise InvalidInputError(
            f"model: {type(model).__name__} has cutoff = {cutoff!r} and units = {units!r}, wanted "
            "a number and a mdgraft.neural.ModelUnits; derive it from mdgraft.neural.AtomicModel, "
            "or wrap it, for instance in mdgraft.neural.MACEModel"
        )
    if not 0 < float(cutoff) < float("inf"):
        raise InvalidInputError(f"model: has a cutoff of {cutoff}, wanted a positive number")
    return model


def _check_elements(model: nn.Module, numbers: Tensor) -> None:
    elements = getattr(model, "elements", None)
    if elements is None:
        return
    known = {int(z) for z in elements}
    unknown = set(numbers.tolist()) - known
    if unknown:
        raise InvalidInputError(
            f"atomic_numbers: {type(model).__name__} knows {sorted(known)}, not {sorted(unknown)}"
        )


def _integers(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name}: cannot be read as whole numbers ({error})") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise InvalidInputError(
            f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)}, wanted a row of integers"
        )
    return tensor.detach().long().clone()


def _checked_particles(particles: Any, n_atoms: int) -> Tensor:
    picked = _integers("particles", particles)
    if len(picked) != n_atoms or int(picked.min()) < 0 or len(torch.unique(picked)) != len(picked):
        raise InvalidInputError(
            f"particles: got {picked.tolist()[:10]}, wanted {n_atoms} different indices, one for "
            "each atomic number"
        )
    return picked


def _flat(found: Any) -> Tensor:
    if not torch.is_tensor(found) or not found.is_floating_point() or found.ndim == 0:
        raise InvalidInputError(
            f"model: returned {type(found).__name__}, wanted a tensor of energies; a model that "
            "returns several things needs a wrapper, see mdgraft.neural.AtomicModel"
        )
    return found.squeeze(-1) if found.ndim == 2 and found.shape[1] == 1 else found


def _reaches(result: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether the graph of a result leads to one of these."""
    wanted = {s.grad_fn if s.grad_fn is not None else s for s in sources}
    found, open_ends = set(), [result.grad_fn]
    while open_ends:
        node = open_ends.pop()
        if node is None or node in found:
            continue
        if node in wanted or getattr(node, "variable", None) in wanted:
            return True
        found.add(node)
        open_ends += [before for before, _ in node.next_functions]
    return False


def _at_most(displacements: Tensor, length: float) -> Tensor:
    """Put what is longer than this at exactly this length, as a constant."""
    far = (displacements.detach() ** 2).sum(dim=-1, keepdim=True) >= length**2
    edge = displacements.new_tensor([length, 0.0, 0.0])
    return torch.where(far, edge, displacements)
