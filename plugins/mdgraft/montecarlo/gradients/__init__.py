"""Gradients of averages over Markov chains, one estimator a file."""

from mdgraft.montecarlo.gradients.acceptance import RaoBlackwell as RaoBlackwell
from mdgraft.montecarlo.gradients.averages import estimate_average as estimate_average
from mdgraft.montecarlo.gradients.base import AbstractGradient as AbstractGradient
from mdgraft.montecarlo.gradients.branches import Coalescence as Coalescence
from mdgraft.montecarlo.gradients.branching import CoupledRun as CoupledRun
from mdgraft.montecarlo.gradients.coupled import Coupled as Coupled
from mdgraft.montecarlo.gradients.couplings import AbstractCoupling as AbstractCoupling
from mdgraft.montecarlo.gradients.couplings import CommonRandomNumbers as CommonRandomNumbers
from mdgraft.montecarlo.gradients.couplings import ReflectionMaximal as ReflectionMaximal
from mdgraft.montecarlo.gradients.covariance import Covariance as Covariance
from mdgraft.montecarlo.gradients.grand_canonical import Insertion as Insertion
from mdgraft.montecarlo.gradients.objectives import AbstractObjective as AbstractObjective
from mdgraft.montecarlo.gradients.objectives import Acceptance as Acceptance
from mdgraft.montecarlo.gradients.objectives import SquaredJump as SquaredJump
from mdgraft.montecarlo.gradients.observing import ChainObservable as ChainObservable
from mdgraft.montecarlo.gradients.reparameterized import Reparameterized as Reparameterized
from mdgraft.montecarlo.gradients.run import AbstractRun as AbstractRun
from mdgraft.montecarlo.gradients.score import AbstractBaseline as AbstractBaseline
from mdgraft.montecarlo.gradients.score import MeanBaseline as MeanBaseline
from mdgraft.montecarlo.gradients.score import PastBaseline as PastBaseline
from mdgraft.montecarlo.gradients.score import Score as Score
from mdgraft.montecarlo.gradients.tangents import Tangents as Tangents
