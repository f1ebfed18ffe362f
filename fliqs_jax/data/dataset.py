"""What the pipeline must know of one image data set, and nothing else."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np


def unchanged(
  images: Sequence[np.ndarray], bits: np.ndarray | None = None
) -> np.ndarray:
  """Returns [N] decoded images as uint8 [N, H, W, C], not augmented."""
  del bits
  return np.asarray(images)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One labelled image data set.

  Invariants:
    * `len(open(split)) == split_sizes[split]`, in a fixed order.
    * Pixels are uint8 until a batch is normalised: a set kept in memory is a
      quarter the size, and zeros are background to whoever pads.
    * All randomness of `train_images` comes from `bits`: a batch is then a
      function of the step, whoever computes it.

  Attributes:
    name: what `config.data.name` calls it.
    num_classes: labels are 0 .. num_classes - 1.
    input_shape: (H, W, C) of an image in a batch.
    split_sizes: number of examples of each named split. Known before `open`,
      so that a config is refused before anything is downloaded or decoded.
    mean: [C] mean of the training images, 0 to 255.
    std: [C] their standard deviation.
    open: from a split's name to its examples: `len` and `[i]`, each a dict of
      'image' (whatever the two functions below take) and 'label' (int).
    train_images: from [N] images as opened, and uint64 [N], 64 random bits per
      image, to uint8 [N, H, W, C]. Decodes, crops, augments.
    eval_images: the same without `bits`, for valid and test.
    in_memory: whether the examples of a stream are read once and kept. For
      sets that fit, and whose images as opened are arrays of one shape: a
      batch is then two gathers instead of N reads.
    threads: how many batches are prepared ahead, each by its own thread; more
      than one where images are decoded.
  """

  name: str
  num_classes: int
  input_shape: tuple[int, int, int]
  split_sizes: Mapping[str, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  open: Callable[[str], Sequence[Mapping[str, Any]]]
  train_images: Callable[[Sequence[Any], np.ndarray], np.ndarray] = unchanged
  eval_images: Callable[[Sequence[Any]], np.ndarray] = unchanged
  in_memory: bool = False
  threads: int = 1
