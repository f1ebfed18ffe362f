"""Batches of a stream, each a pure function of the step, prepared by Grain.

One element of the Grain data set is one step's batch, not one example. Grain's
own shuffle, repeat, slice and batch cost 23 us of Python per example, 6 ms per
step at 128 train and 128 valid examples; for a whole batch at once, in NumPy,
they cost very little. Grain runs the threads.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import sys

import grain
import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import splits

Batch = dict[str, np.ndarray]
# Numbers of examples, int64 [N] -> their columns.
Reader = Callable[[np.ndarray], dataset_lib.Columns]

_WORDS_AT_ONCE = 1 << 20  # 32 MB; Criteo's 46 million at once need 1.5 GB.


@dataclasses.dataclass(frozen=True)
class Part:
  """The part of a stream that one process reads.

  Position p of a stream is row p % batch_size of the batch of step
  p // batch_size.

  Attributes:
    dataset: the data set.
    read: reads examples 0 .. num_examples - 1 of the stream by number.
    num_examples: number of examples of the stream.
    batch_size: number of rows of a batch of all processes.
    rows: contiguous range of the rows that this process reads.
  """

  dataset: dataset_lib.Dataset
  read: Reader
  num_examples: int
  batch_size: int
  rows: range

  def positions(self, step: int) -> np.ndarray:
    """Returns int64 [N], the positions of this process's rows of a batch."""
    return step * self.batch_size + np.asarray(self.rows)


def reader(
  dataset: dataset_lib.Dataset,
  open_split: Callable[[str], dataset_lib.Examples],
  ranges: Sequence[splits.Range],
) -> Reader:
  """Returns a function that reads the examples of `ranges` by number.

  Args:
    dataset: the data set.
    open_split: name of a split -> `Examples`; the data set's `open`, cached if
      streams share a split.
    ranges: ranges of the examples; number 0 is the first of the first range.

  Raises:
    ValueError: a split does not have the size in `split_sizes`.
  """
  opened = [open_split(named.split) for named in ranges]
  for named, examples in zip(ranges, opened):
    size = dataset.split_sizes[named.split] * dataset.parts
    if len(examples) != size:
      raise ValueError(
        f'split {named.split!r} of {dataset.name!r} has {len(examples)} '
        f'examples on disk, not {size}; delete the prepared data to prepare it '
        'again'
      )
  ends = np.cumsum([len(named) for named in ranges])

  def read(numbers: np.ndarray) -> dataset_lib.Columns:
    which = np.searchsorted(ends, numbers, side='right')
    order = np.argsort(which, kind='stable')
    parts = []
    for i in np.unique(which):
      past = numbers[which == i] - (ends[i] - len(ranges[i]))
      parts.append(opened[i][past + ranges[i].start])
    if len(parts) == 1:
      return parts[0]
    back = np.argsort(order)
    return {
      name: np.concatenate([part[name] for part in parts])[back]
      for name in parts[0]
    }

  return read


def endless(
  part: Part, seed: tuple[int, int], augment: bool
) -> Callable[[int], Iterator[Batch]]:
  """Returns a function from a step to the shuffled batches from that step on.

  Position p shows an example of epoch p // num_examples. Epochs follow each
  other without a gap: a batch may hold the end of one and the start of the
  next, and every example appears exactly once in every epoch.

  Args:
    part: the part of the stream to read.
    seed: two numbers that no other stream has.
    augment: whether `train_inputs` makes the batches, not `eval_inputs`.
  """
  dataset = part.dataset
  sequence = np.random.SeedSequence(seed)
  order_key, bits_key = sequence.generate_state(2, np.uint64)

  @functools.lru_cache(maxsize=2)  # A batch touches at most two epochs.
  def order(epoch: int) -> np.ndarray:
    words = _random_words((order_key, epoch), 0, part.num_examples)
    return np.argsort(words, kind='stable')

  def batch_at(step: int) -> Batch:
    positions = part.positions(step)
    epochs, offsets = np.divmod(positions, part.num_examples)
    numbers = np.empty_like(offsets)
    for epoch in np.unique(epochs):
      now = epochs == epoch
      numbers[now] = order(int(epoch))[offsets[now]]
    columns = part.read(numbers)
    if augment:
      # The bits depend on the position, not on the process that reads the row.
      bits = _random_words((bits_key, 0), int(positions[0]), len(positions))
      inputs = dataset.train_inputs(columns, bits)
    else:
      inputs = dataset.eval_inputs(columns)
    return _batch(part, inputs, columns, any_size=not augment)

  def from_step(start_step: int) -> Iterator[Batch]:
    if start_step < 0:
      raise ValueError(f'start_step={start_step} must not be negative')
    # Positions of later steps would need more than 64 bits.
    stop = sys.maxsize // part.batch_size
    return _iterate(batch_at, start_step, stop, dataset.threads)

  return from_step


def one_pass(part: Part) -> Callable[[], Iterator[Batch]]:
  """Returns a function that returns the batches of one pass, in order.

  Repeated examples fill the last batch. Batches have one more field,
  'example_mask', float32 [N]: 1 for an example, 0 for a repeated one.

  Args:
    part: the part of the stream to read.
  """

  def batch_at(step: int) -> Batch:
    positions = part.positions(step)
    columns = part.read(positions % part.num_examples)
    inputs = part.dataset.eval_inputs(columns)
    mask = positions < part.num_examples
    return _batch(part, inputs, columns, any_size=True) | dict(
      example_mask=mask.astype(np.float32)
    )

  num_batches = -(-part.num_examples // part.batch_size)
  return lambda: _iterate(batch_at, 0, num_batches, part.dataset.threads)


def _random_words(key: tuple[int, int], start: int, count: int) -> np.ndarray:
  """Returns uint64 [count], words start, start + 1, ... of sequence `key`.

  Philox computes each word from a counter, not from the word before. Only its
  raw words are used, because later versions of NumPy may draw anything else
  differently.
  """
  words = np.empty(count, np.uint64)
  for first in range(0, count, _WORDS_AT_ONCE):
    some = words[first : first + _WORDS_AT_ONCE]
    generator = np.random.Philox(
      key=np.array(key, np.uint64), counter=start + first
    )
    # Each count gives four words, of which the first is used.
    some[:] = generator.random_raw(4 * len(some))[::4]
  return words


def _batch(
  part: Part,
  inputs: dataset_lib.Columns,
  columns: dataset_lib.Columns,
  any_size: bool,
) -> Batch:
  """Returns a batch, after checking that it is what the data set promises.

  Args:
    part: the part of the stream.
    inputs: what the data set made of the columns.
    columns: those that were read.
    any_size: whether examples may have other sizes than the model's inputs in
      training, as pictures of valid and test.

  Raises:
    ValueError: inputs or labels have other names, shapes or types.
  """
  dataset, rows = part.dataset, len(part.rows)
  specs = dict(dataset.inputs)
  if dataset.label.shape:
    specs['label'] = dataset.label  # It is no class.
  if set(inputs) != set(specs):
    raise ValueError(
      f'{dataset.name!r} makes inputs called {sorted(inputs)} where its Spec '
      f'has {sorted(specs)}'
    )
  for name, spec in specs.items():
    x = np.asarray(inputs[name])
    shape = x.shape[1:] if any_size else spec.shape
    fits = x.shape == (rows, *shape) and len(shape) == len(spec.shape)
    if not fits or x.dtype.kind in 'OSU':
      raise ValueError(
        f'{dataset.name!r} makes {name} of {x.dtype}{list(x.shape)} where its '
        f'Spec has numbers of shape {[rows, *spec.shape]}'
      )
  if dataset.label.shape:
    return dict(inputs)
  return {**inputs, 'label': _classes(dataset, columns, rows)}


def _classes(
  dataset: dataset_lib.Dataset, columns: dataset_lib.Columns, rows: int
) -> np.ndarray:
  """Returns the labels int32 [N].

  The one-hot vector of any other label would be zero, without an error.
  """
  if 'label' not in columns:
    raise ValueError(
      f'{dataset.name!r} has no column called label, but {sorted(columns)}'
    )
  labels = np.asarray(columns['label'])
  if labels.shape != (rows,) or labels.dtype.kind not in 'biu':
    raise ValueError(
      f'{dataset.name!r} has labels of {labels.dtype}{list(labels.shape)} '
      f'where they must be whole numbers of shape [{rows}]'
    )
  if labels.min() < 0 or labels.max() >= dataset.num_classes:
    raise ValueError(
      f'{dataset.name!r} has labels from {labels.min()} to {labels.max()} '
      f'where they must be from 0 to {dataset.num_classes - 1}; correct the '
      'labels or num_classes'
    )
  return labels.astype(np.int32)


def _iterate(
  batch_at: Callable[[int], Batch], start: int, stop: int, threads: int
) -> Iterator[Batch]:
  steps = grain.MapDataset.range(start, stop)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  return iter(steps.map(batch_at).to_iter_dataset(options))
