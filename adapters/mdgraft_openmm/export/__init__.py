"""Torch energies as OpenMM Forces."""

from mdgraft_openmm.export.to_force import to_force as to_force
