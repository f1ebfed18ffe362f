"""The interface between one data set and the pipeline."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import numpy as np

Columns = Mapping[str, np.ndarray]


class Examples(Protocol):
  """Labelled examples in a fixed order; read many at a time, by number."""

  def __len__(self) -> int:
    """Returns their number."""

  def __getitem__(self, numbers: np.ndarray) -> Columns:
    """Returns columns of N rows, 'label' among them, for int64 [N].

    What is no array, such as encoded images, is an array of objects.
    """


class Arrays:
  """Examples that are kept in memory."""

  def __init__(self, **columns: np.ndarray):
    self._columns = columns

  def __len__(self) -> int:
    return len(self._columns['label'])

  def __getitem__(self, numbers: np.ndarray) -> Columns:
    return {name: column[numbers] for name, column in self._columns.items()}


@dataclasses.dataclass(frozen=True)
class Spec:
  """What one example gives to one input of a model.

  Has what `jax.eval_shape` asks of an argument.

  Attributes:
    shape: without the batch.
    dtype: of the batch.
  """

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One labelled data set.

  Invariants:
    * `len(open(split)) == split_sizes[split]`, in a fixed order.
    * All randomness of `train_inputs` comes from `bits`: a batch is then a
      function of the step, whoever computes it.
    * Row i of a batch depends on row i of what it is made of, and on no other.

  Attributes:
    name: what `config.data.name` calls it.
    num_classes: labels are 0 .. num_classes - 1.
    inputs: what a model is called with, by name; no name is 'label' or 'mask'.
    split_sizes: number of examples of each named split. Known before `open`,
      so that a config is refused before anything is decoded.
    open: from a split's name to its `Examples`.
    train_inputs: from columns as opened, and uint64 [N], 64 random bits per
      example, to an array [N, ...] for every one of `inputs`. Decodes, crops,
      augments, normalises.
    eval_inputs: the same without `bits`, for valid and test.
    threads: how many batches are prepared ahead, each by its own thread.
  """

  name: str
  num_classes: int
  inputs: Mapping[str, Spec]
  split_sizes: Mapping[str, int]
  open: Callable[[str], Examples]
  train_inputs: Callable[[Columns, np.ndarray], Columns]
  eval_inputs: Callable[[Columns], Columns]
  threads: int = 1


def model_inputs(named: Mapping[str, Any]) -> Any:
  """Returns what a model is called with.

  Args:
    named: a batch, or the `inputs` of a data set.

  Returns:
    The only input, or a dict of all by name if there are several.
  """
  inputs = {k: v for k, v in named.items() if k not in ('label', 'mask')}
  return inputs if len(inputs) > 1 else next(iter(inputs.values()))
