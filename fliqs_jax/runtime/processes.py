"""Processes of a run, which connect, agree and stop together.

JAX's coordination service does the work: it detects clusters, passes a SIGTERM
of one process on to all of them, and ends all of them if one is gone.
"""

from collections.abc import Iterator
import contextlib
import itertools
import logging
import os
import select
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from fliqs_jax.runtime import commands

_LOG = logging.getLogger(__name__)

# Variables that `launch.local` sets; JAX does not read them by itself.
_VARIABLES = ('FLIQS_COORDINATOR', 'FLIQS_NUM_PROCESSES', 'FLIQS_PROCESS_ID')
# The number of processes that a cluster started; JAX finds all else by itself.
_COUNTS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
_TPU = ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES')
# On a machine without TPU chips, JAX sets this when it is imported.
_NO_CHIPS = 'TPU_SKIP_MDS_QUERY'

_STEPPING = threading.Event()
_POLL = 0.1  # Seconds.


def join(timeout: int, dead_after: int) -> None:
  """Connects to the other processes of this run, if there are any.

  Call it before anything else asks for devices. If the others do not connect in
  time, it ends this process with status 1 and logs the address; JAX would end
  it, too, but without the address.

  Args:
    timeout: seconds to wait for the others.
    dead_after: seconds without a heartbeat after which a process counts as
      lost, and all others end.

  Raises:
    ValueError: the environment variables contradict each other, or no
      connection is possible.
  """
  given = _from_environment()
  if given is None and not _in_cluster():
    return
  where = given['coordinator_address'] if given else 'the cluster'
  _LOG.info('waiting for the other processes at %s', where)

  def give_up():
    _LOG.error(
      'the processes of this run did not meet at %s within %d s: check that '
      'the address is right and can be reached, and that all were started',
      where,
      timeout,
    )
    os._exit(
      commands.CRASHED
    )  # Native code waits, where an exception has no effect.

  waiting = threading.Timer(timeout, give_up)
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(
      **(given or {}),
      # JAX aborts without the address, so our timer must end first.
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=dead_after,
    )
  except (ValueError, RuntimeError, OSError) as error:
    raise ValueError(
      f'the processes of this run cannot meet at {where}: {error}; '
      f'set {_VARIABLES[1]}=1 to run one process alone'
    ) from None
  finally:
    waiting.cancel()


def _from_environment() -> dict[str, Any] | None:
  """Returns arguments of `jax.distributed.initialize`, None for one process.

  Raises:
    ValueError: the variables are incomplete or contradict each other.
  """
  values = [os.environ.get(name, '') for name in _VARIABLES]
  address, count, index = values
  if not any(values) or count == '1':
    return None
  if not (
    all(address.rpartition(':')[::2])
    and count.isdecimal()
    and index.isdecimal()
    and int(index) < int(count)
  ):
    current = ', '.join(f'{k}={v!r}' for k, v in zip(_VARIABLES, values))
    raise ValueError(
      f'{current}: they must be HOST:PORT, the number of processes, and '
      'an index below that number'
    )
  return dict(
    coordinator_address=address,
    num_processes=int(count),
    process_id=int(index),
    cluster_detection_method='deactivate',
  )


def _in_cluster() -> bool:
  """Returns whether JAX should ask a cluster for the other processes."""
  environment = os.environ
  if environment.get(_VARIABLES[1]) == '1':
    return False
  return (
    any(int(environment.get(name, '1')) > 1 for name in _COUNTS)
    or any(name in environment for name in _TPU)
    or _NO_CHIPS not in environment
  )


def index() -> int:
  """Returns the index of this process, from 0."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
  """Returns the number of processes."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def texts(own: str) -> list[str]:
  """Returns the texts of all processes in their order, the same in each."""
  if count() == 1:
    return [own]
  data = np.frombuffer(own.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
  padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Raises a ValueError of one process in all of them.

  Without it the others would wait for that process for ever.
  """
  own = None
  try:
    yield
  except ValueError as error:
    own = error
  problems = texts(str(own) if own else '')
  if own:
    raise own
  for i, problem in enumerate(problems):
    if problem:
      raise ValueError(f'process {i}: {problem}')


@contextlib.contextmanager
def stepping() -> Iterator[None]:
  """Marks the time in which a run asks `Stop` after each step, and saves."""
  _STEPPING.set()
  try:
    yield
  finally:
    _STEPPING.clear()


class Stop:
  """A question asked once a step: did a signal ask the run to stop?

  Make one in the main thread of a command, before the work begins. SIGTERM and
  SIGINT (Ctrl-C) then do the same:

  * While the run is `stepping`, the next question is answered with yes, in all
    processes at the same step, whichever process got the signal.
  * At any other time, as in a compilation or an evaluation, this process ends
    at once, with one line of the log and status 75. Nothing is lost then: what
    is not in the last checkpoint is a function of it.
  * A second SIGINT ends the process at once.

  Several processes use JAX's coordination service, to which a SIGTERM belongs;
  so one that arrives at any other time is answered at the next step, if there
  is one.
  """

  def __init__(self):
    self._calls = itertools.count(1)
    self._signalled = self._answered = False
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._remember)
    # Python runs handlers in the main thread only, between its instructions. A
    # compilation is one such instruction, and the pipe does not wait for it.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=self._watch, args=(reading,), daemon=True)
    watch.start()

  def _remember(self, *_) -> None:
    self._signalled = True

  def _watch(self, pipe: int) -> None:
    interrupts = 0
    while True:
      wait = _POLL if self._signalled else None
      for number in select.select([pipe], [], [], wait)[0] and os.read(pipe, 1):
        if number not in (signal.SIGTERM, signal.SIGINT):
          continue
        self._signalled = True
        interrupts += number == signal.SIGINT
        if interrupts == 1 and jax.distributed.is_initialized():
          os.kill(os.getpid(), signal.SIGTERM)  # For all processes.
      if interrupts > 1 or (
        self._signalled and not self._answered and not _STEPPING.is_set()
      ):
        _LOG.info(
          'asked to stop: the same command goes on from the last checkpoint, '
          'if there is one'
        )
        os._exit(commands.STOPPED)  # Native code may be busy for minutes.

  def __call__(self) -> bool:
    """Returns whether to stop after this step."""
    if jax.distributed.is_initialized():
      # JAX needs numbers that only grow within a process. Those of calls do;
      # those of steps begin again if a run of a reference follows.
      self._answered = multihost_utils.reached_preemption_sync_point(
        next(self._calls)
      )
    else:
      self._answered = self._signalled
    return self._answered
