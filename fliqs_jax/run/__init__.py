"""One run, from a config to a found, evaluated and reported network."""
