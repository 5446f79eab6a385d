"""Energy terms as torch modules, and the potential that sums them."""

from mdgraft.potentials.potential import Potential as Potential
from mdgraft.potentials.potential import is_reserved as is_reserved
from mdgraft.potentials.self_consistent import SelfConsistent as SelfConsistent
from mdgraft.potentials.term import AbstractTerm as AbstractTerm
