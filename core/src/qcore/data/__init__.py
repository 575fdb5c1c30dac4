"""Rows to labelled tokens: sources, formats, repairs, checks, samples, masks, packs."""
