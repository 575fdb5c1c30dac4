"""Settings and presets: what a run may be asked, and from where each value comes."""
