"""Triton programs between particles and the points of a mesh, with fifth-order B-splines.

The definitions are those of `mdgraft.kernels.fused.spreading`: a particle at fractional coordinates
s counts on five points of each axis with weights W, whose derivatives are those in s. A program has
some particles, and all points of each next to each other. Imported when a mesh is first needed,
since Triton is.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

#: Particles of a program.
BLOCK = 4
#: Modes of a program.
MODES = 256
#: Sums that `modulate` finds: the energy, and virials xx, yy, zz, xy, xz, yz.
SUMS = 7


@triton.jit
def _place(s, n):
    """Grid point at or before fractional coordinate s, and the rest."""
    u = (s - tl.floor(s)) * n
    c = tl.floor(u)
    # Not a number for a lost particle.
    c = tl.where(c >= 0, c, 0.0)
    return c.to(tl.int32), u - c


@triton.jit
def _one_of(k, a, b, c, d, e):
    return tl.where(k == 0, a, tl.where(k == 1, b, tl.where(k == 2, c, tl.where(k == 3, d, e))))


@triton.jit
def _third(w):
    """Splines of third order, from which those of higher orders follow as in `pme.spline`."""
    return 0.5 * (1 - w) * (1 - w), 0.5 + w * (1 - w), 0.5 * w * w


@triton.jit
def _fourth(w):
    """Splines of fourth order."""
    a, b, c = _third(w)
    second, third = ((w + 2) * a + (2 - w) * b) / 3, ((w + 1) * b + (3 - w) * c) / 3
    return (1 - w) * a / 3, second, third, w * c / 3


@triton.jit
def _weight(w, k):
    """W at point k."""
    a, b, c, d = _fourth(w)
    return _one_of(
        k,
        0.25 * (1 - w) * a,
        0.25 * ((w + 3) * a + (2 - w) * b),
        0.25 * ((w + 2) * b + (3 - w) * c),
        0.25 * ((w + 1) * c + (4 - w) * d),
        0.25 * w * d,
    )


@triton.jit
def _slope(w, k, n):
    """The first derivative of W at point k."""
    a, b, c, d = _fourth(w)
    return n * _one_of(k, -a, a - b, b - c, c - d, d)


@triton.jit
def _curve(w, k, n):
    """The second derivative of W at point k."""
    a, b, c = _third(w)
    return n * n * _one_of(k, a, b - 2 * a, a - 2 * b + c, b - 2 * c, c)


@triton.jit
def _vector(base, valid):
    x = tl.load(base, mask=valid, other=0).to(tl.float64)
    y = tl.load(base + 1, mask=valid, other=0).to(tl.float64)
    z = tl.load(base + 2, mask=valid, other=0).to(tl.float64)
    return x, y, z


@triton.jit
def _turned(x, y, z, matrix):
    """A vector times a matrix."""
    a = x * tl.load(matrix) + y * tl.load(matrix + 3) + z * tl.load(matrix + 6)
    b = x * tl.load(matrix + 1) + y * tl.load(matrix + 4) + z * tl.load(matrix + 7)
    c = x * tl.load(matrix + 2) + y * tl.load(matrix + 5) + z * tl.load(matrix + 8)
    return a, b, c


@triton.jit
def _point(cx, cy, cz, jx, jy, jz, nx, ny, nz):
    return (((cx + jx) % nx).to(tl.int64) * ny + (cy + jy) % ny) * nz + (cz + jz) % nz


@triton.jit
def _fixed(x, scale):
    """An integer, since sums of integers do not depend on their order."""
    return tl.floor(x.to(tl.float64) * scale + 0.5).to(tl.int64)


@triton.jit(do_not_specialize=["n", "n_blocks"])
def modulate(
    spectra,
    waves,
    shares,
    pairs,
    reciprocals,
    factors,
    decay,
    out,
    sums,
    n,
    n_blocks,
    SIZE: tl.constexpr,
):
    """Spectra times the Coulomb influence of `modes.influence`, and sums by block of modes."""
    program = tl.program_id(0).to(tl.int64)
    frame, block = program // n_blocks, program % n_blocks
    k = block * SIZE + tl.arange(0, SIZE)
    valid = k < n
    place = 2 * (frame * n + k)
    re = tl.load(spectra + place, mask=valid, other=0)
    im = tl.load(spectra + place + 1, mask=valid, other=0)
    a, b = re.to(tl.float64), im.to(tl.float64)
    power = tl.load(pairs + k, mask=valid, other=0) * (a * a + b * b)
    factor, rate = tl.load(factors + frame), tl.load(decay)
    r = reciprocals + frame * 9
    total = tl.zeros([SIZE], tl.float64)
    for mirror in tl.static_range(2):
        x, y, z = _vector(waves + 3 * (mirror * n + k), valid)
        # Rows of R times a vector of waves.
        u = x * tl.load(r) + y * tl.load(r + 1) + z * tl.load(r + 2)
        v = x * tl.load(r + 3) + y * tl.load(r + 4) + z * tl.load(r + 5)
        w = x * tl.load(r + 6) + y * tl.load(r + 7) + z * tl.load(r + 8)
        t = u * u + v * v + w * w
        inverse = 1 / tl.where(t == 0, 1.0, t)
        share = factor * tl.load(shares + mirror * n + k, mask=valid, other=0)
        value = tl.where(t == 0, 0.0, share * tl.exp(-rate * t) * inverse)
        total += value
        slope = -value * (rate + inverse) * power
        start = sums + (program * 2 + mirror) * 7
        tl.store(start, tl.sum(0.5 * value * power))
        tl.store(start + 1, tl.sum(slope * x * x))
        tl.store(start + 2, tl.sum(slope * y * y))
        tl.store(start + 3, tl.sum(slope * z * z))
        tl.store(start + 4, tl.sum(slope * x * y))
        tl.store(start + 5, tl.sum(slope * x * z))
        tl.store(start + 6, tl.sum(slope * y * z))
    weight = total.to(re.dtype)
    tl.store(out + place, weight * re, mask=valid)
    tl.store(out + place + 1, weight * im, mask=valid)


@triton.jit(do_not_specialize=["n", "nx", "ny", "nz", "n_blocks"])
def spread(
    positions, reciprocals, strengths, scales, meshes, n, nx, ny, nz, n_blocks, SIZE: tl.constexpr
):
    """Add Q to the meshes, which are integers: numbers times the scale of their frame."""
    program = tl.program_id(0).to(tl.int64)
    frame = program // n_blocks
    i = ((program % n_blocks) * SIZE + tl.arange(0, SIZE))[:, None]
    valid = i < n
    x, y, z = _vector(positions + (frame * n + i) * 3, valid)
    sx, sy, sz = _turned(x, y, z, reciprocals + frame * 9)
    cx, wx = _place(sx, nx)
    cy, wy = _place(sy, ny)
    cz, wz = _place(sz, nz)
    q = tl.load(strengths + frame * n + i, mask=valid, other=0)
    kind = q.dtype
    k = tl.arange(0, 128)[None, :]
    jx, jy, jz = k // 25, (k // 5) % 5, k % 5
    weight = _weight(wx.to(kind), jx) * _weight(wy.to(kind), jy) * _weight(wz.to(kind), jz)
    place = meshes + frame * nx * ny * nz + _point(cx, cy, cz, jx, jy, jz, nx, ny, nz)
    value = _fixed(q * weight, tl.load(scales + frame))
    tl.atomic_add(place, value, mask=valid & (k < 125), sem="relaxed")


@triton.jit(do_not_specialize=["n", "nx", "ny", "nz", "n_blocks"])
def gather(positions, reciprocals, potentials, out, n, nx, ny, nz, n_blocks, SIZE: tl.constexpr):
    """Sums of W phi and of its derivatives in s, ``(F, N, 4)``."""
    program = tl.program_id(0).to(tl.int64)
    frame = program // n_blocks
    i = ((program % n_blocks) * SIZE + tl.arange(0, SIZE))[:, None]
    valid = i < n
    x, y, z = _vector(positions + (frame * n + i) * 3, valid)
    sx, sy, sz = _turned(x, y, z, reciprocals + frame * 9)
    cx, wx = _place(sx, nx)
    cy, wy = _place(sy, ny)
    cz, wz = _place(sz, nz)
    k = tl.arange(0, 128)[None, :]
    jx, jy, jz = k // 25, (k // 5) % 5, k % 5
    place = potentials + frame * nx * ny * nz + _point(cx, cy, cz, jx, jy, jz, nx, ny, nz)
    phi = tl.load(place, mask=valid & (k < 125), other=0)
    kind = phi.dtype
    ux, uy, uz = wx.to(kind), wy.to(kind), wz.to(kind)
    ax, ay, az = _weight(ux, jx), _weight(uy, jy), _weight(uz, jz)
    target = out + (frame * n + i) * 4
    total = tl.sum(ax * ay * az * phi, axis=1, keep_dims=True)
    in_x = tl.sum(_slope(ux, jx, nx) * ay * az * phi, axis=1, keep_dims=True)
    in_y = tl.sum(ax * _slope(uy, jy, ny) * az * phi, axis=1, keep_dims=True)
    in_z = tl.sum(ax * ay * _slope(uz, jz, nz) * phi, axis=1, keep_dims=True)
    tl.store(target, total, mask=valid)
    tl.store(target + 1, in_x, mask=valid)
    tl.store(target + 2, in_y, mask=valid)
    tl.store(target + 3, in_z, mask=valid)


@triton.jit
def _moved(positions, shifts, reciprocals, turns, frame, i, n, valid):
    """Fractional coordinates s = x R, and their change dx R + x dR."""
    x, y, z = _vector(positions + (frame * n + i) * 3, valid)
    dx, dy, dz = _vector(shifts + (frame * n + i) * 3, valid)
    sx, sy, sz = _turned(x, y, z, reciprocals + frame * 9)
    ax, ay, az = _turned(dx, dy, dz, reciprocals + frame * 9)
    bx, by, bz = _turned(x, y, z, turns + frame * 9)
    return sx, sy, sz, ax + bx, ay + by, az + bz


@triton.jit(do_not_specialize=["n", "nx", "ny", "nz", "n_blocks"])
def spread_tangent(
    positions,
    shifts,
    reciprocals,
    turns,
    strengths,
    charges,
    scales,
    meshes,
    n,
    nx,
    ny,
    nz,
    n_blocks,
    SIZE: tl.constexpr,
):
    """Add the change of Q to the meshes, as `spread` adds Q."""
    program = tl.program_id(0).to(tl.int64)
    frame = program // n_blocks
    i = ((program % n_blocks) * SIZE + tl.arange(0, SIZE))[:, None]
    valid = i < n
    sx, sy, sz, tx, ty, tz = _moved(positions, shifts, reciprocals, turns, frame, i, n, valid)
    cx, wx = _place(sx, nx)
    cy, wy = _place(sy, ny)
    cz, wz = _place(sz, nz)
    q = tl.load(strengths + frame * n + i, mask=valid, other=0)
    dq = tl.load(charges + frame * n + i, mask=valid, other=0)
    kind = q.dtype
    k = tl.arange(0, 128)[None, :]
    jx, jy, jz = k // 25, (k // 5) % 5, k % 5
    ux, uy, uz = wx.to(kind), wy.to(kind), wz.to(kind)
    ax, ay, az = _weight(ux, jx), _weight(uy, jy), _weight(uz, jz)
    dax = tx.to(kind) * _slope(ux, jx, nx)
    day = ty.to(kind) * _slope(uy, jy, ny)
    daz = tz.to(kind) * _slope(uz, jz, nz)
    change = dq * (ax * ay * az) + q * (dax * ay * az + ax * day * az + ax * ay * daz)
    place = meshes + frame * nx * ny * nz + _point(cx, cy, cz, jx, jy, jz, nx, ny, nz)
    value = _fixed(change, tl.load(scales + frame))
    tl.atomic_add(place, value, mask=valid & (k < 125), sem="relaxed")


@triton.jit(do_not_specialize=["n", "nx", "ny", "nz", "n_blocks"])
def gather_tangent(
    positions,
    shifts,
    reciprocals,
    turns,
    potentials,
    changes,
    out,
    n,
    nx,
    ny,
    nz,
    n_blocks,
    SIZE: tl.constexpr,
):
    """Derivatives of the sums in s, then changes of all that `gather` finds, ``(F, N, 7)``."""
    program = tl.program_id(0).to(tl.int64)
    frame = program // n_blocks
    i = ((program % n_blocks) * SIZE + tl.arange(0, SIZE))[:, None]
    valid = i < n
    sx, sy, sz, tx, ty, tz = _moved(positions, shifts, reciprocals, turns, frame, i, n, valid)
    cx, wx = _place(sx, nx)
    cy, wy = _place(sy, ny)
    cz, wz = _place(sz, nz)
    k = tl.arange(0, 128)[None, :]
    jx, jy, jz = k // 25, (k // 5) % 5, k % 5
    place = frame * nx * ny * nz + _point(cx, cy, cz, jx, jy, jz, nx, ny, nz)
    used = valid & (k < 125)
    phi = tl.load(potentials + place, mask=used, other=0)
    dphi = tl.load(changes + place, mask=used, other=0)
    kind = phi.dtype
    ux, uy, uz = wx.to(kind), wy.to(kind), wz.to(kind)
    vx, vy, vz = tx.to(kind), ty.to(kind), tz.to(kind)
    # Weights, their derivatives, and the changes of both, on each axis.
    ax, ay, az = _weight(ux, jx), _weight(uy, jy), _weight(uz, jz)
    bx, by, bz = _slope(ux, jx, nx), _slope(uy, jy, ny), _slope(uz, jz, nz)
    dax, day, daz = vx * bx, vy * by, vz * bz
    dbx, dby, dbz = vx * _curve(ux, jx, nx), vy * _curve(uy, jy, ny), vz * _curve(uz, jz, nz)
    d_xyz = dax * ay * az + ax * day * az + ax * ay * daz
    d_x = dbx * ay * az + bx * day * az + bx * ay * daz
    d_y = dax * by * az + ax * dby * az + ax * by * daz
    d_z = dax * ay * bz + ax * day * bz + ax * ay * dbz
    target = out + (frame * n + i) * 7
    tl.store(target, tl.sum(bx * ay * az * phi, axis=1, keep_dims=True), mask=valid)
    tl.store(target + 1, tl.sum(ax * by * az * phi, axis=1, keep_dims=True), mask=valid)
    tl.store(target + 2, tl.sum(ax * ay * bz * phi, axis=1, keep_dims=True), mask=valid)
    value = tl.sum(d_xyz * phi + ax * ay * az * dphi, axis=1, keep_dims=True)
    tl.store(target + 3, value, mask=valid)
    in_x = tl.sum(d_x * phi + bx * ay * az * dphi, axis=1, keep_dims=True)
    in_y = tl.sum(d_y * phi + ax * by * az * dphi, axis=1, keep_dims=True)
    in_z = tl.sum(d_z * phi + ax * ay * bz * dphi, axis=1, keep_dims=True)
    tl.store(target + 4, in_x, mask=valid)
    tl.store(target + 5, in_y, mask=valid)
    tl.store(target + 6, in_z, mask=valid)
