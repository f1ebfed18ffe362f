"""Sweeps: many runs declared in one file, collected in one table."""
