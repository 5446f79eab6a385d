"""Virtual sites of a System."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import openmm
from mdgraft import UnsupportedForceError
from mdgraft.constraints.virtual_sites import (
    AbstractSite,
    AverageSite,
    LocalCoordinatesSite,
    OutOfPlaneSite,
    SymmetrySite,
    VirtualSites,
)

from mdgraft_openmm._converter import number


def read_sites(system: openmm.System) -> VirtualSites | None:
    """The system's virtual sites, or None when it has none.

    Raises
    ------
    UnsupportedForceError
        For a class of virtual site that has no torch form, or that cannot be read.
    InvalidInputError
        If definitions are circular or name particles that do not exist.
    """
    sites: dict[int, AbstractSite] = {}
    elements: dict[int, Element] = {}
    for i in range(system.getNumParticles()):
        if not system.isVirtualSite(i):
            continue
        site = system.getVirtualSite(i)
        name = type(site).__name__
        read = _READERS.get(name)
        if name == "VirtualSite":
            # OpenMM's Python layer hands out some classes as their base; the XML is complete.
            elements = elements or _elements(system)
            site = elements[i]
            name = site.tag
            read = _XML_READERS.get(name)
        if read is None:
            raise UnsupportedForceError(
                f"host_object: particle {i} is a virtual site of class {name}, which has no "
                f"native torch form; native are {', '.join(sorted(_READERS))}"
            )
        sites[i] = read(site)
    return VirtualSites(sites, n_particles=system.getNumParticles()) if sites else None


def _elements(system: openmm.System) -> dict[int, Element]:
    """Definitions of all virtual sites as OpenMM serialises them."""
    try:
        xml = openmm.XmlSerializer.serialize(system)
    except openmm.OpenMMException as error:
        raise UnsupportedForceError(
            "host_object: has virtual sites that OpenMM's Python layer reveals only where it can "
            f"serialise the System, and it cannot ({error}); define functions at the top level of "
            "a module, so that they can be pickled"
        ) from error
    end = "</Particles>"
    particles = fromstring(xml[xml.index("<Particles>") : xml.index(end) + len(end)])
    return {i: particle[0] for i, particle in enumerate(particles) if len(particle)}


def _parents(site: Any) -> tuple[int, ...]:
    return tuple(site.getParticle(k) for k in range(site.getNumParticles()))


def _numbers(vector: Any) -> tuple[float, ...]:
    return tuple(number(component) for component in vector)


def _average(site: Any) -> AverageSite:
    parents = _parents(site)
    weights = tuple(number(site.getWeight(k)) for k in range(len(parents)))
    return AverageSite(parents=parents, weights=weights)


def _out_of_plane(site: Any) -> OutOfPlaneSite:
    return OutOfPlaneSite(
        parents=_parents(site),
        weight12=number(site.getWeight12()),
        weight13=number(site.getWeight13()),
        weight_cross=number(site.getWeightCross()),
    )


def _local_coordinates(site: Any) -> LocalCoordinatesSite:
    return LocalCoordinatesSite(
        parents=_parents(site),
        origin_weights=_numbers(site.getOriginWeights()),
        x_weights=_numbers(site.getXWeights()),
        y_weights=_numbers(site.getYWeights()),
        local_position=_numbers(site.getLocalPosition()),
    )


def _symmetry(site: Any) -> SymmetrySite:
    return SymmetrySite(
        parents=_parents(site),
        rotation=tuple(_numbers(row) for row in site.getRotationMatrix()),
        offset=_numbers(site.getOffsetVector()),
        fractional=bool(site.getUseBoxVectors()),
    )


def _symmetry_from_xml(element: Element) -> SymmetrySite:
    def numbers(prefix: str) -> tuple[float, ...]:
        return tuple(float(element.attrib[prefix + axis]) for axis in "xyz")

    return SymmetrySite(
        parents=(int(element.attrib["p"]),),
        rotation=tuple(numbers(f"R{row}") for row in "xyz"),
        offset=numbers("v"),
        fractional=element.attrib["useBoxVectors"] == "1",
    )


_READERS: dict[str, Callable[[Any], AbstractSite]] = {
    "TwoParticleAverageSite": _average,
    "ThreeParticleAverageSite": _average,
    "OutOfPlaneSite": _out_of_plane,
    "LocalCoordinatesSite": _local_coordinates,
    "SymmetrySite": _symmetry,
}
_XML_READERS: dict[str, Callable[[Any], AbstractSite]] = {"SymmetrySite": _symmetry_from_xml}
