"""What surrounds attention: norms and rope of queries and keys, the output gate."""
