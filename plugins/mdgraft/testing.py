"""Public checks for potentials and adapters; they raise AssertionError with the numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdgraft._comparison import Comparison as Comparison
from mdgraft._comparison import HostFunctions as HostFunctions
from mdgraft._comparison import Progress as Progress
from mdgraft._comparison import Tolerances as Tolerances
from mdgraft._comparison import compare_with_host as compare_with_host
from mdgraft._differences import Difference as Difference
from mdgraft._differences import finite_difference as finite_difference
from mdgraft._errors import InvalidInputError
from mdgraft._model_checks import CHECKS as CHECKS
from mdgraft._model_checks import check_model as check_model
from mdgraft._model_subject import ModelCheck as ModelCheck
from mdgraft._model_subject import ModelReport as ModelReport
from mdgraft._types import BoxLike, PositionsLike
from mdgraft._units import plain
from mdgraft.potentials import Potential

_BOX_ROWS, _BOX_COLUMNS = (0, 1, 1, 2, 2, 2), (0, 0, 1, 0, 1, 2)


def check_potential(
    potential: Potential,
    positions: PositionsLike,
    box: BoxLike = None,
    *,
    rtol: float = 1e-6,
    translation_rtol: float | None = 1e-9,
    float32_rtol: float | None = 1e-3,
    seed: int = 0,
) -> None:
    """Check that a potential is consistent with itself.

    Forces and box derivative against differences of the energy; second derivatives against
    differences of the forces; terms against their sum; invariance to translations; a batch against
    single frames; ``torch.func`` against autograd; finite parameter gradients; float32 against
    float64.

    Parameters
    ----------
    potential
        In double precision.
    positions
        ``(N, 3)`` [nm], away from places where the energy is not smooth.
    box
        ``(3, 3)`` [nm], or None.
    rtol
        Of derivatives that are compared with finite differences.
    translation_rtol
        Of the energy after an arbitrary translation. Sums on a mesh, as in PME, are invariant only
        as far as the mesh is fine; None leaves this out. Translations by box vectors are exact.
    float32_rtol
        Of energy and forces in single precision; None leaves this out.
    seed
        Of the random directions.

    Raises
    ------
    AssertionError
        If anything is inconsistent; the message has the numbers.
    InvalidInputError
        If the potential is not in double precision, or ``positions`` are not one frame.
    """
    if potential.dtype != torch.float64:
        raise InvalidInputError(
            f"potential: computes in {potential.dtype}, wanted torch.float64; call .double()"
        )
    x = torch.as_tensor(plain(positions), dtype=torch.float64, device=potential.device).detach()
    if x.shape != (potential.n_particles, 3):
        raise InvalidInputError(
            f"positions: got shape {tuple(x.shape)}, wanted one frame, ({potential.n_particles}, 3)"
        )
    h = None
    if box is not None:
        h = torch.as_tensor(plain(box), dtype=torch.float64, device=potential.device).detach()
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device)

    energy, forces = potential(x, h).detach(), potential.forces(x, h).detach()
    scale = _scale(energy, forces)
    _check_first_order(potential, x, h, forces, direction, scale, rtol)
    _check_second_order(potential, x, h, direction, scale, rtol)
    if h is not None:
        _check_box(potential, x, h, random, scale, rtol)
    _check_invariance(potential, x, h, energy, forces, translation_rtol, random)
    _check_batch(potential, x, h, direction)
    _check_functional(potential, x, h, forces)
    if float32_rtol is not None:
        _check_float32(potential, x, h, energy, forces, float32_rtol)


def check_adapter(
    potential: Potential,
    positions: PositionsLike,
    box: BoxLike,
    host: HostFunctions,
    **options: Any,
) -> list[Comparison]:
    """Check that a potential agrees with the host that it was grafted from.

    Parameters
    ----------
    potential
        The graft, in double precision.
    positions
        ``(N, 3)`` [nm].
    box
        ``(3, 3)`` [nm], or None.
    host
        The host's answers.
    **options
        Those of `compare_with_host`: ``comparable``, ``gradients``, ``tolerances``, ``seed``,
        ``progress``.

    Returns
    -------
    list of Comparison
        All comparisons, if none differs.

    Raises
    ------
    AssertionError
        If anything differs; the message lists what, with the numbers.
    """
    x = np.asarray(plain(positions), dtype=np.float64)
    h = None if box is None else np.asarray(plain(box), dtype=np.float64)
    rows = compare_with_host(potential, x, h, host, **options)
    wrong = [
        f"{r.term} {r.quantity} {r.detail}: host {r.host:.12g}, graft {r.graft:.12g}, relative "
        f"difference {r.relative:.2e} > {r.tolerance:.2e}"
        for r in rows
        if r.status == "differs"
    ]
    if wrong:
        raise AssertionError("the graft differs from its host:\n" + "\n".join(wrong))
    return rows


def _check_first_order(
    potential: Potential,
    x: Tensor,
    h: Tensor | None,
    forces: Tensor,
    direction: Tensor,
    scale: float,
    rtol: float,
) -> None:
    with torch.no_grad():
        truth = finite_difference(lambda t: float(potential(x + t * direction, h)), step=1e-3)
    products = -forces * direction
    _close("forces along a random direction", products.sum(), truth, products.norm(), scale, rtol)


def _check_second_order(
    potential: Potential, x: Tensor, h: Tensor | None, direction: Tensor, scale: float, rtol: float
) -> None:
    """Hessian times vector by double backward against differences of forces."""
    moved = x.clone().requires_grad_(True)
    energy = potential(moved, h)
    product = torch.zeros_like(x)
    if energy.requires_grad:
        (gradient,) = torch.autograd.grad(energy, moved, create_graph=True)
        if gradient.requires_grad:
            (product,) = torch.autograd.grad(
                (gradient * direction).sum(), moved, allow_unused=True, materialize_grads=True
            )

    def slope(t: float) -> np.ndarray:
        with torch.no_grad():
            return -potential.forces(x + t * direction, h).cpu().numpy()

    truth = finite_difference(slope, step=1e-3)
    _close("Hessian times a random vector", product, truth, product.norm(), scale, rtol)


def _check_box(
    potential: Potential, x: Tensor, h: Tensor, random: torch.Generator, scale: float, rtol: float
) -> None:
    """Derivative along a random change of the lower triangle that keeps the box reduced."""
    direction = torch.zeros(3, 3, dtype=torch.float64)
    direction[_BOX_ROWS, _BOX_COLUMNS] = torch.rand(6, generator=random, dtype=torch.float64)
    # Growing diagonals and shrinking skews stay clear of what a reduced box may be.
    sign = torch.where(h.cpu() > 0, -1.0, 1.0)
    direction = (direction * (0.2 * sign).fill_diagonal_(1.0)).to(h.device)
    cell = h.clone().requires_grad_(True)
    energy = potential(x, cell)
    gradient = torch.zeros_like(h)
    if energy.requires_grad:
        (gradient,) = torch.autograd.grad(energy, cell, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        truth = finite_difference(
            lambda t: float(potential(x, h + t * direction)), step=1e-3, side=1
        )
    products = gradient * direction
    _close(
        "box derivative along a random direction",
        products.sum(),
        truth,
        products.norm(),
        scale,
        rtol,
    )


def _check_invariance(
    potential: Potential,
    x: Tensor,
    h: Tensor | None,
    energy: Tensor,
    forces: Tensor,
    rtol: float | None,
    random: torch.Generator,
) -> None:
    scale = _scale(energy, forces)
    total = torch.stack([e.detach() for e in potential.energy_by_term(x, h).values()] or [energy])
    _near("the sum of the terms", total.sum(), energy, 1e-12 * float(total.abs().sum()))
    if h is not None:
        moved = x + h[0] + h[1] - 2 * h[2]
        _near("a translation by box vectors", potential(moved, h), energy, 1e-9 * scale)
    if rtol is not None:
        shift = torch.rand(3, generator=random, dtype=torch.float64).to(x.device)
        _near("a translation", potential(x + shift, h), energy, rtol * scale)
        net = forces.sum(dim=0)
        _near("the sum of all forces", net, torch.zeros_like(net), rtol * float(forces.abs().sum()))


def _check_batch(potential: Potential, x: Tensor, h: Tensor | None, direction: Tensor) -> None:
    frames = torch.stack([x, x + 1e-3 * direction, x - 2e-3 * direction])
    cells = None if h is None else torch.stack([h, 1.01 * h, 1.02 * h])
    single = torch.stack(
        [potential(frames[i], None if cells is None else cells[i]) for i in range(3)]
    )
    allowed = 1e-12 * _scale(single.abs().max(), potential.forces(x, h))
    _near("a batch of three frames", potential(frames, cells), single, allowed)
    if cells is None:
        mapped = torch.func.vmap(lambda f: potential(f))(frames)
    else:
        mapped = torch.func.vmap(lambda f, c: potential(f, c))(frames, cells)
    _near("torch.func.vmap over three frames", mapped, single, allowed)


def _check_functional(potential: Potential, x: Tensor, h: Tensor | None, forces: Tensor) -> None:
    parameters = {k: v.detach() for k, v in potential.named_parameters()}

    def energy(values: dict[str, Tensor], frame: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(potential, values, (frame, h))
        return found

    by_parameters, by_positions = torch.func.grad(energy, argnums=(0, 1))(parameters, x)
    allowed = 1e-10 * max(1.0, float(forces.abs().max()) if forces.numel() else 0.0)
    _near("torch.func.grad by positions", -by_positions, forces, allowed)
    for name, gradient in by_parameters.items():
        if not bool(torch.isfinite(gradient).all()):
            where = (~torch.isfinite(gradient)).nonzero()[0].tolist()
            raise AssertionError(f"the gradient of {name} is not finite at entry {where}")
    trainable = {k: v for k, v in potential.named_parameters() if v.requires_grad}
    if trainable:
        total = potential(x, h)
        if not total.requires_grad:
            return
        gradients = torch.autograd.grad(
            total, list(trainable.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(trainable, gradients, strict=True):
            bound = 1e-10 * max(1.0, float(gradient.abs().max()) if gradient.numel() else 0.0)
            _near(f"torch.func.grad by {name}", by_parameters[name], gradient, bound)


def _check_float32(
    potential: Potential,
    x: Tensor,
    h: Tensor | None,
    energy: Tensor,
    forces: Tensor,
    rtol: float,
) -> None:
    single = copy.deepcopy(potential).to(torch.float32)
    y, cell = x.float(), None if h is None else h.float()
    found = single(y, cell)
    if found.dtype != torch.float32:
        raise AssertionError(f"a float32 potential gives energies in {found.dtype}")
    _near("the energy in float32", found.double(), energy, rtol * _scale(energy, forces))
    difference = single.forces(y, cell).double() - forces
    bound = rtol * max(1.0, float(forces.norm()))
    _near("forces in float32", difference.norm(), torch.zeros(()), bound)


def _scale(energy: Tensor, forces: Tensor) -> float:
    """Magnitude against which rounding of an energy is judged [kJ/mol]."""
    return max(float(energy.detach().abs()), 0.01 * float(forces.detach().norm(dim=-1).sum()), 1e-3)


def _close(
    what: str, found: Tensor, truth: Difference, scale: Tensor, least: float, rtol: float
) -> None:
    """Compare with a difference, relative to ``scale`` or, where that is zero, to ``least``."""
    value = found.detach().cpu().numpy()
    difference = float(np.linalg.norm(value - truth.value))
    error = float(np.linalg.norm(truth.error))
    size = max(float(scale.detach()), float(np.linalg.norm(truth.value)), 1e-4 * least)
    if not difference <= rtol * size + 10 * error:
        raise AssertionError(
            f"{what}: differs from finite differences by {difference:.3e}, relative "
            f"{difference / size:.2e} > {rtol:.0e}, with an error of {error:.1e} in the difference "
            f"itself; got {_summary(value)}, wanted {_summary(truth.value)}"
        )
    if not error <= 1e-3 * size:
        raise AssertionError(
            f"{what}: finite differences are uncertain by {error:.1e} of {size:.1e}, so nothing "
            "can be said; is the energy smooth here?"
        )


def _near(what: str, found: Tensor, wanted: Tensor, allowed: float) -> None:
    difference = (found.detach() - wanted.detach().to(found.device)).abs()
    # Written so that NaN fails.
    if not bool((difference <= allowed).all()):
        raise AssertionError(
            f"{what}: differs by {float(difference.max()):.3e} > {allowed:.1e}; got "
            f"{_summary(found.detach().cpu().numpy())}, wanted "
            f"{_summary(wanted.detach().cpu().numpy())}"
        )


def _summary(values: np.ndarray) -> str:
    if values.size <= 6:
        return np.array2string(values, precision=10)
    return f"{values.size} numbers with root mean square {np.sqrt(np.mean(values**2)):.10g}"
