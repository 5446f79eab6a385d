"""Small systems with exact answers: energy, sampler, closed form."""

from mdgraft.testsystems.harmonic import HarmonicOscillators as HarmonicOscillators
from mdgraft.testsystems.ideal_gas import IdealGas as IdealGas
