"""Runs on the GPUs of a SLURM cluster: a process per GPU, a sweep as job array.

python -m launch slurm --config=FILE --workdir=DIR --gpus_per_node=8 [--nodes=2]

JAX finds coordinator, count and index in srun's environment. Before the time
limit SLURM sends SIGTERM: the run saves, ends with status 75 and is queued
again. After a crash it is started again inside the allocation. The checkout and
the workdir must be on a file system that all nodes share.
"""

import argparse
import os
import sys

from launch import common

ACTIONS = ('up', 'resume', 'logs', 'status', 'delete')
_TOOLS = ('sbatch', 'squeue', 'scancel')
# Seconds that the other processes have after one ends, also successfully: the
# first process writes the report after the others are done. After a crash they
# end sooner, by missed heartbeats.
_FOLLOW = 300
_WARNING = 300  # Seconds before the time limit, enough for a checkpoint.


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this platform."""
  parser.add_argument('--nodes', type=int, default=1)
  parser.add_argument('--gpus_per_node', type=int)
  parser.add_argument('--cpus_per_task', type=int, default=8)
  parser.add_argument('--time', default='24:00:00', help='limit of one job')
  parser.add_argument('--partition', default='')
  parser.add_argument('--account', default='')
  parser.add_argument(
    '--python', default=sys.executable, help='Python on a shared disk'
  )
  parser.add_argument(
    '--setup', default='', help='shell commands at first, such as module load'
  )
  parser.add_argument(
    '--at_once', type=int, default=8, help='runs of a sweep at the same time'
  )


def script(args: argparse.Namespace, plan: common.Plan) -> str:
  """Returns the commands of an action."""
  if args.action == 'status':
    return common.script(
      common.quote(['squeue', '--me', f'--name={plan.name}'])
    )
  if args.action == 'delete':
    return common.script(
      common.quote(['scancel', '--me', f'--name={plan.name}'])
    )
  if args.action == 'logs':
    common.required(args, 'config' if not args.sweep else 'sweep')
    place = common.quote([_place(args, plan)])
    return common.script(f'tail -n 50 -F {place}/slurm-*.log')
  _check(args, plan)
  jobs = [job for job in plan.jobs if not common.finished(job)]
  if not jobs:
    return common.script('echo "every run is finished"')
  place = _place(args, plan)
  return common.script(
    common.quote(['mkdir', '-p', place]),
    common.heredoc('sbatch', _batch(args, plan.name, place, jobs)),
  )


def perform(args: argparse.Namespace, plan: common.Plan) -> int:
  """Performs the action; returns the exit status."""
  return common.perform(script(args, plan), *_TOOLS)


def _check(args: argparse.Namespace, plan: common.Plan) -> None:
  common.required(args, 'gpus_per_node', 'time')
  common.positive(
    nodes=args.nodes,
    gpus_per_node=args.gpus_per_node,
    cpus_per_task=args.cpus_per_task,
    at_once=args.at_once,
  )
  common.matches(
    args,
    'time',
    r'\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}',
    'minutes, hours:minutes:seconds or days-hours',
  )
  common.on_disk(plan)


def _place(args: argparse.Namespace, plan: common.Plan) -> str:
  """Returns the directory of the logs: the sweep's, or the run's workdir."""
  workdir = os.path.abspath(plan.jobs[0].workdir)
  return os.path.dirname(workdir) if args.sweep else workdir


def _batch(args, name: str, place: str, jobs) -> str:
  """Returns the batch script; JAX needs one process for each GPU.

  The script uses `--gpus-per-node`, not `--gpus-per-task`: JAX picks a
  process's GPU by its number on the node, so each process must see all of them.
  """
  options = {
    'job-name': name,
    'nodes': args.nodes,
    'ntasks-per-node': args.gpus_per_node,
    'gpus-per-node': args.gpus_per_node,
    'cpus-per-task': args.cpus_per_task,
    'time': args.time,
    'partition': args.partition,
    'account': args.account,
    'chdir': os.getcwd(),
    'output': f'{place}/slurm-%x-%j.log',
    'signal': f'TERM@{_WARNING}',
    'open-mode': 'append',
  }
  for key, value in options.items():
    if not str(value).isprintable():  # The next line would be a command.
      raise ValueError(f'{key}={value!r} must be one line of text')
  lines = ['#!/usr/bin/env bash']
  lines += [
    f'#SBATCH --{key}={common.quote([str(value)])}'
    for key, value in options.items()
    if value != ''
  ]
  lines += ['#SBATCH --requeue']
  if len(jobs) > 1:
    lines += [f'#SBATCH --array=0-{len(jobs) - 1}%{args.at_once}']
  lines += [args.setup] if args.setup else []
  lines += ['set -uo pipefail']
  # The job is not queued again if the user cancelled it, also by SIGTERM.
  requeue = (
    '[[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]] && '
    f'scontrol requeue "$SLURM_JOB_ID"; exit {common.PREEMPTED}'
  )
  lines += [common.search_function(args.restarts, 5, requeue)]
  # The end of the first process must not end the others at once.
  srun = ['srun', '--kill-on-bad-exit=0', f'--wait={_FOLLOW}', '--label']
  # Since Slurm 22.05 srun does not inherit this from the batch script.
  srun += [f'--cpus-per-task={args.cpus_per_task}']
  calls = []
  for job in jobs:
    job = common.Job(job.name, os.path.abspath(job.workdir), job.flags)
    command = [job.workdir, *srun, *job.command(args.python)]
    calls.append(f'search {common.quote(command)}')
  if len(jobs) == 1:
    return '\n'.join([*lines, *calls])
  lines += ['case $SLURM_ARRAY_TASK_ID in']
  lines += [f'  {i}) {call} ;;' for i, call in enumerate(calls)]
  return '\n'.join([*lines, 'esac'])
