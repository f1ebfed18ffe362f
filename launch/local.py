"""Runs on this machine: N processes that start and end together.

python -m launch local --config=FILE --workdir=DIR --processes=2

Every process gets FLIQS_COORDINATOR, FLIQS_NUM_PROCESSES and FLIQS_PROCESS_ID.
If one ends with an error, the others get SIGTERM at once and SIGKILL after
`--grace` seconds. The runs of a sweep follow each other; finished ones are
skipped.
"""

import argparse
from collections.abc import Sequence
import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time

from launch import common

ACTIONS = ('up',)

_PAUSE = 1.0  # Seconds between attempts, in which ports and files are released.
_POLL = 0.1
# The kernel sends SIGTERM to a process when its launcher ends, even by SIGKILL.
# The request must be made between fork and exec, in a program of its own.
_ORPHAN = (
  'import ctypes, os, signal, sys\n'
  'ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n'  # PR_SET_PDEATHSIG
  'os.execvp(sys.argv[1], sys.argv[1:])'
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this platform."""
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument(
    '--cpu_devices',
    type=int,
    help='use this number of CPU devices in each process',
  )
  parser.add_argument(
    '--grace',
    type=float,
    default=30,
    help='seconds from SIGTERM to SIGKILL',
  )


def script(args: argparse.Namespace, plan: common.Plan) -> str:
  """Returns the commands as a shell script, without stopping and restarts."""
  _check(args, plan)
  parts = []
  for job in plan.jobs:
    command = common.quote(job.command(sys.executable))
    for i in range(args.processes):
      environment = _environment('127.0.0.1:12345', args.processes, i)
      environment |= _devices(args.cpu_devices)
      pairs = ' '.join(f'{k}={v}' for k, v in environment.items())
      parts.append(f'{pairs} {command} &')
    parts.append('wait')
  return common.script(*parts)


def perform(args: argparse.Namespace, plan: common.Plan) -> int:
  """Runs every run that is not finished; returns the worst status."""
  _check(args, plan)
  failed: dict[str, int] = {}
  with _Asked() as asked:
    for i, job in enumerate(plan.jobs, 1):
      where = f'[{i}/{len(plan.jobs)}] {job.workdir}'
      if job.name and common.finished(job):
        _say(f'{where}: finished before')
        continue
      if job.name:
        _say(where)
      status = run(
        job.command(sys.executable),
        processes=args.processes,
        restarts=args.restarts,
        grace=args.grace,
        environment=_devices(args.cpu_devices),
        asked=asked,
      )
      if asked.signal:
        return status
      if status:
        failed[job.workdir] = status
  for workdir, status in failed.items():
    _say(f'{workdir}: failed with status {status}')
  return max(failed.values(), default=0)


def _check(args: argparse.Namespace, plan: common.Plan) -> None:
  common.positive(processes=args.processes)
  if args.cpu_devices is not None:
    common.positive(cpu_devices=args.cpu_devices)
  if not 0 <= args.grace < math.inf:
    raise ValueError(
      f'--grace={args.grace} must be a finite number of at least 0 seconds'
    )
  common.on_disk(plan)


def _environment(coordinator: str, count: int, i: int) -> dict[str, str]:
  return dict(
    FLIQS_COORDINATOR=coordinator,
    FLIQS_NUM_PROCESSES=str(count),
    FLIQS_PROCESS_ID=str(i),
  )


def _devices(count: int | None) -> dict[str, str]:
  if count is None:
    return {}
  return dict(JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(count))


class _Asked:
  """A context that records a signal which asks this process to stop."""

  def __init__(self):
    self.signal = 0

  def _remember(self, number, frame):
    del frame
    self.signal = number

  def __enter__(self):
    self._before = {
      number: signal.signal(number, self._remember)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *error):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def run(
  command: Sequence[str],
  processes: int,
  restarts: int,
  grace: float,
  environment: dict[str, str],
  asked: _Asked,
) -> int:
  """Runs one command in all processes until it is done; returns its status.

  The command is always started again after status 75, and `restarts` times
  after a crash. It is never started again after status 2, a user's mistake, or
  after a signal to stop.

  Args:
    command: the command of every process.
    processes: number of processes.
    restarts: number of crashes after which the command is started again.
    grace: seconds from SIGTERM to SIGKILL.
    environment: additional environment variables.
    asked: the record of a signal to stop.
  """
  crashes = 0
  while True:
    status = _attempt(command, processes, grace, environment, asked)
    if status in (0, common.MISTAKE) or asked.signal:
      return status
    if status != common.PREEMPTED:
      crashes += 1
      if crashes > restarts:
        return status
    _say(f'status {status}, {crashes} of {restarts} restarts; starting again')
    time.sleep(_PAUSE)


def _attempt(command, processes, grace, environment, asked) -> int:
  """Starts all processes; returns the status after all have ended."""
  coordinator = f'127.0.0.1:{_free_port()}'
  children: list[subprocess.Popen] = []
  try:
    for i in range(processes):
      own = _environment(coordinator, processes, i)
      children.append(_start(command, {**os.environ, **environment, **own}))
    return _watch(children, grace, asked)
  finally:
    _signal(children, signal.SIGKILL)
    for child in children:
      child.wait()
      child.stdout.close()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _start(command, environment) -> subprocess.Popen:
  if sys.platform == 'linux':
    command = [sys.executable, '-S', '-c', _ORPHAN, *command]
  return subprocess.Popen(
    command,
    env={**environment, 'PYTHONUNBUFFERED': '1'},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    # A process group of its own: a terminal's Ctrl-C reaches the launcher only,
    # and the children of a process (readers of data) end with it.
    start_new_session=True,
  )


def _signal(children: Sequence[subprocess.Popen], number: int) -> None:
  for child in children:
    # The process has ended; macOS raises another error than Linux.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(child.pid, number)


def _watch(children, grace, asked) -> int:
  """Waits for all processes; a failure or a signal to stop ends all."""
  output = _Output(children)
  failure, deadline, is_stopping = 0, None, False
  while True:
    output.copy(_POLL)
    statuses = [child.poll() for child in children]
    now = time.monotonic()
    failures = {i: s for i, s in enumerate(statuses) if s}
    if failures and not failure:
      # If some saved and others crashed, the status of a crash counts.
      i, failure = max(failures.items(), key=lambda x: x[1] != common.PREEMPTED)
      failure = failure if failure > 0 else 128 - failure
      if None in statuses:
        _say(
          f'process {i} ended with status {failure}; the others have '
          f'{grace:g} s to end'
        )
        deadline = now + grace
        # Preempted processes save together and end by themselves.
        if failure != common.PREEMPTED:
          _signal(children, signal.SIGTERM)
    if asked.signal and not is_stopping:
      is_stopping, deadline = True, now + grace
      _signal(children, signal.SIGTERM)
    if None not in statuses:
      output.copy(0)
      return failure
    if deadline is not None and now > deadline:
      _signal(children, signal.SIGKILL)


class _Output:
  """The output of the processes, each line with the index of its process."""

  def __init__(self, children: Sequence[subprocess.Popen]):
    self._selector = selectors.DefaultSelector()
    for i, child in enumerate(children):
      os.set_blocking(child.stdout.fileno(), False)
      prefix = b'[%d] ' % i if len(children) > 1 else b''
      self._selector.register(child.stdout, selectors.EVENT_READ, [prefix, b''])

  def copy(self, seconds: float) -> None:
    """Copies the lines that arrive within `seconds`, at least those there."""
    if not self._selector.get_map():
      time.sleep(seconds)
    for key, _ in self._selector.select(seconds):
      prefix, rest = key.data
      data = key.fileobj.read()
      if not data:
        self._selector.unregister(key.fileobj)
        data = b'\n' if rest else b''
      *lines, key.data[1] = (rest + data).split(b'\n')
      for line in lines:
        sys.stderr.buffer.write(prefix + line + b'\n')
      sys.stderr.buffer.flush()


def _say(text: str) -> None:
  print(f'launch: {text}', file=sys.stderr, flush=True)
