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
# be Python identifiers: ours may hold a slash, as TensorBoard groups by it.
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
  """Returns accumulators that have seen no step.

  Args:
    step_metrics: a step's metrics by name, or anything with the same keys.
    last: names of which the last value counts, not the average.

  Raises:
    ValueError: for a name in `last` that is no metric.
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
  # Summed in float32 also when a step computes in bfloat16, where the sum of
  # 256 and 1 is 256.
  return {
    name: metric.merge(
      metric.from_model_output(jnp.asarray(step_metrics[name], jnp.float32))
    )
    for name, metric in accumulators.items()
  }


def accumulate(
  accumulators: Accumulators | None, step_metrics: Mapping[str, jax.Array]
) -> Accumulators:
  """Adds one step's metrics; stays on the device, waits for nothing.

  Args:
    accumulators: what `empty` or the last `accumulate` returned; None stands
      for `empty(step_metrics)`.
    step_metrics: scalars by name, of any real dtype.

  Raises:
    ValueError: if a metric is no scalar, or if the names are not those of
      `accumulators`.
  """
  if accumulators is None:
    accumulators = empty(step_metrics)
  if step_metrics.keys() != accumulators.keys():
    raise ValueError(
      f'a step has metrics {sorted(step_metrics)}, the steps before had '
      f'{sorted(accumulators)}'
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
  """Fetches the averages and last values; NaN where no step was seen."""
  values = jax.device_get(_compute(accumulators))
  return {name: float(value) for name, value in values.items()}


def packed(accumulators: Accumulators) -> dict[str, list[str]]:
  """Returns the accumulators, to the bit, as what JSON can hold."""
  leaves = {k: jax.tree.leaves(v) for k, v in accumulators.items()}
  return {
    name: [np.asarray(x).tobytes().hex() for x in values]
    for name, values in jax.device_get(leaves).items()
  }


def unpacked(content: Mapping[str, Sequence[str]]) -> Accumulators:
  """Returns what `packed` was given, of averages."""

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

  A value that was not finite reads as None. A last line that a kill tore is
  passed over.

  Raises:
    ValueError: if another line is not a row.
  """
  return [row for row, _ in _rows(_history_path(workdir))]


class Writer:
  """Appends to `history.jsonl` and to TensorBoard files; one per run.

  Invariants:
    * `history.jsonl` depends on the values written and nothing else: no clock,
      no host. A run that was killed and resumed ends with the same bytes as
      one that was not.
    * When `write` returns the row is on disk. So write the row of a step
      before its checkpoint is saved: a resumed run does not write it again.
    * Steps increase strictly.
  """

  def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None):
    """Opens the files, and takes back what the run resumed from did not see.

    Args:
      workdir: a directory on a file system; made if need be.
      resume_step: the step of the restored checkpoint, whose later rows are
        dropped; None for a run that starts afresh, which drops every row.

    Raises:
      ValueError: if the directory cannot be written, or the file is damaged.
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
      # Readers then hide what the killed run had logged from this step on.
      purge_step=0 if resume_step is None else resume_step + 1,
      # tensorboardX names a file by the second, and would empty that of a run
      # which began and ended within this one.
      filename_suffix=f'.{time.time_ns()}',
    )

  def write(
    self,
    step: int,
    scalars: Mapping[str, float],
    policy: Mapping[str, Sequence[float]],
    timing: Mapping[str, float],
  ) -> None:
    """Logs one logging point.

    Args:
      step: greater than that of the row before.
      scalars: by name; for both files.
      policy: probabilities [K] by decision; for `history.jsonl` only.
      timing: values that another run would not repeat, such as steps per
        second; for TensorBoard only.

    Raises:
      ValueError: if the step does not increase, or a name is taken.
    """
    if self._last_step is not None and step <= self._last_step:
      raise ValueError(
        f'a row of step {step} cannot follow the row of step {self._last_step}'
      )
    taken = scalars.keys() & {'step', 'policy', *timing}
    if taken:
      raise ValueError(
        f'scalars named {sorted(taken)}: "step" and "policy" are keys of a '
        'row, and a name is either a scalar or a timing'
      )
    self._file.write(_line(step, scalars, policy))
    self._file.flush()
    os.fsync(self._file.fileno())
    self._last_step = step
    for name, value in sorted({**scalars, **timing}.items()):
      self._board.add_scalar(name, float(value), step)

  def close(self) -> None:
    """Closes both files; nothing can be written afterwards."""
    self._file.close()
    self._board.close()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _history_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
  return pathlib.Path(workdir) / workdir_lib.HISTORY


def _finite(value: float) -> float | None:
  # JSON has no word for infinity or NaN; Python's own reader takes `NaN`, most
  # others do not.
  value = float(value)
  return value if math.isfinite(value) else None


def _line(
  step: int,
  scalars: Mapping[str, float],
  policy: Mapping[str, Sequence[float]],
) -> bytes:
  # Sorted, because a dict comes back sorted from a checkpoint or a jit.
  row = {'step': int(step)}
  row |= {name: _finite(scalars[name]) for name in sorted(scalars)}
  row['policy'] = {
    name: [_finite(probability) for probability in policy[name]]
    for name in sorted(policy)
  }
  return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b'\n'


def _rows(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
  """Returns each row with its line, newline included, less a torn last one."""
  if not path.exists():
    return []
  lines = path.read_bytes().split(b'\n')
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict) or 'step' not in row:
      if number == len(lines):
        break
      raise ValueError(
        f'{path}, line {number} is not a row; mend or remove the file'
      )
    rows.append((row, line + b'\n'))
  return rows


def _drop_rows_after(path: pathlib.Path, step: int | None) -> int | None:
  """Rewrites the history without later rows; returns the last step left."""
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
