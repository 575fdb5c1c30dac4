"""Discovery, loading and hook calls of plugins, and detection of a checkpoint's architecture."""
