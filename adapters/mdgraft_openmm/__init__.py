"""OpenMM adapter: System to Potential, write-back, sampling."""

from mdgraft_openmm.forces.drude import drude_particles as drude_particles
from mdgraft_openmm.host_potential import HostPotential as HostPotential
from mdgraft_openmm.sampler import Sampler as Sampler
from mdgraft_openmm.write import write_parameters as write_parameters
