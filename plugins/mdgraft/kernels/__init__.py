"""Neighbour lists, periodic images and Ewald sums: the low-level code that terms are made of."""
