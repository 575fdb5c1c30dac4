"""The norms of the family."""
