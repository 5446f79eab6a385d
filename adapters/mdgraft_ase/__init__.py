"""ASE adapter: calculators to Potential, Potential to calculator."""

from mdgraft_ase._units import positions_and_box as positions_and_box
from mdgraft_ase.atoms import atoms_from_openmm as atoms_from_openmm
from mdgraft_ase.calculator import MDGraftCalculator as MDGraftCalculator
from mdgraft_ase.calculator_energy import CalculatorEnergy as CalculatorEnergy
from mdgraft_ase.constraint_set import constraints as constraints
from mdgraft_ase.host_potential import HostPotential as HostPotential
from mdgraft_ase.stress import stress as stress
from mdgraft_ase.stress import stress_tensor as stress_tensor
from mdgraft_ase.write import write_parameters as write_parameters
