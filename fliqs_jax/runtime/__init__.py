"""Files, processes, devices, checkpoints: what a run stands on."""
