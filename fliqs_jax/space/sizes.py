"""Numbers of channels and sizes of kernels that an architecture may choose.

A network asks `Sizes` how many channels a tensor has and how large a kernel is.
The answer is one number, or several among which a decision chooses. Then the
largest is allocated, and the first channels (the centre of the kernel) are
active. The same code builds the searched network, and the resulting one, for
which every answer is one number.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax

BRANCHES, MASKED = 'branches', 'masked'

# The leaves of `arch` in which a layer reads its sizes.
INPUT_CHANNELS, OUTPUT_CHANNELS = 'input_channels', 'output_channels'
KERNEL = 'kernel'
LEAVES = (INPUT_CHANNELS, OUTPUT_CHANNELS, KERNEL)
# The kinds of decisions in result.json are this and KERNEL.
_CHANNELS = 'channels'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Channels:
  """The number of channels of a tensor.

  Attributes:
    decision: name of the decision that chooses; tensors that must have equally
      many channels share it. None: there is nothing to decide.
    labels: [K] options of the decision.
    counts: [K] active channels of this tensor, by option.
    published: index of the option that the published network has.
    has_leaf: whether layers declare a leaf of `arch` for it.
  """

  decision: str | None
  labels: tuple[int, ...]
  counts: tuple[int, ...]
  published: int = 0
  has_leaf: bool = True

  @property
  def kind(self) -> str:
    """The kind of the decision in result.json."""
    return _CHANNELS

  @property
  def size(self) -> int:
    """The number of channels that are allocated: the largest count."""
    return max(self.counts)

  @property
  def shares(self) -> tuple[float, ...]:
    """[K] shares of the allocated channels that are active, by option."""
    return tuple(count / self.size for count in self.counts)

  def scaled(self, count: Callable[[int], int]) -> 'Channels':
    """Returns channels that follow the same decision.

    Args:
      count: number of channels of this tensor -> number of the other's.
    """
    return dataclasses.replace(self, counts=tuple(map(count, self.counts)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Kernel:
  """The size of a square kernel.

  Attributes:
    decision: name of the decision that chooses; None: there is nothing to
      decide.
    labels: [K] heights and widths to choose from, in pixels.
    weights: `branches`: a kernel of its own for each size; `masked`: the centre
      of the largest.
    published: index of the size that the published network has.
    has_leaf: whether layers declare a leaf of `arch` for it.
  """

  decision: str | None
  labels: tuple[int, ...]
  weights: str = BRANCHES
  published: int = 0
  has_leaf: bool = True

  @property
  def kind(self) -> str:
    """The kind of the decision in result.json."""
    return KERNEL

  @property
  def size(self) -> int:
    """The largest size, which is allocated."""
    return max(self.labels)

  @property
  def counts(self) -> tuple[int, ...]:
    """[K] heights and widths in pixels; see `Channels.counts`."""
    return self.labels

  @property
  def shares(self) -> tuple[float, ...]:
    """[K] shares of the largest kernel's taps, by option."""
    return tuple(label**2 / self.size**2 for label in self.labels)

  @property
  def has_branches(self) -> bool:
    """Whether there are several kernels, of which one is used."""
    return self.weights == BRANCHES and len(self.labels) > 1

  @property
  def is_masked(self) -> bool:
    """Whether there is one kernel, of which the centre is used."""
    return self.weights == MASKED and len(self.labels) > 1


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a network that are open, or those that were chosen.

  Attributes:
    widths: multiples of the published numbers of channels to choose from; ():
      as published.
    kernels: sizes to choose from for those kernels that the network leaves
      open, in pixels; (): as published.
    kernel_weights: `branches` (TuNAS) or `masked`; see `Kernel`.
    found: {decision: selected label}, the `sizes` of an arch.json. If it names
      no decision of a kind, all sizes of that kind are as published.
    is_served: whether the network is only served, and so has no leaves.
  """

  widths: tuple[float, ...] = ()
  kernels: tuple[int, ...] = ()
  kernel_weights: str = BRANCHES
  found: Mapping[str, int] | None = None
  is_served: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'widths', tuple(self.widths))
    object.__setattr__(self, 'kernels', tuple(self.kernels))
    # The fields of a linen module must be hashable. An arch.json without sizes
    # has the same meaning as None.
    found = tuple(sorted(dict(self.found or ()).items())) or None
    object.__setattr__(self, 'found', found)
    if self.kernel_weights not in (BRANCHES, MASKED):
      raise ValueError(
        f'sizes.kernel_weights={self.kernel_weights!r} is unknown; allowed: '
        f'{BRANCHES}, {MASKED}'
      )
    for key, values in (('widths', self.widths), ('kernels', self.kernels)):
      if list(values) != sorted(set(values)) or min(values, default=1) <= 0:
        raise ValueError(
          f'sizes.{key}={values} must be positive, different and rising'
        )
    if not all(_is_odd(k) for k in self.kernels):
      raise ValueError(f'sizes.kernels={self.kernels} must be odd, as 3, 5, 7')

  def channels(
    self, name: str, published: int, count: Callable[[float], int] = int
  ) -> Channels:
    """Returns the channels of a tensor with a decision of its own.

    Args:
      name: name of the decision, without `/channels`.
      published: number of channels of the published network.
      count: `published` times a width -> number of channels.

    Raises:
      ValueError: widths that give no channel, or the same number twice.
    """
    decision = f'{name}/{_CHANNELS}'
    if (label := self._chosen(decision, _CHANNELS)) is not None:
      return Channels(decision, (label,), (label,), has_leaf=not self.is_served)
    if not self.widths:
      return constant(published)
    counts = tuple(count(published * width) for width in self.widths)
    if min(counts) < 1 or len(set(counts)) < len(counts):
      raise ValueError(
        f'sizes.widths={self.widths} of {published} channels give {counts} in '
        f'{decision}: each must be at least 1, and no two the same'
      )
    return Channels(decision, counts, counts, _nearest(counts, published))

  def kernel(self, name: str, published: int) -> Kernel:
    """Returns the size of a kernel with a decision of its own.

    Args:
      name: name of the decision, without `/kernel`.
      published: height and width of the published kernel, in pixels.

    Raises:
      ValueError: `found` has an even size for it.
    """
    decision = f'{name}/{KERNEL}'
    if (size := self._chosen(decision, KERNEL)) is not None:
      if not _is_odd(size):
        raise ValueError(
          f'the sizes of arch.json have {decision}={size}, which must be odd'
        )
      return Kernel(
        decision, (size,), self.kernel_weights, has_leaf=not self.is_served
      )
    if not self.kernels:
      return Kernel(None, (published,), has_leaf=False)
    return Kernel(
      decision,
      self.kernels,
      self.kernel_weights,
      _nearest(self.kernels, published),
    )

  def _chosen(self, decision: str, kind: str) -> int | None:
    """Returns the label that `found` has for a decision; None: as published."""
    found = dict(self.found or ())
    if decision not in found:
      # An arch.json says the kind of a decision by its name alone.
      if any(name.endswith(f'/{kind}') for name in found):
        raise ValueError(
          f'the sizes of arch.json lack {decision}; use the arch.json of a run '
          'of this network'
        )
      return None
    label = found[decision]
    is_whole = isinstance(label, int) and not isinstance(label, bool)
    if not is_whole or label < 1:
      raise ValueError(
        f'the sizes of arch.json have {decision}={label!r}, which must be a '
        'whole number, at least 1'
      )
    return label


def between(
  layer: Callable[..., Any],
  inputs: Channels,
  outputs: Channels,
  kernel: Kernel | None = None,
) -> Callable[..., Any]:
  """Returns a layer's constructor with its sizes given.

  Args:
    layer: constructor of a linen layer; if a size is open, of a layer that
      reads decisions.
    inputs: channels of the layer's input.
    outputs: channels of the layer's output.
    kernel: size of the kernel of a convolution that leaves it open.
  """
  given: dict[str, Any] = dict(features=outputs.size)
  if kernel is not None:
    given['kernel_size'] = (kernel.size, kernel.size)
  decided = dict(zip(LEAVES, (inputs, outputs, kernel)))
  given |= {
    name: size
    for name, size in decided.items()
    if size is not None and size.has_leaf
  }
  return functools.partial(layer, **given)


def constant(count: int) -> Channels:
  """Returns a number of channels that no decision changes."""
  return Channels(None, (count,), (count,), has_leaf=False)


def _is_odd(size: float) -> bool:
  return size % 2 == 1


def _nearest(values: Sequence[int], wanted: int) -> int:
  return min(range(len(values)), key=lambda i: abs(values[i] - wanted))
