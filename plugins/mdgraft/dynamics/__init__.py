"""Integrators as differentiable maps, one method a file."""

from mdgraft.dynamics.langevin_middle import LangevinMiddle as LangevinMiddle
from mdgraft.dynamics.state import Forces as Forces
from mdgraft.dynamics.state import State as State
from mdgraft.dynamics.velocity_verlet import VelocityVerlet as VelocityVerlet
