"""Implementations that benchmarks compare (qcore, transformers + peft, Unsloth), one a module.

Every ``*_side`` module builds one implementation's training step (`Side`); `measure` times it,
`shapes` holds what all of them share, and `groups` names the kernels of a profile.
"""
