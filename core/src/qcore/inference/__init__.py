"""`qcore generate`: decoding, to see the effect of an adapter."""
