"""Run: from a config to a selected, evaluated and reported network."""
