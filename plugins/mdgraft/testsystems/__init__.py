"""Small systems with exact answers: energy, sampler, closed form."""

from mdgraft.testsystems.gaussian import GaussianTarget as GaussianTarget
from mdgraft.testsystems.grand_canonical import GrandCanonicalIdealGas as GrandCanonicalIdealGas
from mdgraft.testsystems.harmonic import HarmonicOscillators as HarmonicOscillators
from mdgraft.testsystems.ideal_gas import IdealGas as IdealGas
from mdgraft.testsystems.ising import IsingLattice as IsingLattice
from mdgraft.testsystems.langmuir import LangmuirSites as LangmuirSites
