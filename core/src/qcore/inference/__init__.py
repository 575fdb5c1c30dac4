"""`qcore generate`: prompt rendering, decoding with caches, and the choice of each token."""
