"""Positions that are functions of other positions, and projections onto constraints."""

from mdgraft.constraints.constraint_set import ConstraintSet as ConstraintSet
from mdgraft.constraints.constraint_set import Projection as Projection
from mdgraft.constraints.host_projection import HostProjection as HostProjection
from mdgraft.constraints.metric import Fixman as Fixman
from mdgraft.constraints.metric import fixman_potential as fixman_potential
from mdgraft.constraints.metric import length_response as length_response
from mdgraft.constraints.metric import log_metric_determinant as log_metric_determinant
from mdgraft.constraints.metric import metric_response as metric_response
from mdgraft.constraints.newton import Newton as Newton
from mdgraft.constraints.virtual_sites import AbstractSite as AbstractSite
from mdgraft.constraints.virtual_sites import AverageSite as AverageSite
from mdgraft.constraints.virtual_sites import LocalCoordinatesSite as LocalCoordinatesSite
from mdgraft.constraints.virtual_sites import OutOfPlaneSite as OutOfPlaneSite
from mdgraft.constraints.virtual_sites import SymmetrySite as SymmetrySite
from mdgraft.constraints.virtual_sites import VirtualSites as VirtualSites
