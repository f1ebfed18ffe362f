"""Names of the files and folders in a run's workdir.

A sweep's folder holds the workdirs of its runs and three more files.
"""

# The config of the run; written before its first step.
CONFIG = 'config.json'
# The resulting architecture: formats and sizes of each layer.
ARCH = 'arch.json'
# The measurements of it. A run that has this file is finished: it is written
# last.
RESULT = 'result.json'
# The scores of every option, if they were measured; SENSITIVITY_FIGURE is the
# picture of them.
SENSITIVITY = 'sensitivity.json'
SENSITIVITY_FIGURE = 'sensitivity.png'
# A row of averaged metrics for each logging point.
HISTORY = 'history.jsonl'
# The workdir of the same network trained from the beginning.
RETRAINED = 'retrained'
REPORT = 'report.html'
CHECKPOINTS = 'checkpoints'
# A folder with one JSON file per process: its step and the time.
HEARTBEAT = 'heartbeat'
# Says which process uses the workdir, which holds a lock on this file.
LOCK = '.lock'
# A folder with the profile of chosen steps, for TensorBoard.
PROFILE = 'profile'

SWEEP_RESULT = 'sweep.json'
SWEEP_PAGE = 'sweep.html'
SWEEP_FIGURE = 'pareto.png'

# A comparison's folder: what its runs share, and its results.
COMPARISON_PLAN = 'plan.json'
COMPARISON_RESULT = 'compare.json'
COMPARISON_PAGE = 'compare.html'
COMPARISON_FIGURE = 'compare.png'
# In the workdir of a run: the architecture that it was given.
ASSIGNED = 'assigned.json'
