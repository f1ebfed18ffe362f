"""The names of the files and folders in a run's workdir, each spelt once.

A sweep's folder holds the workdirs of its runs and three files of its own.
"""

# What a run was asked for; written before its first step.
CONFIG = 'config.json'
# What was found: formats and sizes of each layer.
ARCH = 'arch.json'
# What was measured of it. A run that has this file is finished.
RESULT = 'result.json'
# A row of averaged metrics for each logging point.
HISTORY = 'history.jsonl'
REPORT = 'report.html'
CHECKPOINTS = 'checkpoints'
# One JSON file per process: how far it is.
HEARTBEAT = 'heartbeat'
# TensorBoard's profile of chosen steps.
PROFILE = 'profile'

SWEEP_RESULT = 'sweep.json'
SWEEP_PAGE = 'sweep.html'
SWEEP_FIGURE = 'pareto.png'
