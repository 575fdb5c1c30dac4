"""Op of the delta rule's inputs: causal convolution, decay and write strength."""
