"""The media of rows: where their files lie, and which tokens they take."""
