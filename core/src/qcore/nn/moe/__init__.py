"""Mixture of experts: sorting tokens by expert, expert linear layers, and their Triton kernels."""
