"""Interatomic potentials over all periodic images, in any cell, as materials codes have them."""
