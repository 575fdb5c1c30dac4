"""Kernel backends of ops: `registry` chooses them, `judge` verifies them, `launch` runs Triton."""
