"""Attention over packed documents: the reference, CUDA, and its form on the meta device."""
