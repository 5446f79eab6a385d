"""OpenMM adapter: System to Potential, write-back, sampling."""

from mdgraft_openmm.constraint_set import HostProjection as HostProjection
from mdgraft_openmm.constraint_set import constraints as constraints
from mdgraft_openmm.context_energy import ContextEnergy as ContextEnergy
from mdgraft_openmm.export.to_force import explain_backends as explain_backends
from mdgraft_openmm.export.to_force import to_force as to_force
from mdgraft_openmm.forces.drude import drude_particles as drude_particles
from mdgraft_openmm.host_potential import HostPotential as HostPotential
from mdgraft_openmm.hybrid_monte_carlo import HybridMonteCarlo as HybridMonteCarlo
from mdgraft_openmm.mixed import mixed_system as mixed_system
from mdgraft_openmm.sampler import Sampler as Sampler
from mdgraft_openmm.write import write_parameters as write_parameters
