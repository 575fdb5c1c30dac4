"""The tower's rows of the parameter table."""

NAME = "vision"
ROOT = "model.visual"
