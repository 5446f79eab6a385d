"""Neural potentials: energy models of atoms, a reference network, and wrappers of others."""

from mdgraft.neural.chgnet import CHGNetModel as CHGNetModel
from mdgraft.neural.mace import MACEModel as MACEModel
from mdgraft.neural.matgl import MatGLModel as MatGLModel
from mdgraft.neural.model import AtomicInputs as AtomicInputs
from mdgraft.neural.model import AtomicModel as AtomicModel
from mdgraft.neural.nequip import NequIPModel as NequIPModel
from mdgraft.neural.network import MessagePassingNetwork as MessagePassingNetwork
from mdgraft.neural.schnetpack import SchNetPackModel as SchNetPackModel
from mdgraft.neural.sevennet import SevenNetModel as SevenNetModel
from mdgraft.neural.term import NeuralTerm as NeuralTerm
from mdgraft.neural.term import neural_potential as neural_potential
from mdgraft.neural.torchani import TorchANIModel as TorchANIModel
from mdgraft.neural.torchmdnet import TorchMDNetModel as TorchMDNetModel
from mdgraft.neural.units import ModelUnits as ModelUnits
