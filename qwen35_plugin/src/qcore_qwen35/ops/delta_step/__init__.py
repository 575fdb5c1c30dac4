"""One token of one document through convolution, gates and delta rule; see `reference`."""
