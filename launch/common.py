"""Functions that all platforms share: flags, runs, names, scripts."""

import argparse
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile

import jax

from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.sweep import sweep_file

# Exit statuses of `fliqs_jax.main` besides 0.
MISTAKE = 2  # The user made a mistake: a restart would not help.
PREEMPTED = (
  75  # The run saved its state and must be started again (EX_TEMPFAIL).
)
# Actions that start something; the others need only a name.
_STARTING = ('up', 'resume', 'install', 'run')
# Those that a mistake in a config would make useless.
_CHECKED = (*_STARTING, 'create')
_NAMELESS = ('build',)
_BUCKET = '[a-z0-9][a-z0-9._-]+[a-z0-9]'
_LONGEST_NAME = 40  # Kubernetes allows 63 for a pod, `NAME-slice-0-12-abcde`.


@dataclasses.dataclass(frozen=True)
class Job:
  """One run.

  Attributes:
    name: name in the sweep; '' for a single run.
    workdir: path of its workdir.
    flags: further flags of `fliqs_jax.main`.
  """

  name: str
  workdir: str
  flags: Sequence[str]

  def command(self, python: str = 'python') -> list[str]:
    """Returns the command of every process of this run."""
    main = [python, '-m', 'fliqs_jax.main']
    return [*main, *self.flags, f'--workdir={self.workdir}']


@dataclasses.dataclass(frozen=True)
class Plan:
  """The runs to launch.

  Attributes:
    name: name of the launch, which clouds and clusters see.
    jobs: the runs.
    sweep: the same as runs of a sweep, of which a single one has no name.
    out: directory of their workdirs, before buckets are mounted.
  """

  name: str
  jobs: Sequence[Job]
  sweep: sweep_file.Sweep = sweep_file.Sweep('', ())
  out: str = ''


class Parser(argparse.ArgumentParser):
  """A parser whose errors are ValueErrors of one line."""

  def error(self, message):
    """Raises ValueError with argparse's message."""
    raise ValueError(message)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of every platform."""
  parser.add_argument('--config', help='file[:arguments] of one run')
  parser.add_argument('--workdir', type=_directory, help='workdir of that run')
  parser.add_argument('--sweep', help='a sweep file: many runs')
  parser.add_argument(
    '--out', type=_directory, help='a directory for the workdirs of a sweep'
  )
  parser.add_argument('--name', help='name of the launch')
  parser.add_argument(
    '--restarts', type=int, default=3, help='number of crashes to restart after'
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='print the script, do nothing'
  )


def _directory(text: str) -> str:
  """Returns the path of a directory without slashes at its end."""
  return text.rstrip('/') or text


def parse(
  parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags, and those that override keys of the config.

  Raises:
    ValueError: a flag is unknown, or its value is not allowed.
  """
  # argparse would take one with a space in its value for an action.
  others = [text for text in argv if text.startswith('--config.')]
  args, unknown = parser.parse_known_args([a for a in argv if a not in others])
  if unknown:
    raise ValueError(f'unknown argument {unknown[0]!r}; --help lists all flags')
  for other in others:
    if '=' not in other:
      raise ValueError(f'write {other}=VALUE, with an equals sign')
  if args.restarts < 0:
    raise ValueError(f'--restarts={args.restarts} must be at least 0')
  return args, others


def plan(args: argparse.Namespace, overrides: Sequence[str]) -> Plan:
  """Returns the runs that the flags describe, after a check of their keys.

  Raises:
    ValueError: flags contradict each other, or a key of a config has a value
      that is not allowed.
  """
  if args.config and args.sweep:
    raise ValueError('give --config or --sweep, not both')
  if not (args.config or args.sweep):
    if args.action in _STARTING:
      raise ValueError('give --config=FILE and --workdir=DIR, or --sweep=FILE')
    if args.action in _NAMELESS:
      return Plan('', ())
    if not args.name:
      raise ValueError(
        f'{args.action} needs --name, or the --config or --sweep'
      )
    return Plan(_checked_name(args.name), ())
  if args.sweep:
    if args.workdir or overrides:
      raise ValueError(
        'a sweep has --out instead of --workdir, and its overrides in its file'
      )
    sweep = sweep_file.read(args.sweep)
    out = args.out or sweep.out
    jobs = [Job(r.name, f'{out}/{r.name}', r.flags) for r in sweep.runs]
    name = _checked_name(args.name or _slug(sweep.name))
    return Plan(name, jobs, sweep, out)
  if not args.workdir or args.out:
    raise ValueError('a run of --config has --workdir=DIR instead of --out')
  keys = dict(
    text.removeprefix('--config.').split('=', 1) for text in overrides
  )
  run = sweep_file.Run('', {}, args.config, keys)
  sweep_file.config(run)
  name = args.name or _slug(pathlib.Path(args.config.partition(':')[0]).stem)
  jobs = [Job('', args.workdir, run.flags)]
  return Plan(
    _checked_name(name), jobs, sweep_file.Sweep('', [run]), args.workdir
  )


def check(args: argparse.Namespace, plan: Plan) -> None:
  """Checks the runs of a plan, as far as this machine can, if they shall start.

  It traces each network, so whatever takes less time is checked before.

  Raises:
    ValueError: a config cannot work, or a workdir is that of another run; one
      that has a result.json would not even be started.
  """
  if args.action not in _CHECKED:
    return
  # It imports matplotlib, which takes a second: only what starts runs does so.
  from fliqs_jax.sweep import checks

  # All others are for the processes that are started: this one would take the
  # memory of a GPU, or lock a TPU.
  jax.config.update('jax_platforms', 'cpu')
  if args.sweep:
    checks.workdirs(plan.sweep, plan.out)
  elif args.config:
    (run,) = plan.sweep.runs
    content = json.loads(json.dumps(sweep_file.config(run)))
    config_lib.claimed(plan.out, content)
  checks.configs(plan.sweep)


def _slug(text: str) -> str:
  return re.sub('[^a-z0-9]+', '-', text.lower()).strip('-')


def _checked_name(name: str) -> str:
  """Returns a name, after a check that clouds and clusters allow it."""
  if not re.fullmatch('[a-z]([a-z0-9-]*[a-z0-9])?', name):
    raise ValueError(
      f'--name={name} must be of a-z, 0-9 and -, from a letter to a letter or '
      'digit'
    )
  if len(name) > _LONGEST_NAME:
    raise ValueError(
      f'--name={name} has over {_LONGEST_NAME} characters; give a shorter one'
    )
  return name


def job_name(plan: Plan, job: Job) -> str:
  """Returns a name for one run that clouds and clusters allow.

  It depends on the run alone, so it stays when a sweep gets more runs.
  """
  if not job.name:
    return plan.name
  digest = hashlib.sha256(job.name.encode()).hexdigest()[:6]
  room = _LONGEST_NAME - len(digest) - 1
  return f'{_slug(f"{plan.name}-{job.name}")[:room].rstrip("-")}-{digest}'


def positive(**values: int) -> None:
  """Raises a ValueError for a flag that is below 1."""
  for name, value in values.items():
    if value < 1:
      raise ValueError(f'--{name}={value} must be at least 1')


def required(args: argparse.Namespace, *names: str) -> None:
  """Raises a ValueError that names all missing flags."""
  missing = [f'--{name}' for name in names if not getattr(args, name)]
  if missing:
    raise ValueError(f'missing: {", ".join(missing)}; give these flags')


def matches(args: argparse.Namespace, name: str, pattern: str, like: str):
  """Raises a ValueError for a flag that does not match a pattern.

  Args:
    args: the flags.
    name: name of the flag, without dashes.
    pattern: regular expression of its whole value.
    like: an example of an allowed value, for the message.
  """
  value = getattr(args, name)
  if not re.fullmatch(pattern, value):
    raise ValueError(f'--{name}={value} must be like {like}')


def on_bucket(plan: Plan) -> tuple[Plan, list[str]]:
  """Returns the plan with buckets as directories, and the buckets.

  The workdir is written with plain file operations, so a bucket is mounted:
  gs://B/D becomes /gcs/B/D at each place in a flag.

  Raises:
    ValueError: a workdir is not in a bucket; the disk of a machine in the cloud
      is deleted with the machine.
  """
  buckets: dict[str, None] = {}

  def mounted(text):
    for bucket in re.findall('gs://([^/,]*)', text):
      if not re.fullmatch(_BUCKET, bucket):
        raise ValueError(
          f'gs://{bucket} in {text!r} names no bucket: its name must be of '
          'a-z, 0-9, dots, dashes and underscores'
        )
      buckets[bucket] = None
    return text.replace('gs://', '/gcs/')

  jobs = []
  for job in plan.jobs:
    if not re.fullmatch(f'gs://{_BUCKET}/.*[^/]', job.workdir):
      raise ValueError(
        f'{job.workdir} must be in a bucket, gs://BUCKET/DIR: a disk in the '
        'cloud is deleted with its machine, and the hosts of a slice share none'
      )
    flags = [mounted(flag) for flag in job.flags]
    jobs.append(Job(job.name, mounted(job.workdir), flags))
  return dataclasses.replace(plan, jobs=jobs), list(buckets)


def on_disk(plan: Plan) -> None:
  """Raises a ValueError for a workdir in a bucket."""
  for job in plan.jobs:
    if job.workdir.startswith('gs://'):
      raise ValueError(
        f'{job.workdir} is in a bucket; on this platform a workdir must be a '
        'directory'
      )


def finished(job: Job) -> bool:
  """Returns whether a run is finished, if this machine sees its workdir."""
  return os.path.exists(os.path.join(job.workdir, workdir_lib.RESULT))


def script(*parts: str) -> str:
  """Returns a bash script, which stops at the first command that fails."""
  head = '#!/usr/bin/env bash\nset -euo pipefail\n'
  return head + '\n'.join(part.rstrip('\n') for part in parts) + '\n'


def heredoc(command: str, text: str) -> str:
  """Returns a command with `text`, unchanged, as its standard input."""
  end = 'END_OF_FILE'
  while end in text.splitlines():  # A value of a config is data.
    end += '_'
  return f"{command} <<'{end}'\n{text.rstrip()}\n{end}"


def search_function(restarts: int, pause: int, on_preempted: str) -> str:
  """Returns the shell function `search WORKDIR COMMAND...`, which restarts.

  Args:
    restarts: number of crashes after which the command is started again.
    pause: seconds before a command is started again.
    on_preempted: a shell command that is run after status 75.
  """
  return f"""\
search() {{
  local workdir=$1 crashes=0 status
  shift
  while [[ ! -e $workdir/result.json ]]; do
    status=0
    "$@" || status=$?
    case $status in
      0) return 0 ;;
      {MISTAKE}) return {MISTAKE} ;;  # To start again would not help.
      {PREEMPTED}) {on_preempted} ;;
      *)
        crashes=$((crashes + 1))
        if ((crashes > {restarts})); then return "$status"; fi
        ;;
    esac
    echo "$workdir: status $status, $crashes crashes; starting again" >&2
    sleep {pause}
  done
}}"""


def perform(text: str, *tools: str) -> int:
  """Runs a script; returns its status.

  Args:
    text: the bash script.
    *tools: programs that the script calls.

  Raises:
    ValueError: one of the programs is not installed.
  """
  for tool in tools:
    if not shutil.which(tool):
      raise ValueError(
        f'{tool} is not installed here; --dry_run prints the script for a '
        'machine that has it'
      )
  with tempfile.NamedTemporaryFile('w', suffix='.sh') as file:
    file.write(text)
    file.flush()
    return subprocess.run(['bash', file.name], check=False).returncode


def quote(words: Sequence[str]) -> str:
  """Returns a command, quoted for a shell."""
  return shlex.join(words)
