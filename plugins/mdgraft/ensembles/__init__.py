"""Ensemble averages, their gradients with respect to parameters, and the errors of both."""

from mdgraft.ensembles.bootstrap import moving_block_bootstrap as moving_block_bootstrap
from mdgraft.ensembles.constrained_length import length_derivative as length_derivative
from mdgraft.ensembles.constrained_length import length_mean_force as length_mean_force
from mdgraft.ensembles.covariance import Covariance as Covariance
from mdgraft.ensembles.ensemble import Ensemble as Ensemble
from mdgraft.ensembles.fluctuations import heat_capacity as heat_capacity
from mdgraft.ensembles.fluctuations import isothermal_compressibility as isothermal_compressibility
from mdgraft.ensembles.fluctuations import thermal_expansion as thermal_expansion
from mdgraft.ensembles.frame_derivatives import FrameDerivatives as FrameDerivatives
from mdgraft.ensembles.frame_derivatives import frame_derivatives as frame_derivatives
from mdgraft.ensembles.observables import Density as Density
from mdgraft.ensembles.observables import Enthalpy as Enthalpy
from mdgraft.ensembles.observables import PotentialEnergy as PotentialEnergy
from mdgraft.ensembles.observables import Stack as Stack
from mdgraft.ensembles.observables import Volume as Volume
from mdgraft.ensembles.overlap import Overlap as Overlap
from mdgraft.ensembles.overlap import entropy_sample_size as entropy_sample_size
from mdgraft.ensembles.overlap import kish_sample_size as kish_sample_size
from mdgraft.ensembles.overlap import pareto_k as pareto_k
from mdgraft.ensembles.per_frame import per_frame_gradients as per_frame_gradients
from mdgraft.ensembles.statistics import Equilibration as Equilibration
from mdgraft.ensembles.statistics import autocovariance as autocovariance
from mdgraft.ensembles.statistics import decorrelate as decorrelate
from mdgraft.ensembles.statistics import detect_equilibration as detect_equilibration
from mdgraft.ensembles.statistics import standard_error as standard_error
from mdgraft.ensembles.statistics import statistical_inefficiency as statistical_inefficiency
from mdgraft.ensembles.sufficient_statistics import (
    SufficientStatistics as SufficientStatistics,
)
