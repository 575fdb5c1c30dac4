"""Ops around attention: norm and rope of queries and keys, and the output gate."""
