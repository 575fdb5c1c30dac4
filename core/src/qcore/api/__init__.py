"""What a plugin sees of core: hooks, records, the parameter table, blocks and media."""
