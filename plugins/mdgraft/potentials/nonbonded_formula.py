"""Lennard-Jones and Coulomb pairs as formulas for the compiled loop over pairs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.fused import tables
from mdgraft.kernels.fused.clusters import Exclusions
from mdgraft.kernels.fused.graph import Graph, Node, Series
from mdgraft.kernels.fused.pair_formulas import PairFormula
from mdgraft.kernels.kernel import Kernel
from mdgraft.potentials.exception_formulas import dispersion_damping

if TYPE_CHECKING:
    from mdgraft.potentials.nonbonded import NonbondedSettings

#: Derivative-free numbers of the formulas.
CONSTANTS = ("cutoff", "alpha", "dispersion_alpha")


def switch(distance: Node, start: Node, cutoff: Node) -> Node:
    """The switching function of `pair_forms.switch`."""
    t = (distance - start) / (cutoff - start)
    return t.graph.select(t > 0, 1 - t**3 * (10 - t * (15 - 6 * t)), 1.0)


@functools.lru_cache(maxsize=64)
def nonbonded_formula(
    *,
    electrostatics: str,
    switched: bool,
    dispersion: bool,
    degree: int | None,
    dispersion_degree: int | None,
) -> PairFormula:
    """The energy of a pair [kJ/mol] as a function of u = r^2.

    Particles have ``charge`` [e, times the square root of 1/(4 pi eps0)], ``radius`` = sigma/2
    [nm], ``depth`` = 2 sqrt(epsilon) and, with a dispersion mesh, ``c6``.

    Parameters
    ----------
    electrostatics
        ``"coulomb"``, ``"reaction field"`` or ``"ewald"``.
    switched
        Whether the Lennard-Jones interaction goes to zero smoothly.
    dispersion
        Whether there is a dispersion mesh.
    degree, dispersion_degree
        Of the polynomials for the meshes' shares; None for their closed forms, which take longer.
    """
    shared: tuple[str, ...] = ("switching_distance",) if switched else ()
    if electrostatics == "reaction field":
        shared += ("dielectric",)
    particle = ("charge", "radius", "depth") + (("c6",) if dispersion else ())

    def energy(
        graph: Graph,
        u: Node,
        first: Mapping[str, Node],
        second: Mapping[str, Node],
        common: Mapping[str, Node],
    ) -> Node:
        cutoff = common["cutoff"]
        inverse = graph.rsqrt(u)
        inverse2 = inverse * inverse
        sigma = first["radius"] + second["radius"]
        epsilon4 = first["depth"] * second["depth"]
        x = (sigma * sigma * inverse2) ** 3
        lennard_jones = epsilon4 * x * (x - 1)
        if dispersion:
            # What the mesh attracts is taken back, and a constant closes the step at the cutoff.
            alpha2 = common["dispersion_alpha"] * common["dispersion_alpha"]

            def mesh_share(square: Node) -> Node:
                if dispersion_degree is None:
                    return alpha2**3 * dispersion_damping(alpha2 * square)
                series = Series("dispersion", dispersion_degree)
                return 0.5 * alpha2**3 * graph.series(series, square)

            share, cutoff2 = mesh_share(u), cutoff * cutoff
            at_cutoff = mesh_share(cutoff2)
            y = (sigma * sigma / cutoff2) ** 3
            c6 = first["c6"] * second["c6"]
            lennard_jones = lennard_jones + c6 * (share - at_cutoff) - epsilon4 * y * (y - 1)
        elif switched:
            lennard_jones = lennard_jones * switch(
                u * inverse, common["switching_distance"], cutoff
            )
        charges = first["charge"] * second["charge"]
        if electrostatics == "coulomb":
            screened = inverse
        elif electrostatics == "reaction field":
            dielectric = common["dielectric"]
            k = (dielectric - 1) / (2 * dielectric + 1) / cutoff**3
            c = 3 * dielectric / (2 * dielectric + 1) / cutoff
            screened = inverse + k * u - c
        elif degree is None:
            screened = graph.apply("erfc", common["alpha"] * (u * inverse)) * inverse
        else:
            # erfc(alpha r)/r = 1/r - alpha B_1/2(alpha^2 r^2)/sqrt(pi), without an exponential.
            mesh = graph.series(Series("coulomb", degree), u)
            screened = inverse - common["alpha"] * (1 / math.sqrt(math.pi)) * mesh
        return lennard_jones + charges * screened

    return PairFormula(particle=particle, shared=shared, constants=CONSTANTS, energy=energy)


def nonbonded_kernel(
    settings: NonbondedSettings,
    exceptions: np.ndarray,
    *,
    switched: bool,
    dtype: torch.dtype,
    make: Callable[..., Kernel],
    n_particles: int,
    reference: Callable[..., Tensor],
) -> Kernel:
    """The compiled loop over pairs of a nonbonded term.

    Parameters
    ----------
    settings
        Of the term.
    exceptions
        ``(exceptions, 2)`` pairs that are left out.
    switched
        Whether there is a switching distance.
    dtype
        Precision, which decides on the degrees of polynomials.
    make
        From `mdgraft.kernels.routes.pair_kernel`.
    n_particles
        Number of particles.
    reference
        A plain torch form of the same energy.
    """
    accuracy = 1e-14 if dtype == torch.float64 else 3e-8
    alphas = {"coulomb": settings.alpha, "dispersion": settings.dispersion_alpha}
    ewald, mesh = settings.method.ewald, settings.dispersion_alpha > 0
    degrees = {
        name: tables.degree(name, alphas[name], settings.cutoff, accuracy) if on else None
        for name, on in (("coulomb", ewald), ("dispersion", mesh))
    }
    electrostatics = "reaction field"
    if math.isinf(settings.cutoff):
        electrostatics = "coulomb"
    elif ewald:
        electrostatics = "ewald"
    formula = nonbonded_formula(
        electrostatics=electrostatics,
        switched=switched,
        dispersion=mesh,
        degree=degrees["coulomb"],
        dispersion_degree=degrees["dispersion"],
    )
    constants = (settings.cutoff, settings.alpha, settings.dispersion_alpha)
    return make(
        formula,
        cutoff=settings.cutoff,
        exclusions=Exclusions.of_pairs(exceptions, n_particles),
        constants=dict(zip(CONSTANTS, constants, strict=True)),
        table=lambda series: tables.coefficients(series, alphas[series.name], settings.cutoff),
        reference=reference,
    )
