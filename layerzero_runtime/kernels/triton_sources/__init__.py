"""Kernels in the language of Triton. Imported by the loaders of the adapters beside this package alone.

A kernel's parameters come in this order, which `layerzero_runtime.kernels.triton_launch` relies on: pointers (None for
a tensor that the call does not have), numbers by whose divisibility a kernel gains (strides and widths), other numbers,
constants of compilation.
"""
