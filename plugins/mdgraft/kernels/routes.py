"""Which kernel evaluates a formula: that for CPUs or that for GPUs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mdgraft.kernels.kernel import Kernel
from mdgraft.kernels.switch import on_device

#: What tells kernels of one formula apart.
Route = tuple[object, bool]


def route(tensor: Tensor) -> Route:
    """Precision, and whether kernels are those for GPUs: a key for kernels that were made."""
    return tensor.dtype, on_device(tensor)


def pair_kernel(tensor: Tensor) -> Callable[..., Kernel]:
    """What makes a kernel of pairs; see `mdgraft.kernels.fused.pair_kernel.PairKernel`."""
    if not on_device(tensor):
        from mdgraft.kernels.fused.pair_kernel import PairKernel

        return PairKernel
    from mdgraft.kernels.device.guard import Guarded
    from mdgraft.kernels.device.pair_kernel import DevicePairKernel

    return lambda *args, **options: Guarded(DevicePairKernel(*args, **options))


def item_kernel(tensor: Tensor) -> Callable[..., Kernel]:
    """What makes a kernel of items; see `mdgraft.kernels.fused.tuple_kernel.TupleKernel`."""
    if not on_device(tensor):
        from mdgraft.kernels.fused.tuple_kernel import TupleKernel

        return TupleKernel
    from mdgraft.kernels.device.guard import Guarded
    from mdgraft.kernels.device.item_kernel import DeviceItemKernel

    return lambda *args, **options: Guarded(DeviceItemKernel(*args, **options))
