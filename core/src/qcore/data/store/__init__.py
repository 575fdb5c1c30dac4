"""The samples of a run as arrays on disk: how they are written, read, and kept between runs."""
