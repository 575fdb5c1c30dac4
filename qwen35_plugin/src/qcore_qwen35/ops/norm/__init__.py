"""Ops of the norms: RMSNorm, RMSNorm after a residual addition, gated RMSNorm."""
