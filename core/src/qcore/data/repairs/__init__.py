"""Repairs of a canonical row: turns, calls and text that serving cannot produce."""
