"""Kernels for GPUs: the formulas of `mdgraft.kernels.fused`, written as Triton programs.

Formulas, their derivatives and the functions in them are those that CPUs run; only the last step is
another one (`writer`). Triton comes with PyTorch's CUDA wheels and is imported when a kernel is
first needed.
"""
