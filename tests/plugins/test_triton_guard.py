"""Kernels for GPUs are compared with plain torch operations when they are first used."""

import dataclasses
import warnings

import pytest
import torch
from mdgraft import DeviceKernelWarning, InvalidInputError
from mdgraft.kernels.derivatives import differentiable_energy
from mdgraft.kernels.device import guard
from mdgraft.kernels.device.guard import Guarded
from mdgraft.kernels.device.plain import PlainKernel


def springs(positions, box, k, rest):
    """Of all particles to the origin; ``rest`` differs between frames."""
    length = positions.square().sum(-1).sqrt()
    return 0.5 * (k * (length - rest) ** 2).sum(-1) + 0.1 * box.reshape(len(box), -1).sum(-1)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A kernel whose gradients, or products, are wrong by a factor, or that raises."""

    label: tuple
    gradient: float = 1.0
    product: float = 1.0
    error: Exception | None = None
    calls: list = dataclasses.field(default_factory=list)

    fused = True
    framed = (3,)
    reference = staticmethod(springs)

    def _run(self, method, factor, *args):
        self.calls.append(method)
        if self.error is not None:
            raise self.error
        found = getattr(PlainKernel(springs, self.framed), method)(*args)
        if method == "energies":
            return found
        energies, slopes = found if method == "gradients" else (None, found)
        slopes = [None if s is None else factor * s for s in slopes]
        return (energies, slopes) if method == "gradients" else slopes

    def energies(self, inputs):
        return self._run("energies", 1.0, inputs)

    def gradients(self, inputs, wanted):
        return self._run("gradients", self.gradient, inputs, wanted)

    def products(self, inputs, directions, wanted):
        return self._run("products", self.product, inputs, directions, wanted)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(guard, "_COMPARED", set())
    monkeypatch.setattr(guard, "_FAILED", set())


def inputs(dtype=torch.float64, n_frames=2):
    g = torch.Generator().manual_seed(0)
    shapes = (n_frames, 5, 3), (n_frames, 3, 3), (5,), (n_frames, 5)
    return [1 + torch.rand(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def derivatives(kernel, dtype=torch.float64):
    x, box, k, rest = (t.requires_grad_() for t in inputs(dtype))
    energy = differentiable_energy(kernel, x, box, [k, rest])
    slopes = torch.autograd.grad(energy.sum(), (x, k, rest), create_graph=True)
    total = sum((s * s).sum() for s in slopes)
    return [energy, *slopes, *torch.autograd.grad(total, (x, k, rest))]


def exact(dtype=torch.float64):
    x, box, k, rest = (t.requires_grad_() for t in inputs(dtype))
    energy = springs(x, box, k, rest)
    slopes = torch.autograd.grad(energy.sum(), (x, k, rest), create_graph=True)
    total = sum((s * s).sum() for s in slopes)
    return [energy, *slopes, *torch.autograd.grad(total, (x, k, rest))]


def assert_exact(found, dtype=torch.float64):
    for one, other in zip(found, exact(dtype), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_that_agrees_is_used(dtype):
    kernel = Scaled(("springs",))
    for times in (1, 2):
        assert_exact(derivatives(Guarded(kernel, devices=("cpu",)), dtype), dtype)
        assert kernel.calls == ["gradients", "products"] * times
    # Rounding is no disagreement.
    kernel = Scaled(("rounded",), gradient=1 + 3 * torch.finfo(dtype).eps)
    derivatives(Guarded(kernel, devices=("cpu",)), dtype)
    assert not guard._FAILED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "wrong",
    [
        {"gradient": 1.05},
        {"product": 0.9},
        {"gradient": float("nan")},
        {"error": RuntimeError("no such instruction")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_kernel_that_fails_or_disagrees_is_given_up(wrong, dtype):
    """The right results all the same, one warning, and no second try: by any kernel like it."""
    kernel = Scaled(("springs",), **wrong)
    reason = "no such instruction" if "error" in wrong else "differ from those of plain torch"
    with pytest.warns(DeviceKernelWarning, match=reason) as caught:
        assert_exact(derivatives(Guarded(kernel, devices=("cpu",)), dtype), dtype)
    assert len(caught) == 1
    n_calls = len(kernel.calls)
    again = Scaled(("springs",), **wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(derivatives(Guarded(again, devices=("cpu",)), dtype), dtype)
    assert (len(kernel.calls), again.calls) == (n_calls, [])
    other = Scaled(("others",))
    assert_exact(derivatives(Guarded(other, devices=("cpu",)), dtype), dtype)
    assert other.calls


def test_errors_about_inputs_are_raised():
    kernel = Scaled(("springs",), error=InvalidInputError("box: too small"))
    with pytest.raises(InvalidInputError, match="too small"):
        derivatives(Guarded(kernel, devices=("cpu",)))
    assert not guard._FAILED


def test_memory_that_runs_out_is_not_held_against_a_kernel():
    kernel = Scaled(("springs",), error=torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        derivatives(Guarded(kernel, devices=("cpu",)))
    assert not guard._FAILED


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("too large")])
def test_a_kernel_that_cannot_be_compared_is_used_with_a_warning(monkeypatch, error):
    kernel = Scaled(("springs",))
    guarded = Guarded(kernel, devices=("cpu",))
    monkeypatch.setattr(guarded, "_plain", Scaled(("plain",), error=error))
    with pytest.warns(DeviceKernelWarning, match=f"was not compared .* {error}"):
        assert_exact(derivatives(guarded))
    assert not guard._FAILED


def test_a_few_frames_are_compared():
    plain = Scaled(("plain",))
    shapes = []

    def seen(given, wanted):
        shapes.append([tuple(t.shape) for t in given])
        return plain.gradients(given, wanted)

    guarded = Guarded(Scaled(("springs",)), devices=("cpu",))
    guarded._plain.gradients = seen
    found = guarded.gradients(inputs(n_frames=9), [True] * 4)
    assert shapes == [[(2, 5, 3), (2, 3, 3), (5,), (2, 5)]]
    assert [t.shape[0] for t in found[1]] == [9] * 4


def test_missing_results_are_a_disagreement():
    class Forgetful(Scaled):
        def gradients(self, inputs, wanted):
            energies, _ = self._run("gradients", 1.0, inputs, wanted)
            return energies, [None] * len(wanted)

    guarded = Guarded(Forgetful(("springs",)), devices=("cpu",))
    with pytest.warns(DeviceKernelWarning, match="differ from those of plain torch by inf"):
        assert guarded.gradients(inputs(), [True] * 4)[1][0] is not None


def test_interpreted_kernels_are_not_compared():
    """Tests on machines without a GPU see what kernels raise."""
    kernel = Scaled(("springs",), error=RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        derivatives(Guarded(kernel))


def test_lost_particles_are_no_disagreement():
    kernel = Guarded(Scaled(("springs",)), devices=("cpu",))
    given = inputs()
    given[0][1, 2] = torch.nan
    energies, slopes = kernel.gradients(given, [True, False, True, False])
    assert energies[1].isnan() and slopes[0][1, 2].isnan().all()
    assert not guard._FAILED
