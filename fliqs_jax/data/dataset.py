"""Interface between one data set and the pipeline."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, Protocol

import numpy as np

from fliqs_jax.runtime import files

Columns = Mapping[str, np.ndarray]


def local_path(data_dir: str) -> pathlib.Path:
  """Returns the path of a local directory, of which `~` is the user's home.

  Raises:
    ValueError: the user has no home directory.
  """
  return files.at_home(
    data_dir, 'Set config.data.data_dir to the whole path of a directory'
  )


class Examples(Protocol):
  """Labelled examples in a fixed order; read many at a time, by number."""

  def __len__(self) -> int:
    """Returns their number."""

  def __getitem__(self, numbers: np.ndarray) -> Columns:
    """Returns columns of N rows for int64 numbers [N].

    Among them is 'label', unless the inputs of the data set hold it.

    A column whose values are no arrays, such as encoded images, is an array of
    objects.
    """


class Arrays:
  """Examples that are kept in memory."""

  def __init__(self, **columns: np.ndarray):
    """Keeps columns [N, ...].

    Raises:
      ValueError: they have not all the same number of rows.
    """
    rows = {name: len(column) for name, column in columns.items()}
    if len(set(rows.values())) != 1:
      raise ValueError(
        f'columns must all have as many rows as the others, but have {rows}'
      )
    (self._rows,) = set(rows.values())
    self._columns = {k: np.asarray(column) for k, column in columns.items()}

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, numbers: np.ndarray) -> Columns:
    return {name: column[numbers] for name, column in self._columns.items()}


@dataclasses.dataclass(frozen=True)
class Spec:
  """Shape and dtype of one example of one input of a model.

  `jax.eval_shape` takes it as an argument.

  Attributes:
    shape: shape of one example, without the batch.
    dtype: dtype of the input.
  """

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.float32)


# What a batch holds beside the inputs of the model.
_NO_INPUTS = 'label', 'example_mask'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One labelled data set.

  Invariants:
    * `len(open(split)) == split_sizes[split] * parts`, in a fixed order, the
      parts of a unit next to each other.
    * All randomness of `train_inputs` comes from its random bits, so a batch is
      a function of the step, whichever process computes it.
    * Row i of a batch depends on row i of the opened columns only.

  Attributes:
    name: name of the data set in `config.data.name`.
    num_classes: number of classes; labels are 0 .. num_classes - 1. 0 if labels
      are no classes.
    inputs: {name: `Spec`} of the model's inputs, those of training; pictures of
      valid and test may be larger. No name is 'label' or 'example_mask'.
    split_sizes: {split: number of units, which a split string counts}. It is
      known before `open`, so that a wrong config is refused before anything is
      decoded.
    open: name of a split -> its `Examples`.
    train_inputs: (columns of `Examples`, uint64 [N] random bits) -> an array
      [N, ...] for each of `inputs`: decoded, augmented and normalised; also
      'label', if labels are no column of `Examples`.
    eval_inputs: columns of `Examples` -> an array [N, ...] for each of
      `inputs`, not augmented, and perhaps 'label'; for valid and test.
    threads: number of batches that are prepared ahead, each by a thread.
    label: `Spec` of a label; a class if it has no axes.
    parts: number of examples of a unit, such as the crops of a picture: of two
      of them one cannot be in train and the other in test.
  """

  name: str
  num_classes: int
  inputs: Mapping[str, Spec]
  split_sizes: Mapping[str, int]
  open: Callable[[str], Examples]
  train_inputs: Callable[[Columns, np.ndarray], Columns]
  eval_inputs: Callable[[Columns], Columns]
  threads: int = 1
  label: Spec = Spec((), np.dtype(np.int32))
  parts: int = 1


def model_inputs(named: Mapping[str, Any]) -> Any:
  """Returns the argument of a model's call.

  Args:
    named: a batch, or the `inputs` of a data set: values by name.

  Returns:
    The value of the only input; {name: value} if there are several inputs.

  Raises:
    ValueError: it is no dict, or has no input.
  """
  if not isinstance(named, Mapping):
    raise ValueError(
      f'a batch is a {type(named).__name__}; it must be a dict of inputs by '
      "name, and 'label'"
    )
  inputs = {k: v for k, v in named.items() if k not in _NO_INPUTS}
  if not inputs:
    raise ValueError(
      f'a batch of the keys {sorted(named)} has no input of the model; each '
      f'key but {" and ".join(_NO_INPUTS)} is one'
    )
  return inputs if len(inputs) > 1 else next(iter(inputs.values()))
