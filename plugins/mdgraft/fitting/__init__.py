"""Fitting a potential's parameters to ensemble averages and reference data."""

from mdgraft.fitting.config import FitConfig as FitConfig
from mdgraft.fitting.config import load_config as load_config
from mdgraft.fitting.host import AbstractSimulation as AbstractSimulation
from mdgraft.fitting.host import Atoms as Atoms
from mdgraft.fitting.run import FitResult as FitResult
from mdgraft.fitting.run import run as run
