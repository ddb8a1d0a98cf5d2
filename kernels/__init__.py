"""Triton kernels, one module per family of operators: the portable GPU backend, also run by Triton's interpreter."""
