"""What `qcore data` shows of rows: check, show, diff, parity and the page."""
