"""Metrics: averaged between logging points, then written to files.

At a step nothing leaves the device: `accumulate` is one small compiled call.
At a logging point `compute` fetches the averages and `Writer.write` logs them,
for programs in `history.jsonl`, for people in TensorBoard files beside it.
"""

from collections.abc import Collection, Mapping, Sequence
import functools
import json
import logging
import math
import os
import pathlib
import time
from typing import Any

from clu import metrics as clu_metrics
import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX

from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib

_LOG = logging.getLogger(__name__)

# One clu metric per name. A dict and not a clu `Collection`, whose names must
# be Python identifiers: ours may hold a slash, by which TensorBoard groups.
Accumulators = dict[str, clu_metrics.Metric]


@functools.partial(jax.jit, static_argnames=('names', 'last'))
def _empty(names: tuple[str, ...], last: frozenset[str]) -> Accumulators:
  return {
    name: (
      clu_metrics.LastValue if name in last else clu_metrics.Average
    ).empty()
    for name in names
  }


def empty(
  step_metrics: Mapping[str, Any], last: Collection[str] = ()
) -> Accumulators:
  """Returns accumulators of no steps.

  Args:
    step_metrics: a step's metrics by name, or any mapping with the same keys.
    last: names of the metrics of which the last value counts, not the average.

  Raises:
    ValueError: a name in `last` is not a metric of the step.
  """
  unknown = sorted(set(last) - set(step_metrics))
  if unknown:
    raise ValueError(
      f'last={unknown} names no metric of the step; the step has '
      f'{sorted(step_metrics)}'
    )
  return _empty(tuple(sorted(step_metrics)), frozenset(last))


@jax.jit
def _merge(
  accumulators: Accumulators, step_metrics: Mapping[str, jax.Array]
) -> Accumulators:
  # Sums are float32 even if a step computes in bfloat16, in which 256 + 1 is
  # 256.
  return {
    name: metric.merge(
      metric.from_model_output(jnp.asarray(step_metrics[name], jnp.float32))
    )
    for name, metric in accumulators.items()
  }


def accumulate(
  accumulators: Accumulators | None, step_metrics: Mapping[str, jax.Array]
) -> Accumulators:
  """Adds one step's metrics on the device, without waiting for them.

  Args:
    accumulators: result of `empty` or of the last `accumulate`; None means
      `empty(step_metrics)`.
    step_metrics: {name: scalar} of any real dtype.

  Raises:
    ValueError: a metric is not a scalar, or the names differ from those of
      `accumulators`.
  """
  if accumulators is None:
    accumulators = empty(step_metrics)
  if step_metrics.keys() != accumulators.keys():
    raise ValueError(
      f'a step has metrics {sorted(step_metrics)}, the steps before had '
      f'{sorted(accumulators)}; all must have the same'
    )
  for name, value in step_metrics.items():
    if jnp.shape(value):
      raise ValueError(
        f'metric {name} has shape {jnp.shape(value)}; a metric is a scalar'
      )
  return _merge(accumulators, step_metrics)


@jax.jit
def _compute(accumulators: Accumulators) -> dict[str, jax.Array]:
  return {name: metric.compute() for name, metric in accumulators.items()}


def compute(accumulators: Accumulators) -> dict[str, float]:
  """Fetches the averages and last values; NaN if no step was added."""
  values = jax.device_get(_compute(accumulators))
  return {name: float(value) for name, value in values.items()}


def packed(accumulators: Accumulators) -> dict[str, list[str]]:
  """Returns the bits of the accumulators as hexadecimal texts, for JSON."""
  leaves = {k: jax.tree.leaves(v) for k, v in accumulators.items()}
  return {
    name: [np.asarray(x).tobytes().hex() for x in values]
    for name, values in jax.device_get(leaves).items()
  }


def unpacked(content: Mapping[str, Sequence[str]]) -> Accumulators:
  """Returns the accumulators that `packed` got; all must be averages."""

  def read(leaf, text):
    return np.frombuffer(bytes.fromhex(text), leaf.dtype).reshape(leaf.shape)

  like = empty(content)
  return {
    name: jax.tree.unflatten(
      jax.tree.structure(like[name]),
      map(read, jax.tree.leaves(like[name]), texts),
    )
    for name, texts in content.items()
  }


def read_history(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of `history.jsonl`, oldest first; [] if there is none.

  A value that was not finite reads as None. An incomplete last line, which an
  interrupted run leaves, is skipped.

  Args:
    workdir: path of the run's workdir.

  Raises:
    ValueError: another line is not a row.
  """
  return [row for row, _ in _rows(_history_path(workdir))]


class Writer:
  """Writer of `history.jsonl` and of TensorBoard files; one per run.

  Invariants:
    * `history.jsonl` depends only on the written values, not on clock or host.
      A run that was killed and resumed ends with the same bytes as a run that
      was not.
    * When `write` returns, the row is on disk. Write the row of a step before
      its checkpoint is saved: a resumed run does not write it again.
    * Steps increase strictly.
  """

  def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None):
    """Opens the files, and drops the rows after the restored checkpoint.

    Args:
      workdir: path of the run's workdir; it is made if it does not exist.
      resume_step: step of the restored checkpoint; None for a new run, for
        which all rows are dropped.

    Raises:
      ValueError: the directory cannot be written, or the history is damaged.
    """
    path = _history_path(workdir)
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._last_step = _drop_rows_after(path, resume_step)
      self._file = path.open('ab')
    except OSError as error:
      raise ValueError(
        f'workdir {workdir} cannot be written: {error}'
      ) from error
    self._board = tensorboardX.SummaryWriter(
      str(workdir),
      # Readers then hide the rows that a killed run logged from this step on.
      purge_step=0 if resume_step is None else resume_step + 1,
      # tensorboardX names a file by the second, and would overwrite the file of
      # a run that began and ended within the same second.
      filename_suffix=f'.{time.time_ns()}',
    )

  def write(
    self,
    step: int,
    scalars: Mapping[str, float],
    policy: Mapping[str, Sequence[float]],
    timing: Mapping[str, float],
  ) -> None:
    """Writes one row.

    Args:
      step: number of steps taken; greater than that of the row before.
      scalars: {name: value}, written to both files.
      policy: {decision: probabilities [K]}, written to `history.jsonl` only.
      timing: {name: value} of values that differ from run to run, such as steps
        per second; written to TensorBoard files only.

    Raises:
      ValueError: the step does not increase, or a name is used twice.
    """
    if self._last_step is not None and step <= self._last_step:
      raise ValueError(
        f'a row of step {step} cannot follow the row of step {self._last_step}'
      )
    taken = scalars.keys() & {'step', 'policy', *timing}
    if taken:
      raise ValueError(
        f'scalars named {sorted(taken)} are not allowed: "step" and "policy" '
        'are keys of a row, and a timing must not have the name of a scalar'
      )
    self._file.write(_line(step, scalars, policy))
    self._file.flush()
    os.fsync(self._file.fileno())
    self._last_step = step
    for name, value in sorted({**scalars, **timing}.items()):
      self._board.add_scalar(name, float(value), step)

  def close(self) -> None:
    """Closes both files, after which nothing can be written."""
    self._file.close()
    self._board.close()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _history_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
  return pathlib.Path(workdir) / workdir_lib.HISTORY


def _finite(value: float) -> float | None:
  # JSON has no infinity and no NaN; Python's own reader accepts `NaN`, but most
  # others do not.
  return float(value) if math.isfinite(value) else None


def _line(
  step: int,
  scalars: Mapping[str, float],
  policy: Mapping[str, Sequence[float]],
) -> bytes:
  # Sorted, because a dict comes back sorted from a checkpoint or a jit.
  row: dict[str, Any] = {'step': int(step)}
  row |= {name: _finite(scalars[name]) for name in sorted(scalars)}
  row['policy'] = {
    name: [_finite(probability) for probability in policy[name]]
    for name in sorted(policy)
  }
  return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b'\n'


def _rows(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
  """Returns (row, line with newline) of all but an incomplete last line."""
  if not path.exists():
    return []
  lines = path.read_bytes().split(b'\n')
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      row = {}
    if not isinstance(row, dict) or 'step' not in row:
      if number == len(lines):
        break
      raise ValueError(
        f'{path}, line {number} is not a row; repair or remove the file'
      )
    rows.append((row, line + b'\n'))
  return rows


def _drop_rows_after(path: pathlib.Path, step: int | None) -> int | None:
  """Drops the history's later rows; returns the last remaining step."""
  rows = _rows(path)
  kept = [
    (row, line)
    for row, line in rows
    if step is not None and row['step'] <= step
  ]
  data = b''.join(line for _, line in kept)
  if path.exists() and data != path.read_bytes():
    files.write_bytes(path, data)
    _LOG.info(
      '%s: dropped %d rows after step %s', path, len(rows) - len(kept), step
    )
  return kept[-1][0]['step'] if kept else None
