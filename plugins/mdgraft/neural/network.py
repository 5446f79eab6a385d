"""A small equivariant message-passing network, for reference and for teaching."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdgraft._errors import InvalidInputError, UntrustedInputError
from mdgraft.neural.model import AtomicInputs, AtomicModel, sum_at
from mdgraft.neural.units import ModelUnits

_FORMAT = "mdgraft.neural.MessagePassingNetwork"
_VERSION = 1
#: Largest atomic number that an element may have.
_HEAVIEST = 118


class MessagePassingNetwork(AtomicModel):
    """Energies of atoms by message passing with scalar and vector features.

    Each atom carries scalars ``s`` and vectors ``v``. A round adds to them, from every neighbour,
    its scalars times learned functions of the distance, and its vectors and the direction to it
    likewise; then every atom mixes its own, where vectors enter scalars by their inner products.
    Energies are therefore invariant to translations, rotations, inversion and the order of like
    atoms; messages fade with a polynomial whose first two derivatives vanish at the cutoff. After
    Schuett, Unke, Gastegger, ICML 139, 9377 (2021), with the radial basis and the envelope of
    Gasteiger, Gross, Guennemann, ICLR (2020).

    Parameters
    ----------
    elements
        Atomic numbers that the network knows.
    cutoff
        Of messages, in the unit of length.
    channels
        Number of scalars, and of vectors, that an atom has.
    rounds
        Number of message-passing rounds.
    radial
        Number of radial basis functions.
    units
        Units that the network computes in.
    seed
        Of the initial weights; equal seeds give equal networks.
    dtype
        Precision of the weights.

    Raises
    ------
    InvalidInputError
        For elements or sizes that make no sense.
    """

    rows: Tensor

    def __init__(
        self,
        elements: Sequence[int],
        cutoff: float,
        *,
        channels: int = 32,
        rounds: int = 2,
        radial: int = 8,
        units: ModelUnits | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        known = sorted({int(z) for z in elements})
        if not known or known[0] < 1 or known[-1] > _HEAVIEST:
            raise InvalidInputError(
                f"elements: got {list(elements)}, wanted atomic numbers from 1 to {_HEAVIEST}"
            )
        for name, size in {"channels": channels, "rounds": rounds, "radial": radial}.items():
            if int(size) < 1:
                raise InvalidInputError(f"{name}: got {size}, wanted at least 1")
        if not 0 < cutoff < math.inf:
            raise InvalidInputError(f"cutoff: got {cutoff}, wanted a positive number")
        super().__init__(cutoff=cutoff, units=units, elements=known)
        self.options: dict[str, Any] = {
            "elements": known,
            "cutoff": float(cutoff),
            "channels": int(channels),
            "rounds": int(rounds),
            "radial": int(radial),
            "length": self.units.length,
            "energy": self.units.energy,
        }
        rows = torch.full((_HEAVIEST + 1,), -1, dtype=torch.long)
        rows[torch.tensor(known)] = torch.arange(len(known))
        self.register_buffer("rows", rows, persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(len(known), channels, dtype=dtype)
            self.rounds = nn.ModuleList(_Round(channels, radial, dtype) for _ in range(rounds))
            self.readout = nn.Sequential(
                nn.Linear(channels, channels, dtype=dtype),
                nn.SiLU(),
                nn.Linear(channels, 1, bias=False, dtype=dtype),
            )
        #: Energy of an atom of each element that its surroundings do not change ``(elements,)``.
        self.shift = nn.Parameter(torch.zeros(len(known), dtype=dtype))
        #: What the rest of each atom's energy is multiplied with ``()``.
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    @property
    def mappable(self) -> bool:
        """It is."""
        return True

    def forward(self, inputs: AtomicInputs) -> Tensor:
        """Energies of atoms ``(A,)``."""
        element = self.rows[inputs.atomic_numbers]
        edges = inputs.displacements
        # Rounded off where two atoms meet, so that every derivative exists there as well.
        tiny = 1e-6 * self.cutoff
        distances = (edges * edges).sum(dim=-1).add(tiny**2).sqrt()
        directions = edges / distances.unsqueeze(-1)
        basis = radial_basis(distances, self.cutoff, self.options["radial"])
        s = self.embedding(element)
        v = s.new_zeros(s.shape[0], 3, s.shape[1])
        for round_ in self.rounds:
            s, v = round_(s, v, basis, directions, inputs.first, inputs.second)
        surroundings: Tensor = self.readout(s).squeeze(-1)
        return self.shift[element] + self.scale * surroundings

    def normalize(
        self, atomic_numbers: Tensor | Sequence[int], energies: Tensor, forces: Tensor
    ) -> None:
        """Set shift and scale from data, in the network's units, before training.

        Parameters
        ----------
        atomic_numbers
            ``(N,)``.
        energies
            ``(F,)``; their mean is shared equally among the atoms.
        forces
            ``(F, N, 3)``; their root mean square times the cutoff's tenth becomes the scale.

        Raises
        ------
        InvalidInputError
            For elements that the network does not know, or numbers that are not finite.
        """
        numbers = torch.as_tensor(atomic_numbers).cpu()
        unknown = set(numbers.tolist()) - set(self.elements or ())
        if unknown:
            raise InvalidInputError(
                f"atomic_numbers: got {sorted(unknown)}, but the network knows {self.elements}"
            )
        for name, values in {"energies": energies, "forces": forces}.items():
            if not values.numel() or not bool(torch.isfinite(values).all()):
                raise InvalidInputError(f"{name}: wanted finite numbers, at least one")
        with torch.no_grad():
            present = self.rows[sorted(set(numbers.tolist()))]
            self.shift[present] = float(energies.detach().mean()) / len(numbers)
            self.scale.fill_(0.1 * self.cutoff * float(forces.detach().pow(2).mean().sqrt()) or 1.0)

    # Files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write options and weights to a file that `load` reads without running code."""
        torch.save(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "options": dict(self.options),
                "state": self.state_dict(),
            },
            path,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> MessagePassingNetwork:
        """Read what `save` wrote; nothing in the file is executed.

        Parameters
        ----------
        path
            The file.
        dtype
            Precision of the weights; by default that of the file.
        device
            Where they go.

        Raises
        ------
        InvalidInputError
            If there is no such file, or it holds something else.
        UntrustedInputError
            If the file holds anything but plain tensors, numbers and names.
        """
        stored = _read(Path(path), device)
        try:
            options = dict(stored["options"])
            units = ModelUnits(options.pop("length"), options.pop("energy"))
            state = cast(Mapping[str, Tensor], stored["state"])
            # Before anything of that size is made.
            if state["embedding.weight"].shape != (len(options["elements"]), options["channels"]):
                raise ValueError("sizes of options and weights differ")
            network = cls(**options, units=units, dtype=state["embedding.weight"].dtype)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InvalidInputError(
                f"path: {path} has options that make no sense ({error!r})"
            ) from error
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise InvalidInputError(f"path: {path} has weights that do not fit ({error})") from None
        return network.to(device=device, dtype=dtype)


class _Round(nn.Module):
    """One round: messages from neighbours, then a mixing of each atom's own features."""

    def __init__(self, channels: int, radial: int, dtype: torch.dtype) -> None:
        super().__init__()

        def perceptron(n_in: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(n_in, channels, dtype=dtype),
                nn.SiLU(),
                nn.Linear(channels, 3 * channels, dtype=dtype),
            )

        self.message = perceptron(channels)
        # Without a constant, so that nothing is left of a message at the cutoff.
        self.filter = nn.Linear(radial, 3 * channels, bias=False, dtype=dtype)
        self.mix = nn.Linear(channels, 2 * channels, bias=False, dtype=dtype)
        self.update = perceptron(2 * channels)

    def forward(
        self,
        s: Tensor,
        v: Tensor,
        basis: Tensor,
        directions: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, Tensor]:
        n = s.shape[0]
        weights = self.message(s)[second] * self.filter(basis)
        scalar, vector, along = weights.chunk(3, dim=-1)
        messages = vector.unsqueeze(1) * v[second] + along.unsqueeze(1) * directions.unsqueeze(-1)
        s = s + sum_at(scalar, first, n)
        v = v + sum_at(messages, first, n)
        left, right = self.mix(v).chunk(2, dim=-1)
        gain, product, stretch = self.update(torch.cat([s, (right * right).sum(1)], -1)).chunk(3, 1)
        return s + gain + product * (left * right).sum(dim=1), v + stretch.unsqueeze(1) * left


def radial_basis(distances: Tensor, cutoff: float, n: int) -> Tensor:
    """Spherical Bessel functions with an envelope ``(..., n)``.

    ``e(x) sin(k pi x) / x`` with ``x = r / cutoff`` and ``e(x) = 1 - 28 x^6 + 48 x^7 - 21 x^8``,
    zero beyond the cutoff; value, first and second derivative are continuous there.
    """
    x = (distances / cutoff).clamp(max=1.0).unsqueeze(-1)
    k = torch.arange(1, n + 1, dtype=distances.dtype, device=distances.device)
    envelope = 1.0 + x**6 * (-28.0 + x * (48.0 - 21.0 * x))
    return envelope * torch.sin(math.pi * k * x) / (x * math.pi)


def _read(path: Path, device: torch.device | str) -> Mapping[str, Any]:
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise InvalidInputError(f"path: cannot read {path} ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise UntrustedInputError(
            f"path: {path} holds more than weights, and loading it would run code. Load it with "
            "torch.load(path, weights_only=False) only if you trust where it comes from, and save "
            "the network again with MessagePassingNetwork.save"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidInputError(f"path: {path} is not a file of weights ({error})") from error
    if not isinstance(stored, Mapping) or stored.get("format") != _FORMAT:
        raise InvalidInputError(
            f"path: {path} does not hold what MessagePassingNetwork.save writes; a state_dict "
            "alone goes into a network by load_state_dict"
        )
    if stored.get("version") != _VERSION:
        raise InvalidInputError(
            f"path: {path} has version {stored.get('version')} of the format, this mdgraft reads "
            f"{_VERSION}; a newer one may read it"
        )
    return stored
