"""Mixture of experts: routing, grouped linear maps and their Triton kernels."""
