"""Energy terms as torch modules, and the potential that sums them."""

from mdgraft.potentials.potential import Potential as Potential
from mdgraft.potentials.potential import is_reserved as is_reserved
from mdgraft.potentials.term import AbstractTerm as AbstractTerm
