"""Kernels that are compared with plain torch when they are first used.

Programs are compiled on the user's machine, by the user's versions of drivers and compilers. What
fails there, or finds something else than plain torch operations do, is never used again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mdgraft._errors import DeviceKernelWarning, MDGraftError
from mdgraft.kernels.device.plain import PlainKernel
from mdgraft.kernels.device.recording import NotRecordableError, recorder
from mdgraft.kernels.kernel import Inputs, Kernel, PerFrame

#: Largest differences, as a share of the largest number, and of energies [kJ/mol] by particle.
#: Plain sums in float32 are not better.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
#: Frames that are compared; bounds what it takes.
_FRAMES = 2
#: What has been compared, and kernels that are not used any more, in this process.
_COMPARED: set[Hashable] = set()
_FAILED: set[Hashable] = set()


class DeviceKernel(Kernel, Protocol):
    """A kernel whose programs may be shared with others."""

    @property
    def label(self) -> tuple[Hashable, ...]:
        """A name and what else tells programs apart: equal for kernels that run the same ones."""


class Guarded:
    """A kernel, see `mdgraft.kernels.kernel.Kernel`, that stands in for another one.

    Parameters
    ----------
    kernel
        For a device; it has a plain form.
    devices
        On which types of devices it is compared.
    """

    fused = True

    def __init__(self, kernel: DeviceKernel, *, devices: Collection[str] = ("cuda",)) -> None:
        assert kernel.reference is not None
        self.kernel, self.framed = kernel, kernel.framed
        self.reference: Callable[..., Tensor] | None = kernel.reference
        self._plain = PlainKernel(kernel.reference, kernel.framed)
        self._devices = devices

    def energies(self, inputs: Inputs) -> Tensor:
        """Energies ``(F,)``."""
        found: Tensor = self._call("energies", inputs, (), ())
        return found

    def gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Tensor | None, PerFrame]:
        """Energies, and derivatives of each frame's energy."""
        found: tuple[Tensor, PerFrame] = self._call("gradients", inputs, (), (wanted,))
        return found

    def products(
        self, inputs: Inputs, directions: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> PerFrame:
        """Second derivatives times directions."""
        found: PerFrame = self._call("products", inputs, directions, (directions, wanted))
        return found

    def _call(
        self,
        method: str,
        inputs: Inputs,
        directions: Sequence[Tensor | None],
        arguments: tuple[Any, ...],
    ) -> Any:
        device, dtype = inputs[0].device, inputs[0].dtype
        run: Callable[..., Any] = getattr(self.kernel, method)
        if device.type not in self._devices:
            return run(inputs, *arguments)
        plain: Callable[..., Any] = getattr(self._plain, method)
        label = self.kernel.label, device
        if label in _FAILED:
            return plain(inputs, *arguments)
        asked = tuple(arguments[-1]) if arguments else ()
        key = label, method, dtype, asked, inputs[1].shape[1], tuple(d is None for d in directions)
        if key in _COMPARED:
            return run(inputs, *arguments)
        if recorder(inputs[0]) is not None:
            # Comparing waits for the device, which must not count against the kernel.
            raise NotRecordableError("a kernel has yet to be compared")
        try:
            found = run(inputs, *arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (MDGraftError, torch.OutOfMemoryError):
            raise
        # Whatever a compiler or a driver may raise.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return self._given_up(label, reason, plain, inputs, arguments)
        # Plain forms refuse a particle that is lost.
        if not len(inputs[0]) or not bool(torch.isfinite(inputs[0]).all()):
            return found
        worst = self._compared(plain, found, inputs, directions, arguments)
        if not worst <= _TOLERANCE[dtype]:
            reason = f"{method} differ from those of plain torch by {worst:.1e} of the largest"
            return self._given_up(label, reason, plain, inputs, arguments)
        _COMPARED.add(key)
        return found

    def _compared(
        self,
        plain: Callable[..., Any],
        found: Any,
        inputs: Inputs,
        directions: Sequence[Tensor | None],
        arguments: tuple[Any, ...],
    ) -> float:
        """How much the results of the first frames differ from those of plain operations."""
        few = slice(0, _FRAMES)
        some = [t[few] if k < 2 or k in self.framed else t for k, t in enumerate(inputs)]
        moves = [d if d is None else d[few] for d in directions]
        try:
            # Directions, if there are any, come first.
            expected = plain(some, *([moves, *arguments[1:]] if moves else arguments))
        except Exception as error:
            warnings.warn(
                f"{self._name} was not compared with plain torch operations, which failed: "
                f"{type(error).__name__}: {error}; compare on a smaller system",
                DeviceKernelWarning,
                stacklevel=2,
            )
            return 0.0
        sizes = [float(d.abs().max()) for d in moves if d is not None and d.numel()]
        return _difference(found, expected, inputs[0].shape[1], max(sizes, default=1.0))

    @property
    def _name(self) -> str:
        return f"kernel {next(iter(self.kernel.label))!r}"

    def _given_up(
        self,
        label: Hashable,
        reason: str,
        plain: Callable[..., Any],
        inputs: Inputs,
        arguments: tuple[Any, ...],
    ) -> Any:
        _FAILED.add(label)
        warnings.warn(
            f"{self._name} is not used on {inputs[0].device}: {reason}. Plain torch operations "
            "take its place in this process, and are slower; please report this with the versions "
            "of torch and triton and the name of the device",
            DeviceKernelWarning,
            stacklevel=2,
        )
        return plain(inputs, *arguments)


def _difference(found: Any, expected: Any, n_particles: int, floor: float) -> float:
    """The largest difference, relative to the largest number of its kind or, if more, a floor."""
    if isinstance(found, Tensor):
        return _relative(found, expected, float(n_particles))
    if isinstance(found, tuple):
        energies = _relative(found[0], expected[0], float(n_particles))
        return max(energies, _difference(found[1], expected[1], n_particles, floor))
    pairs = zip(found, expected, strict=True)
    return max((_relative(a, b, floor) for a, b in pairs if b is not None), default=0.0)


def _relative(a: Tensor | None, b: Tensor, floor: float) -> float:
    if a is None:
        return torch.inf
    a = a[: len(b)]
    if a.shape != b.shape:
        return torch.inf
    if not a.numel():
        return 0.0
    known = torch.isfinite(b)
    if not torch.equal(known, torch.isfinite(a)):
        return torch.inf
    a, b = (torch.where(known, t, 0.0).double() for t in (a, b))
    return float((a - b).abs().max()) / max(float(b.abs().max()), floor, 1e-30)
