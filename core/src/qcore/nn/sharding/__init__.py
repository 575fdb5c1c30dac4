"""Sharded base: each rank holds some rows of the weights of a layer, and gathers them to run it."""
