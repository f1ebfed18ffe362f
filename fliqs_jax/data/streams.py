"""Streams of a run: made from `config.data`, which is checked."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools

import ml_collections
import numpy as np

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.data import splits

# Imports inside functions: only the runs that need a data set import its code.


def _digits(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import digits

  return digits.dataset(config.data_dir)


def _cifar10(
  config: ml_collections.ConfigDict, read: bool = True
) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import cifar10

  return cifar10.dataset(config.data_dir, config.augment, read)


def _fashion_mnist(
  config: ml_collections.ConfigDict, read: bool = True
) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import fashion_mnist

  return fashion_mnist.dataset(config.data_dir, config.augment, read)


def _imagenet2012(
  config: ml_collections.ConfigDict, read: bool = True
) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import imagenet

  return imagenet.dataset(
    config.data_dir,
    config.image_size,
    config.augment,
    config.random_erasing,
    read,
  )


def _criteo(
  config: ml_collections.ConfigDict, read: bool = True
) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import criteo

  return criteo.dataset(
    config.data_dir, config.buckets, config.max_bad_lines, read
  )


def _synthetic(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import synthetic

  size = config.image_size
  return synthetic.images((size, size, 3), config.num_classes)


def _synthetic_criteo(config: ml_collections.ConfigDict) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import synthetic

  return synthetic.clicks(config.buckets)


def _pictures(
  config: ml_collections.ConfigDict, read: bool = True
) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import pictures

  return pictures.dataset(
    config.data_dir,
    config.patch,
    config.scale,
    config.crop,
    config.crops,
    read,
  )


def _synthetic_pictures(
  config: ml_collections.ConfigDict,
) -> dataset_lib.Dataset:
  from fliqs_jax.data.sources import synthetic

  return synthetic.pictures(
    config.patch, config.scale, config.crop, config.crops
  )


_CUT = dict(patch=int, scale=int, crop=int, crops=int)


@dataclasses.dataclass(frozen=True)
class Known:
  """A data set that a config can name.

  Attributes:
    make: `config.data` -> the data set.
    keys: {key of `config.data` that only this data set takes: its type}.
    reads: whether `make` looks at files before `open`; then it takes `read`,
      too, and with `read=False` gives the shapes alone.
  """

  make: Callable[..., dataset_lib.Dataset]
  keys: Mapping[str, type] = dataclasses.field(default_factory=dict)
  reads: bool = False


# The names of `data.name`. Another data set is another row.
DATASETS = {
  'digits': Known(_digits),
  'cifar10': Known(_cifar10, dict(augment=str), reads=True),
  'fashion_mnist': Known(_fashion_mnist, dict(augment=str), reads=True),
  'imagenet2012': Known(
    _imagenet2012,
    dict(image_size=int, augment=str, random_erasing=float),
    reads=True,
  ),
  'criteo': Known(_criteo, dict(buckets=int, max_bad_lines=int), reads=True),
  'synthetic': Known(_synthetic, dict(image_size=int, num_classes=int)),
  'synthetic_criteo': Known(_synthetic_criteo, dict(buckets=int)),
  'pictures': Known(_pictures, _CUT, reads=True),
  'synthetic_pictures': Known(_synthetic_pictures, _CUT),
}

_SPLIT_KEYS = {
  'train': 'train_split',
  'valid': 'valid_split',
  'test': 'test_split',
}
_BATCH_KEYS = {
  'train': 'batch_size',
  'valid': 'valid_batch_size',
  'test': 'test_batch_size',
}
_KEY_TYPES = {
  'name': str,
  'data_dir': str,
  **dict.fromkeys(_SPLIT_KEYS.values(), str),
  **dict.fromkeys(_BATCH_KEYS.values(), int),
}


@dataclasses.dataclass(frozen=True)
class Streams:
  """Disjoint streams of batches; weights learn on train, the policy on valid.

  A batch is a dict of NumPy arrays, the rows of this process:
    * an array [B, ...] for each of `inputs`; images are normalised, float32
      [B, H, W, C]. `model_inputs(batch)` is the argument of a model's call.
    * 'label': int32 [B], a class; or [B, ...], of shape and dtype of `label`.
    * 'example_mask': float32 [B], in test only: 1 for an example, 0 where it
      is repeated to fill the batch.

  Invariants:
    * A batch is a function of config, seed and step: `train(n)` yields the
      batches of `train(0)` from the n-th on, and reads no earlier one.
    * The rows of processes 0, 1, ... at one step, concatenated, are the batch
      of a single process, bit for bit.
    * Shapes never change.

  Attributes:
    num_classes: number of classes; 0 if labels are no classes.
    inputs: {name: shape and dtype of one training example of that input}.
    label: shape and dtype of the label of one training example.
    num_examples: number of examples of 'train', 'valid' and 'test'.
    train: step -> endless shuffled, augmented batches from that step on; each
      epoch shows every example once.
    valid: step -> endless batches in another random order, not augmented.
    test: () -> the batches of one pass over the test examples in their order.
  """

  num_classes: int
  inputs: Mapping[str, dataset_lib.Spec]
  label: dataset_lib.Spec
  num_examples: Mapping[str, int]
  train: Callable[[int], Iterator[dict[str, np.ndarray]]]
  valid: Callable[[int], Iterator[dict[str, np.ndarray]]]
  test: Callable[[], Iterator[dict[str, np.ndarray]]]

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of an image; a KeyError if the data are no images."""
    return self.inputs['image'].shape


def make_streams(
  config: ml_collections.ConfigDict,
  seed: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
  dataset: dataset_lib.Dataset | None = None,
) -> Streams:
  """Opens the data set that a config names, preparing it on first use.

  Args:
    config: `config.data`, with exactly these keys: `name` (one of DATASETS),
      `data_dir` ('' for the usual directory), `train_split`, `valid_split`,
      `test_split` (TFDS split strings), `batch_size`, `valid_batch_size`,
      `test_batch_size` (examples of all processes together), and the keys of
      the data set: cifar10 and fashion_mnist `augment`; imagenet2012
      `image_size`, `augment`, `random_erasing`; criteo `buckets`,
      `max_bad_lines`; synthetic `image_size`, `num_classes`; synthetic_criteo
      `buckets`; pictures and synthetic_pictures `patch`, `scale`, `crop`,
      `crops`.
    seed: number, at least 0, that determines order and augmentation.
    process_index: index of this process, which selects its part of each batch.
    process_count: number of processes, and so of parts of each batch.
    dataset: the user's own data set instead of one of DATASETS; `config.name`
      must be its name. None: `config.name` selects one of DATASETS.

  Raises:
    ValueError: a key is missing or unknown, the data set is unknown, a split is
      malformed, empty or overlaps another, a batch size is below 1, larger than
      its split or not divisible by `process_count`, the seed is negative,
      `data_dir` cannot be used, or data are damaged.
  """
  _check_keys(config, dataset)
  if seed < 0:
    raise ValueError(f'seed={seed} must not be negative')
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index} must be 0 or more and below '
      f'process_count={process_count}'
    )
  dataset = _find_dataset(config, dataset)
  ranges = _ranges(config, dataset)
  sizes = {stream: sum(map(len, named)) for stream, named in ranges.items()}
  rows = {
    stream: _rows(config, stream, size, process_index, process_count)
    for stream, size in sizes.items()
  }

  from fliqs_jax.data import pipeline  # Grain, and with it jax.

  open_split = functools.cache(dataset.open)  # Train and valid may share one.
  parts = {
    stream: pipeline.Part(
      dataset=dataset,
      read=pipeline.reader(dataset, open_split, ranges[stream]),
      num_examples=size,
      batch_size=config[_BATCH_KEYS[stream]],
      rows=rows[stream],
    )
    for stream, size in sizes.items()
  }
  return Streams(
    num_classes=dataset.num_classes,
    inputs=dataset.inputs,
    label=dataset.label,
    num_examples=sizes,
    train=pipeline.endless(parts['train'], seed=(seed, 0), augment=True),
    valid=pipeline.endless(parts['valid'], seed=(seed, 1), augment=False),
    test=pipeline.one_pass(parts['test']),
  )


def unread_streams(config: ml_collections.ConfigDict) -> Streams:
  """Returns the shapes of the data that a config names, as empty streams.

  Args:
    config: `config.data`, as of `make_streams`.

  Raises:
    ValueError: a key is missing or unknown, the data set is unknown, or a value
      is not allowed, whatever the files hold.
  """
  _check_keys(config, None)
  known = DATASETS[config.name]
  dataset = (
    known.make(config, read=False) if known.reads else known.make(config)
  )
  return Streams(
    num_classes=dataset.num_classes,
    inputs=dataset.inputs,
    label=dataset.label,
    num_examples={},
    train=lambda step: iter(()),
    valid=lambda step: iter(()),
    test=lambda: iter(()),
  )


def _check_keys(
  config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset | None
) -> None:
  types = dict(_KEY_TYPES)
  if dataset is None and isinstance(config.to_dict().get('name'), str):
    if config.name not in DATASETS:
      raise ValueError(
        f'config.data.name={config.name!r} is no known data set; known: '
        f'{", ".join(DATASETS)}; or pass one of your own as `dataset`'
      )
    types |= DATASETS[config.name].keys
  if set(config) != set(types):
    missing = ', '.join(sorted(set(types) - set(config))) or 'none'
    unknown = ', '.join(sorted(set(config) - set(types))) or 'none'
    raise ValueError(
      f'config.data has unknown keys ({unknown}) or lacks some ({missing}); '
      f'it takes exactly {", ".join(types)}'
    )
  for key, kind in types.items():
    allowed = (int, float) if kind is float else kind
    # A bool is an int to Python.
    if not isinstance(config[key], allowed) or isinstance(config[key], bool):
      raise ValueError(
        f'config.data.{key}={config[key]!r} must be of type {kind.__name__}'
      )


def _find_dataset(
  config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset | None
) -> dataset_lib.Dataset:
  if dataset is None:
    return DATASETS[config.name].make(config)
  if config.name != dataset.name:
    raise ValueError(
      f'config.data.name={config.name!r} must be the name of the data set '
      f'that was passed, {dataset.name!r}'
    )
  return dataset


def _ranges(
  config: ml_collections.ConfigDict, dataset: dataset_lib.Dataset
) -> dict[str, tuple[splits.Range, ...]]:
  """Returns the ranges that each stream reads, which share no example.

  They are ranges of examples, where split strings count units.
  """
  specs = {f'config.data.{k}': config[k] for k in _SPLIT_KEYS.values()}
  ranges = {
    key: splits.parse(key, spec, dataset.split_sizes)
    for key, spec in specs.items()
  }
  splits.check_disjoint(specs, ranges)
  return {
    stream: tuple(named.times(dataset.parts) for named in of)
    for stream, of in zip(_SPLIT_KEYS, ranges.values())
  }


def _rows(
  config: ml_collections.ConfigDict,
  stream: str,
  num_examples: int,
  process_index: int,
  process_count: int,
) -> range:
  """Returns the rows of each global batch that this process reads."""
  key = _BATCH_KEYS[stream]
  size = config[key]
  if not 1 <= size <= num_examples:
    raise ValueError(
      f'config.data.{key}={size} must be at least 1 and at most '
      f'{num_examples}, the number of examples in '
      f'config.data.{_SPLIT_KEYS[stream]}={config[_SPLIT_KEYS[stream]]!r}'
    )
  if rest := size % process_count:
    nearest = [size - rest, size - rest + process_count]
    raise ValueError(
      f'config.data.{key}={size} must be divisible by the {process_count} '
      f'processes that share it; the nearest: {nearest[0]}, {nearest[1]}'
    )
  local = size // process_count
  return range(process_index * local, (process_index + 1) * local)
