"""Op of one decoding step of the gated delta net: convolution, gates and delta rule."""
