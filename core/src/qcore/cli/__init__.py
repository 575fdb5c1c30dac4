"""The command line: one module per verb, `main` for the entry point and exit statuses."""
