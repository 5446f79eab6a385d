"""ASE adapter: calculators to Potential, Potential to calculator."""
