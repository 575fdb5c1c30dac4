"""Ops of the mixture of experts: the router, and SwiGLU with routing weights."""
