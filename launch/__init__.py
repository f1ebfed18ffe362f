"""From a config file to running processes, on whatever machine there is."""
