"""`qcore merge`: a base and an adapter to a checkpoint, verified."""
