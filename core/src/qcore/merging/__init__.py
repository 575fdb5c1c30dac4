"""`qcore merge`: writes base + adapter as a checkpoint and proves that it computes the same."""
