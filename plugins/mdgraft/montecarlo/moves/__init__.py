"""Monte Carlo moves, one a file."""

from mdgraft.montecarlo.moves.base import AbstractGaussianMove as AbstractGaussianMove
from mdgraft.montecarlo.moves.base import AbstractMove as AbstractMove
from mdgraft.montecarlo.moves.base import Proposal as Proposal
from mdgraft.montecarlo.moves.displacement import Displacement as Displacement
from mdgraft.montecarlo.moves.identity_swap import IdentitySwap as IdentitySwap
from mdgraft.montecarlo.moves.insertion_deletion import InsertionDeletion as InsertionDeletion
from mdgraft.montecarlo.moves.mixture import Mixture as Mixture
from mdgraft.montecarlo.moves.rotation import Rotation as Rotation
from mdgraft.montecarlo.moves.sequence import Sequence as Sequence
from mdgraft.montecarlo.moves.site_change import SiteChange as SiteChange
from mdgraft.montecarlo.moves.torsion import Torsion as Torsion
from mdgraft.montecarlo.moves.translation import Translation as Translation
from mdgraft.montecarlo.moves.volume import Volume as Volume
