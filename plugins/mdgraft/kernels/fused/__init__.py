"""Compiled kernels: energies with their derivatives in one pass.

Formulas are written once (`graph`), differentiated, and compiled for the processor's vectors
(`emit`, `jit`) into loops over tiles of particles (`tiles`, `clusters`). Nothing here is imported
before a kernel is needed.
"""
