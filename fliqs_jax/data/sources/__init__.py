"""The data sets that a config can name."""
