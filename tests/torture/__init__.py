"""Breaks runs on purpose and checks that nothing is lost: ``make torture`` (docs/torture.md).

Each point is a run with one fault, followed by the same command again, as a service manager would
start it. Files, from the bottom: `shim` (with shim.c) fails one call, `server` and `client` start
a command in a forked process, `programs` are the commands, `judge` compares what they left,
`suites` lists what is run, `points` is one fault at one place, `bad_inputs` and `mutations` are
points of their own, `results` keeps every outcome, `__main__` runs points until time is up.
"""
