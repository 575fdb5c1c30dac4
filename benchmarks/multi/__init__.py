"""What `multi_gpu` measures: cases, models of random weights, and the ranks that run them.

`cases` holds what can be measured, `base` makes weights of any size, `models` builds what a rank
trains, `timing` and `gradients` measure, and `rank` is the process that does it.
"""
