"""Files, processes, devices and checkpoints of a run."""
