"""Positions that are functions of other positions, and projections onto constraints."""

from mdgraft.constraints.virtual_sites import AbstractSite as AbstractSite
from mdgraft.constraints.virtual_sites import AverageSite as AverageSite
from mdgraft.constraints.virtual_sites import LocalCoordinatesSite as LocalCoordinatesSite
from mdgraft.constraints.virtual_sites import OutOfPlaneSite as OutOfPlaneSite
from mdgraft.constraints.virtual_sites import SymmetrySite as SymmetrySite
from mdgraft.constraints.virtual_sites import VirtualSites as VirtualSites
