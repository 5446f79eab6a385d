"""The Lepton language: expressions as users of custom forces write them, evaluated in torch."""

from mdgraft.lepton.expression import Expression as Expression
from mdgraft.lepton.syntax import Call as Call
from mdgraft.lepton.tabulated import ContinuousTable as ContinuousTable
from mdgraft.lepton.tabulated import DiscreteTable as DiscreteTable
from mdgraft.lepton.tabulated import TabulatedFunction as TabulatedFunction
