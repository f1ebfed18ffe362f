"""What an architecture may choose besides formats: channels and kernel sizes.

A network asks `Sizes` how many channels a tensor has and how large a kernel is.
The answer is one number, or several of which a decision picks one: then what is
allocated is the largest, of which the first channels (the centre of the kernel)
are live. One network is searched, and found, and rebuilt smaller: a found
network is the same code whose every answer is one number.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax

BRANCHES, MASKED = 'branches', 'masked'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Channels:
  """How many channels a tensor has.

  Attributes:
    decision: name of the decision that picks; tensors that must agree share it.
      None: nothing to decide.
    labels: what it picks from, in its own terms.
    counts: how many channels of this tensor are live, by label.
    published: index of the label that the published network has.
    has_leaf: whether layers declare a leaf of `arch` for it.
  """

  decision: str | None
  labels: tuple[int, ...]
  counts: tuple[int, ...]
  published: int = 0
  has_leaf: bool = True

  @property
  def size(self) -> int:
    """What is allocated: the largest count."""
    return max(self.counts)

  @property
  def shares(self) -> tuple[float, ...]:
    """Which part of what is allocated is live, by label."""
    return tuple(count / self.size for count in self.counts)

  def scaled(self, count: Callable[[int], int]) -> 'Channels':
    """Returns a tensor whose channels follow this one's, by `count`."""
    return dataclasses.replace(self, counts=tuple(map(count, self.counts)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Kernel:
  """How large a square kernel is.

  Attributes:
    decision: name of the decision that picks; None: nothing to decide.
    labels: heights and widths to pick from, in pixels.
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
  def size(self) -> int:
    """The largest."""
    return max(self.labels)

  @property
  def counts(self) -> tuple[int, ...]:
    """The sizes, as `Channels` has counts."""
    return self.labels

  @property
  def shares(self) -> tuple[float, ...]:
    """Which part of the largest kernel's taps each has, by label."""
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
  """Which sizes of a network are open.

  Attributes:
    widths: multiples of the published number of channels; none: as published.
    kernels: sizes of those kernels that the network leaves open; none: as
      published.
    kernel_weights: `branches` (TuNAS) or `masked`; see `Kernel`.
    found: {decision: label}: every decision made, as an arch.json has it; what
      it does not name is as published.
    is_served: whether what was found is all there is: a network that nobody
      searches has no leaves.
  """

  widths: tuple[float, ...] = ()
  kernels: tuple[int, ...] = ()
  kernel_weights: str = BRANCHES
  found: Mapping[str, int] | None = None
  is_served: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'widths', tuple(self.widths))
    object.__setattr__(self, 'kernels', tuple(self.kernels))
    # What a module holds must be hashable; an arch.json without sizes says as
    # much as none.
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
      name: of the decision, without `/channels`.
      published: how many the network has as published.
      count: from `published` times a width to a number of channels.

    Raises:
      ValueError: widths that give no channel, or twice the same number.
    """
    decision = f'{name}/channels'
    if (label := self._found(decision)) is not None:
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
      name: of the decision, without `/kernel`.
      published: height and width that the network has as published.
    """
    decision = f'{name}/kernel'
    if (size := self._found(decision)) is not None:
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

  def _found(self, decision: str) -> int | None:
    found = dict(self.found or ())
    kind = decision.rpartition('/')[2]
    if decision not in found:
      if any(name.endswith(f'/{kind}') for name in found):
        raise ValueError(f'the sizes of arch.json lack {decision}')
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
  """Returns a layer's constructor for these sizes; the rest is to be given.

  Args:
    layer: constructor of a linen layer; of one that reads decisions, if there
      are any.
    inputs: channels of what it will be applied to.
    outputs: its features.
    kernel: of a convolution whose kernel may be decided about.
  """
  given: dict[str, Any] = dict(features=outputs.size)
  if kernel is not None:
    given['kernel_size'] = (kernel.size, kernel.size)
  decided = dict(input_channels=inputs, output_channels=outputs, kernel=kernel)
  given |= {
    name: size
    for name, size in decided.items()
    if size is not None and size.has_leaf
  }
  return functools.partial(layer, **given)


def constant(count: int) -> Channels:
  """Returns channels that nothing decides about."""
  return Channels(None, (count,), (count,), has_leaf=False)


def _is_odd(size: float) -> bool:
  return size % 2 == 1


def _nearest(values: Sequence[int], wanted: int) -> int:
  return min(range(len(values)), key=lambda i: abs(values[i] - wanted))
