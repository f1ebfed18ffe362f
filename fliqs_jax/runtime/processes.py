"""The processes of a run: how they find each other, agree, and stop together.

JAX's own coordination does the work: it detects clusters, spreads a SIGTERM
that one process gets to all of them, and ends all when one is gone.
"""

from collections.abc import Iterator
import contextlib
import itertools
import logging
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils
import numpy as np

_LOG = logging.getLogger(__name__)

# What `launch.local` gives; JAX looks for none of them by itself.
_GIVEN = ('FLIQS_COORDINATOR', 'FLIQS_NUM_PROCESSES', 'FLIQS_PROCESS_ID')
# How many processes a cluster started; JAX then finds the rest.
_COUNTS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
_TPU = ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES')
# Set by JAX, when it is imported, where there are no TPU chips.
_NO_CHIPS = 'TPU_SKIP_MDS_QUERY'


def join(timeout: int, dead_after: int) -> None:
  """Meets the other processes of this run, if there are any.

  Must come before anything else asks for devices. Ends this process with
  status 1 if the others do not come; JAX would, too, but would not say where
  they were awaited.

  Args:
    timeout: seconds to wait for the others.
    dead_after: seconds without a sign of life after which a process counts as
      dead, and all others end.

  Raises:
    ValueError: the environment says something that cannot be.
  """
  given = _given()
  if given is None and not _in_cluster():
    return
  where = given['coordinator_address'] if given else 'what the cluster names'
  _LOG.info('waiting for the other processes at %s', where)

  def give_up():
    _LOG.error(
      'the processes of this run did not meet at %s within %d s: is the '
      'address right, can it be reached, and were all of them started?',
      where,
      timeout,
    )
    os._exit(1)  # The wait is in native code.

  waiting = threading.Timer(timeout, give_up)
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(
      **(given or {}),
      # Later than ours.
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=dead_after,
    )
  except (ValueError, RuntimeError, OSError) as error:
    raise ValueError(
      f'the processes of this run cannot meet at {where}: {error}; '
      f'{_GIVEN[1]}=1 runs without others'
    ) from None
  finally:
    waiting.cancel()


def _given():
  """Returns arguments of `jax.distributed.initialize` from the environment."""
  values = [os.environ.get(name, '') for name in _GIVEN]
  address, count, index = values
  if not any(values) or count == '1':
    return None
  if not (
    all(address.rpartition(':')[::2])
    and count.isdecimal()
    and index.isdecimal()
    and int(index) < int(count)
  ):
    said = ', '.join(f'{k}={v!r}' for k, v in zip(_GIVEN, values))
    raise ValueError(
      f'{said}: needed are HOST:PORT, the number of processes, and an index '
      'below it'
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
  if environment.get(_GIVEN[1]) == '1':
    return False
  return (
    any(int(environment.get(name, '1')) > 1 for name in _COUNTS)
    or any(name in environment for name in _TPU)
    or _NO_CHIPS not in environment
  )


def index() -> int:
  """Returns which of the processes this is."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
  """Returns how many processes there are."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def texts(own: str) -> list[str]:
  """Returns a text of each process, the same list in all of them."""
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
  """Raises a ValueError of one process in all: nobody waits for it in vain."""
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


class Stop:
  """Whether a run was asked to stop by SIGTERM; asked once at each step.

  All processes get the same answer at the same step, wherever the signal came.
  """

  def __init__(self):
    self._calls = itertools.count(1)
    self._signalled = False
    if not jax.distributed.is_initialized():
      signal.signal(signal.SIGTERM, self._remember)

  def _remember(self, *_) -> None:
    self._signalled = True

  def __call__(self) -> bool:
    """Returns whether to stop after this step."""
    if jax.distributed.is_initialized():
      # By calls, not by steps: a run may be followed by that of a reference.
      return multihost_utils.reached_preemption_sync_point(next(self._calls))
    return self._signalled
