"""Settings of a run and presets: which exist, how YAML is read, which source of a value wins."""
