"""A model folder: its files, headers, layout against the parameter table, and chat template."""
