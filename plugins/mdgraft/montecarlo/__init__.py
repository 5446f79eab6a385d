"""Monte Carlo: samplers, moves, and gradients through them."""

from mdgraft.montecarlo.by_number import PotentialByNumber as PotentialByNumber
from mdgraft.montecarlo.hmc import HMC as HMC
from mdgraft.montecarlo.mala import MALA as MALA
from mdgraft.montecarlo.metropolis import Metropolis as Metropolis
from mdgraft.montecarlo.metropolis import MoveStatistics as MoveStatistics
from mdgraft.montecarlo.metropolis import Recording as Recording
from mdgraft.montecarlo.moves import AbstractGaussianMove as AbstractGaussianMove
from mdgraft.montecarlo.moves import AbstractMove as AbstractMove
from mdgraft.montecarlo.moves import Displacement as Displacement
from mdgraft.montecarlo.moves import IdentitySwap as IdentitySwap
from mdgraft.montecarlo.moves import InsertionDeletion as InsertionDeletion
from mdgraft.montecarlo.moves import Mixture as Mixture
from mdgraft.montecarlo.moves import Proposal as Proposal
from mdgraft.montecarlo.moves import Rotation as Rotation
from mdgraft.montecarlo.moves import Sequence as Sequence
from mdgraft.montecarlo.moves import SiteChange as SiteChange
from mdgraft.montecarlo.moves import Torsion as Torsion
from mdgraft.montecarlo.moves import Translation as Translation
from mdgraft.montecarlo.moves import Volume as Volume
from mdgraft.montecarlo.samples import Samples as Samples
from mdgraft.montecarlo.samples import Update as Update
from mdgraft.montecarlo.state import ChainState as ChainState
from mdgraft.montecarlo.target import Target as Target
from mdgraft.montecarlo.transition import Transition as Transition
from mdgraft.montecarlo.transition import transition as transition
from mdgraft.montecarlo.ula import ULA as ULA
