"""Smooth particle-mesh Ewald sums in compiled loops, with derivatives up to the second.

E = 1/2 sum_m G(m) |F(Q)(m)|^2 = 1/2 sum_g Q(g) phi(g), where phi is the inverse transform of
G F(Q). The influence G = C I(t) / (V B(m)) depends on the box by its volume V and by t = |R m|^2,
with R the reciprocal box. See `mdgraft.kernels.pme` for I, the spline moduli B, and the energy in
plain torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.fused import spreading
from mdgraft.kernels.fused.influence import (
    Axes,
    Interaction,
    mesh_influence,
    mesh_setting,
    virial,
    weigh_modes,
    weigh_tangent,
)
from mdgraft.kernels.fused.spreading import Array, Motion, Particles
from mdgraft.kernels.fused.threads import run_chunks
from mdgraft.kernels.periodic import reciprocal, volume
from mdgraft.kernels.pme import pme_coulomb, pme_dispersion

#: Mesh points of the frames that are transformed at once: bounds memory, and suits caches.
_POINTS = 2**20
#: Particles of all frames, from which on threads are worth their start.
_MANY = 8000
#: Most threads that share a frame, each with a mesh of its own.
_COPIES = 8


class MeshKernel:
    """The energy of `pme_coulomb` or `pme_dispersion` on CPUs, as a `derivatives.Kernel`.

    Its inputs are positions ``(F, N, 3)`` [nm], boxes ``(F, 3, 3)`` [nm] and strengths ``(N,)``.
    Meshes have the precision of the positions; energies and derivatives in the box are summed in
    float64. Results are repeatable bit by bit as long as torch's number of threads is the same.

    Parameters
    ----------
    kind
        Of the interaction.
    alpha
        Splitting parameter [1/nm].
    grid
        Numbers of grid points along the three box vectors.
    """

    fused: bool = True
    framed: tuple[int, ...] = ()

    def __init__(self, kind: Interaction, *, alpha: float, grid: tuple[int, int, int]) -> None:
        plain = pme_coulomb if kind == Interaction.COULOMB else pme_dispersion
        self.reference: Callable[..., Tensor] | None = functools.partial(
            _plain, energy=plain, alpha=alpha, grid=grid
        )
        self._kind, self._alpha, self._grid = int(kind), float(alpha), grid

    def energies(self, inputs: Sequence[Tensor]) -> Tensor:
        """Energies ``(F,)`` [kJ/mol]."""
        return self.gradients(inputs, (False, False, False))[0]

    def gradients(
        self, inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Energies, and their derivatives in the inputs that are wanted, for every frame."""
        positions, box, strengths = inputs
        if not len(positions):
            return positions.new_zeros(0), _none(inputs, wanted)
        batches = self._batches(positions, box, strengths.expand(len(positions), -1))
        energies, *found = _joined(batch.first(wanted) for batch, _ in batches)
        return energies.to(positions.dtype), _chosen(found, inputs, wanted)

    def products(
        self,
        inputs: Sequence[Tensor],
        directions: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """Second derivatives times directions ``(F, *shape)``, summed over all directions."""
        positions, box, strengths = inputs
        if not len(positions):
            return _none(inputs, wanted)
        shifts, strains, charges = directions
        if shifts is None and strains is None and charges is not None and not any(wanted[:2]):
            # The energy is quadratic in the strengths: this is the gradient at the direction.
            batches = self._batches(positions, box, charges)
            found = _joined(batch.first(wanted) for batch, _ in batches)[1:]
        else:
            batches = self._batches(positions, box, strengths.expand(len(positions), -1))
            whole = wanted[1] or strains is not None
            found = _joined(batch.second(directions, frames, whole) for batch, frames in batches)
        return _chosen(found, inputs, wanted)

    def _batches(
        self, positions: Tensor, box: Tensor, strengths: Tensor
    ) -> Iterator[tuple[_Batch, slice]]:
        """Frames in batches of bounded memory."""
        size = max(1, _POINTS // math.prod(self._grid))
        for start in range(0, len(positions), size):
            frames = slice(start, start + size)
            inputs = positions[frames], box[frames], strengths[frames]
            yield _Batch(self._kind, self._alpha, self._grid, *inputs), frames


class _Batch:
    """Frames that are on meshes at the same time."""

    def __init__(
        self,
        kind: int,
        alpha: float,
        grid: tuple[int, int, int],
        positions: Tensor,
        box: Tensor,
        strengths: Tensor,
    ) -> None:
        cell, dtype = box.to(torch.float64), positions.dtype
        wrap_x, wrap_y, wrap_z = (np.arange(n + 5) % n for n in grid)
        self.particles = Particles(
            _array(positions, dtype),
            _array(reciprocal(cell), torch.float64),
            _array(strengths, dtype),
            (wrap_x, wrap_y, wrap_z),
            0,
            positions.shape[1],
        )
        self.volumes, self.dtype, self.shape = volume(cell).tolist(), dtype, positions.shape
        self.kind, self.alpha, self.grid = kind, alpha, grid
        # By frames if there are enough, or by particles.
        n_frames, n_particles, _ = positions.shape
        self.threads = torch.get_num_threads() if n_frames * n_particles >= _MANY else 1
        self.by_frame = n_frames >= self.threads
        self.n_chunks = self.threads if self.by_frame else min(self.threads, _COPIES)

    def run(self, loop: Callable[[Particles, slice, int], None]) -> None:
        """Call a loop with each chunk of particles, its frames and its number."""
        frames, last = self.shape[:2]
        n = self.n_chunks

        def chunk(k: int) -> None:
            if self.by_frame:
                these = slice(frames * k // n, frames * (k + 1) // n)
                loop(self.cut(these, 0, last), these, k)
            else:
                loop(self.cut(slice(None), last * k // n, last * (k + 1) // n), slice(None), k)

        run_chunks(chunk, n)

    def cut(self, frames: slice, first: int, last: int) -> Particles:
        """Some of the frames and of the particles."""
        x, r, q, wraps, _, _ = self.particles
        return Particles(x[frames], r[frames], q[frames], wraps, first, last)

    def spectra(self, n: int, loop: Callable[[Particles, slice, Array], None]) -> Tensor:
        """Transforms ``(n, F, nx, ny, nz // 2 + 1)`` of what a loop adds to ``(n, F, *grid)``."""
        copies = 1 if self.by_frame else self.n_chunks
        meshes = torch.zeros(copies, n, self.shape[0], *self.grid, dtype=self.dtype)
        arrays = meshes.numpy()
        self.run(lambda part, frames, k: loop(part, frames, arrays[k % copies][:, frames]))
        total = meshes[0] if copies == 1 else meshes.sum(dim=0)
        result: Tensor = torch.fft.rfftn(total, dim=(-3, -2, -1))
        return result

    def potentials(self, spectra: Tensor) -> Array:
        """Inverse transforms ``(..., *grid)``, without a factor."""
        meshes = torch.fft.irfftn(spectra, s=self.grid, dim=(-3, -2, -1), norm="forward")
        result: Array = meshes.numpy()
        return result

    def each_frame(self, function: Callable[[int], None]) -> None:
        """Call a function with the number of each frame."""
        frames, n = self.shape[0], self.threads if self.by_frame else 1

        def chunk(k: int) -> None:
            for f in range(k, frames, n):
                function(f)

        run_chunks(chunk, n)

    def setting(self, f: int) -> tuple[int, float, float, Array, Axes]:
        """What the influence of a frame depends on."""
        r, v = self.particles.reciprocals[f], self.volumes[f]
        return mesh_setting(self.kind, self.alpha, self.grid, r, v)

    def influence(self, f: int) -> Array:
        """G of a frame, ``(nx, ny, nz // 2 + 1)``."""
        r, v, dtype = self.particles.reciprocals[f], self.volumes[f], self.dtype
        return mesh_influence(self.kind, self.alpha, self.grid, r.tobytes(), v, dtype)

    # As elsewhere, what is lost gives NaN without a warning.
    @np.errstate(invalid="ignore", over="ignore")
    def first(self, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        """Energies in float64 and the gradients, which are unfinished if they are not wanted."""
        n_frames, n_particles, _ = self.shape
        spectra = self.spectra(1, lambda part, _, meshes: spreading.spread(part, meshes[0]))[0]
        q, e, virials = spectra.numpy(), np.zeros(n_frames), np.zeros((n_frames, 3, 3))

        def weigh(f: int) -> None:
            if wanted[1]:
                virial(*self.setting(f), q[f], virials[f])
            e[f] = weigh_modes(q[f], self.influence(f), self.grid[2], any(wanted))

        self.each_frame(weigh)
        energies = torch.from_numpy(e)
        values = torch.zeros(n_frames, n_particles, dtype=self.dtype)
        slopes = torch.zeros(self.shape, dtype=self.dtype)
        if not any(wanted):
            return energies, slopes, torch.from_numpy(virials), values
        phi, moments = self.potentials(spectra), np.zeros((self.n_chunks, n_frames, 3, 3))

        def loop(part: Particles, frames: slice, k: int) -> None:
            out = values.numpy()[frames], slopes.numpy()[frames], moments[k][frames]
            spreading.gather(part, phi[frames], wanted[2], *out)

        self.run(loop)
        # Everything depends on the box through R and V: dR = -R dB R, dV = V tr(R dB).
        r = self.particles.reciprocals
        turned = moments.sum(axis=0) + r @ virials
        rt = r.transpose(0, 2, 1)
        boxes = -rt @ turned @ rt - e[:, None, None] * rt
        return energies, slopes, torch.from_numpy(boxes), values

    @np.errstate(invalid="ignore", over="ignore")
    def second(
        self, directions: Sequence[Tensor | None], frames: slice, whole: bool
    ) -> tuple[Tensor, ...]:
        """Products of second derivatives with directions, of which these are some frames.

        ``whole`` if the box changes or its product is wanted.
        """
        n_frames, n_particles, _ = self.shape
        shapes = self.shape, (n_frames, 3, 3), self.shape[:2]
        shifts, strains, charges = (
            torch.zeros(s, dtype=self.dtype) if d is None else d[frames]
            for d, s in zip(directions, shapes, strict=True)
        )
        r, dbox = self.particles.reciprocals, _array(strains, torch.float64)
        dr = -r @ dbox @ r
        rt, drt = r.transpose(0, 2, 1), dr.transpose(0, 2, 1)
        motion = Motion(_array(shifts, self.dtype), dr, _array(charges, self.dtype))

        def cut(frames: slice) -> Motion:
            return Motion(*(part[frames] for part in motion))

        spectra = self.spectra(
            2, lambda part, f, m: spreading.spread_tangent(part, cut(f), m[0], m[1])
        )
        q, dq = spectra[0].numpy(), spectra[1].numpy()
        virials, e = np.zeros((2, n_frames, 3, 3)), np.zeros((2, n_frames, 1, 1))
        change, growth = rt @ dr + drt @ r, np.trace(r @ dbox, axis1=1, axis2=2)

        def weigh(f: int) -> None:
            if whole:
                sums = virials[0, f], virials[1, f]
                e[:, f, 0, 0] = weigh_tangent(
                    *self.setting(f), change[f], growth[f], q[f], dq[f], *sums
                )
            else:
                influence = self.influence(f)
                weigh_modes(q[f], influence, self.grid[2], True)
                weigh_modes(dq[f], influence, self.grid[2], True)

        self.each_frame(weigh)
        phi, moments = self.potentials(spectra), np.zeros((self.n_chunks, 2, n_frames, 3, 3))
        values = torch.zeros(n_frames, n_particles, dtype=self.dtype)
        slopes = torch.zeros(self.shape, dtype=self.dtype)

        def loop(part: Particles, frames: slice, k: int) -> None:
            out = values.numpy()[frames], slopes.numpy()[frames], moments[k][:, frames]
            spreading.gather_tangent(part, cut(frames), phi[0, frames], phi[1, frames], *out)

        self.run(loop)
        turned, dturned = moments.sum(axis=0)
        turned += r @ virials[0]
        dturned += dr @ virials[0] + r @ virials[1]
        # The change of what `first` finds.
        boxes = (
            -(drt @ turned @ rt + rt @ dturned @ rt + rt @ turned @ drt) - e[1] * rt - e[0] * drt
        )
        return slopes, torch.from_numpy(boxes), values


def _plain(
    positions: Tensor,
    box: Tensor,
    strengths: Tensor,
    *,
    energy: Callable[..., Tensor],
    alpha: float,
    grid: tuple[int, int, int],
) -> Tensor:
    return energy(positions, strengths, box, alpha=alpha, grid=grid)


def _array(tensor: Tensor, dtype: torch.dtype) -> Array:
    result: Array = tensor.detach().to(dtype).contiguous().numpy()
    return result


def _joined(batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _chosen(
    found: Sequence[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    return [g.to(t.dtype) if on else None for g, t, on in zip(found, inputs, wanted, strict=True)]


# The transform of no frames at all is an error.
def _none(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    positions, box, strengths = inputs
    found = (
        torch.zeros_like(positions),
        torch.zeros_like(box),
        strengths.new_zeros(0, *strengths.shape),
    )
    return _chosen(found, inputs, wanted)
