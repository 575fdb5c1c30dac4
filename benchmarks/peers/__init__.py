"""What a benchmark runs: qcore and each peer, one module a side, measured by one function."""
