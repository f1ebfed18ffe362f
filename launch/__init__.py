"""Launchers: from a config file to running processes, on each platform."""
