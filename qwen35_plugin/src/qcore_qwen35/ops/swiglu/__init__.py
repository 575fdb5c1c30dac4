"""Op of the SwiGLU feed-forward layer: ``silu(gate) * up``."""
