"""Decisions: one choice among formats, numbers of channels or kernel sizes."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from fliqs_jax.numerics import formats
from fliqs_jax.space import sizes as sizes_lib


@dataclasses.dataclass(frozen=True)
class Decision:
  """One choice among K options; `FormatDecision` or `SizeDecision`.

  Attributes:
    name: name in a policy and in result.json.
    leaves: paths of the leaves of `arch` that follow this decision.
  """

  name: str
  leaves: tuple[str, ...]

  @property
  def kind(self) -> str:
    """The kind in result.json: `format`, `channels` or `kernel`."""
    raise NotImplementedError

  @property
  def labels(self) -> Sequence[str | int]:
    """[K] options, as an arch.json has them."""
    raise NotImplementedError

  @property
  def precision(self) -> Sequence[int]:
    """[K] bits, channels or kernel sizes: more cost more, and are no worse."""
    raise NotImplementedError

  @property
  def dearest(self) -> int:
    """Index of the most precise format, or of the largest size."""
    raise NotImplementedError

  def one_hot(self, label: str | int | None) -> np.ndarray:
    """Returns [K] float32 with a one at the option called `label`.

    Raises:
      ValueError: there is no such option.
    """
    if label not in self.labels:
      raise ValueError(
        f'{label} is not on the menu of {self.name}: '
        f'{", ".join(map(str, self.labels))}'
      )
    matches = [option == label for option in self.labels]
    return np.asarray(matches, np.float32)

  def largest(self, given: Any) -> int:
    """Returns the index of the largest of [K] numbers, one for each option.

    Raises:
      ValueError: `given` is not K finite numbers of which one is the largest.
    """
    values, count = np.asarray(given), len(self.labels)
    is_number = values.dtype.kind in 'biuf' or values.dtype.name == 'bfloat16'
    if values.shape == (count,) and is_number:
      numbers = values.astype(np.float64)
      if np.isfinite(numbers).all() and np.sum(numbers == numbers.max()) == 1:
        return int(numbers.argmax())
    raise ValueError(
      f'choices: {self.name} is {given!r}; it must be {count} finite numbers, '
      f'one for each of {", ".join(map(str, self.labels))}, and one of them '
      'the largest, as `argmax`, `likeliest` and `space.choices` return'
    )


@dataclasses.dataclass(frozen=True)
class FormatDecision(Decision):
  """One choice among K formats.

  Its name is the layer's path, with `/weights` or `/activations` where the
  layer has two decisions, or the name of the group.

  Attributes:
    menu: [K] formats.
  """

  menu: tuple[formats.NumericFormat, ...]

  @property
  def kind(self) -> str:
    """The kind in result.json: `format`."""
    return 'format'

  @property
  def labels(self) -> tuple[str, ...]:
    """[K] names of the formats."""
    return tuple(numeric_format.name for numeric_format in self.menu)

  @property
  def precision(self) -> tuple[int, ...]:
    """[K] bits of the formats."""
    return tuple(f.bits for f in self.menu)

  @property
  def dearest(self) -> int:
    """Index of the format with the most bits, of these the most mantissa."""
    precisions = [(f.bits, f.mantissa_bits) for f in self.menu]
    return precisions.index(max(precisions))


@dataclasses.dataclass(frozen=True)
class SizeDecision(Decision):
  """One choice among K numbers of channels or K sizes of a kernel.

  Its name is what the network calls it, `NAME/channels` or `NAME/kernel`.

  Attributes:
    size: the options, and how they change a tensor.
  """

  size: sizes_lib.Channels | sizes_lib.Kernel

  @property
  def kind(self) -> str:
    """The kind in result.json: `channels` or `kernel`."""
    return self.size.kind

  @property
  def labels(self) -> tuple[int, ...]:
    """[K] numbers of channels or sizes of the kernel."""
    return self.size.labels

  @property
  def precision(self) -> tuple[int, ...]:
    """[K] numbers of channels or sizes of the kernel."""
    return self.labels

  @property
  def dearest(self) -> int:
    """Index of the largest size."""
    return self.labels.index(max(self.labels))
