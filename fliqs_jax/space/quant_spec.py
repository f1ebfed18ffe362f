"""Rules by path: the formats that each layer may use, and how it is clipped."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import fnmatch
from typing import Any

from fliqs_jax.numerics import clipping
from fliqs_jax.numerics import formats

MODES = ('tied', 'weights', 'activations', 'separate')
MIXES = ('sampled', 'composite', 'branched')
ACT_THRESHOLDS = ('magnitude', 'deviation')

Menu = tuple[formats.NumericFormat, ...]


@dataclasses.dataclass(frozen=True)
class Choices:
  """The formats that one layer may use.

  Attributes:
    weights: menu of the weights; None if they are not quantized.
    activations: menu of the input activations; None if they are not quantized.
    tied: whether one decision sets both formats, as in the paper.
  """

  weights: Menu | None
  activations: Menu | None
  tied: bool


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """Rules that say which formats each layer of a model may use.

  A pattern is a glob over a layer's path, such as `stage0/block1/conv2`; `*`
  also matches slashes. A layer whose path no pattern matches uses `formats`.
  A ValueError names the key of a wrong rule, `quant.mode` for `mode`.

  Attributes:
    formats: a named space (`int_s`, `int_l`, `fp_s`, `fp_l`: Table 5), the name
      of a format, or a list of names. It becomes a tuple of K formats.
    mode: `tied` (one decision sets weights and activations), `weights` or
      `activations` (only that side is quantized), or `separate` (each side has
      a decision).
    exclude: patterns of layers that are not quantized; costs count them as
      BF16.
    menus: pairs of a pattern and the formats that its layers may use instead of
      `formats`; one format fixes the layers to it.
    groups: pairs of a name and a pattern, whose layers share one decision of
      that name.
    weight_clip: threshold of the weights, one per output channel: `absmax`, or
      a multiple of their standard deviation: `gaussian`, `laplacian` (tables of
      one multiple per format, A.8) or a positive number.
    act_clip: multiple of the running standard deviation in the threshold of the
      activations, one per tensor: `gaussian`, `laplacian`, a positive number
      (Table 4: 4), `profiled`, a multiple per layer and format that
      `calibration.profiled_clips` measures (in a loop of your own, call it;
      until then they are those of `laplacian`), or `absmax`, the running mean
      of the largest magnitudes.
    strategies: rules that find thresholds in the numbers themselves, of which
      each format of a menu gets each one: `max_abs`, `kl`, `eq` or `admm`
      (DQSS), in place of `weight_clip` and `act_clip`. A menu may name them,
      too: `INT4:kl`.
    act_threshold: `magnitude`, the running mean's magnitude plus the multiple,
      at most the running mean of the largest magnitudes; or `deviation`, the
      multiple alone (A.2), for activations whose mean is near zero.
    assignment: {layer path: (weights, activations)}, names of formats or None
      for an unquantized side, as in arch.json. It fixes every layer; None: no
      layer is fixed by it.
    mix: what a layer computes: `sampled`, one format; `composite`, the product
      of the operands' means over their formats, for `edmips` and `dqss`; or
      `branched`, the mean of the products at each format, for `dnas`. At a
      one-hot leaf all three are equal.
  """

  formats: Any = 'int_s'
  mode: str = 'tied'
  exclude: tuple[str, ...] = ()
  menus: tuple[tuple[str, Any], ...] = ()
  groups: tuple[tuple[str, str], ...] = ()
  weight_clip: str | float = 'absmax'
  act_clip: str | float = 'laplacian'
  strategies: tuple[str, ...] = ()
  act_threshold: str = 'magnitude'
  assignment: Any = None
  mix: str = 'sampled'

  def __post_init__(self):
    self._check_types()
    if self.mode not in MODES:
      raise ValueError(
        f'quant.mode={self.mode!r} is unknown; allowed: {", ".join(MODES)}'
      )
    if self.mix not in MIXES:
      raise ValueError(
        f'mix={self.mix!r} is unknown; allowed: {", ".join(MIXES)}'
      )
    if self.act_threshold not in ACT_THRESHOLDS:
      raise ValueError(
        f'quant.act_threshold={self.act_threshold!r} is unknown; allowed: '
        f'{", ".join(ACT_THRESHOLDS)}'
      )

    # The fields of a linen layer must be hashable, so lists become tuples.
    def set_field(name: str, value: Any) -> None:
      object.__setattr__(self, name, value)

    def menu(names: Any) -> Menu:
      try:
        return formats.with_strategies(formats.menu(names), self.strategies)
      except ValueError as error:
        if not self.strategies:
          raise
        raise ValueError(
          f'quant.strategies={self.strategies}: {error}'
        ) from None

    set_field('strategies', tuple(self.strategies))
    set_field('formats', menu(self.formats))
    set_field('exclude', tuple(self.exclude))
    set_field('menus', tuple((p, menu(names)) for p, names in self.menus))
    set_field('groups', tuple((name, p) for name, p in self.groups))
    if self.assignment is not None:
      set_field('assignment', _freeze(self.assignment, self.mode))
    self._check_clips()

  def _check_types(self) -> None:
    for key, example in (('exclude', 'head'), ('strategies', 'kl')):
      given = getattr(self, key)
      if not _is_list(given) or not all(isinstance(x, str) for x in given):
        raise ValueError(
          f'quant.{key}={given!r} must be a tuple of texts, as in {(example,)}'
        )
    for key, pair in (('menus', ('head', 'INT8')), ('groups', ('qkv', '*/q'))):
      given = getattr(self, key)
      if not _is_list(given) or not all(
        _is_list(x) and len(x) == 2 and isinstance(x[0], str) for x in given
      ):
        raise ValueError(
          f'quant.{key}={given!r} must be a tuple of pairs, as in {(pair,)}'
        )

  @property
  def first_act_clip(self) -> str | float:
    """The `act_clip` that is used until activations are profiled."""
    return 'laplacian' if self.act_clip == 'profiled' else self.act_clip

  @property
  def has_strategies(self) -> bool:
    """Whether any format has a strategy, which a calibration must serve."""
    return any(map(formats.has_strategies, self._menus()))

  def _menus(self) -> list[Menu]:
    menus = [self.formats, *(menu for _, menu in self.menus)]
    for _, sides in self.assignment or ():
      menus += [menu for menu in sides if menu]
    return menus

  def _check_clips(self) -> None:
    for key, clip in (
      ('weight_clip', self.weight_clip),
      ('act_clip', self.first_act_clip),
    ):
      try:
        for menu in self._menus():
          clipping.multiples(clip, menu)
      except ValueError as error:
        raise ValueError(f'quant.{key}: {error}') from None

  def choices(self, path: str) -> Choices:
    """Returns the formats that the layer at `path` may use."""
    if self.assignment is not None:
      return self._choices(*self._assigned(path))
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.exclude):
      return Choices(None, None, False)
    for pattern, menu in self.menus:
      if fnmatch.fnmatchcase(path, pattern):
        return self._choices(menu, menu)
    return self._choices(self.formats, self.formats)

  def _assigned(self, path: str) -> tuple[Menu | None, Menu | None]:
    """Returns the menus, of one format each, that the assignment gives."""
    iterations = {
      sides
      for name, sides in self.assignment
      if name == path or name.rpartition('/@')[0] == path
    }
    if len(iterations) > 1:
      raise ValueError(
        f'quant.arch: the iterations of {path}, which is scanned, have '
        'different formats, and one program cannot fix them; leave the formats '
        'open and apply the model to space.expand(space.choices(assignment))'
      )
    return next(iter(iterations), (None, None))

  def _choices(self, weights: Menu | None, activations: Menu | None) -> Choices:
    return Choices(
      None if self.mode == 'activations' else weights,
      None if self.mode == 'weights' else activations,
      self.mode == 'tied' and weights is not None,
    )

  def check(self, paths: Iterable[str], iterations: Iterable[str] = ()) -> None:
    """Checks the rules against the paths of a model's layers.

    Args:
      paths: path of each layer.
      iterations: path of each iteration of each scanned layer, such as
        `blocks/up/@2`; a group may name iterations.

    Raises:
      ValueError: a pattern matches no layer, two rules match one layer, or an
        assignment does not fit; the message names every such layer.
    """
    paths, iterations = list(paths), list(iterations)
    listed = ', '.join(paths)
    if self.assignment is not None:
      stacks = {path.rpartition('/@')[0] for path in iterations}
      self._check_assignment([p for p in paths if p not in stacks] + iterations)
    rules = [('quant.exclude', pattern) for pattern in self.exclude]
    rules += [('quant.menus', pattern) for pattern, _ in self.menus]
    groups = [(f'quant.groups[{name}]', p) for name, p in self.groups]
    for rules_of_a_kind, names in (
      (rules, paths),
      (groups, paths + iterations),
    ):
      owner: dict[str, str] = {}
      for key, pattern in rules_of_a_kind:
        matched = fnmatch.filter(names, pattern)
        if not matched:
          raise ValueError(
            f'{key}: the pattern {pattern!r} matches no layer; layers: {listed}'
          )
        rule = f'{key} {pattern!r}'
        for path in matched:
          if owner.setdefault(path, rule) != rule:
            raise ValueError(
              f'layer {path} is matched by both {owner[path]} and {rule}; make '
              'the patterns disjoint'
            )

  def _check_assignment(self, paths: Sequence[str]) -> None:
    check_layers(paths, [path for path, _ in self.assignment])
    if self.exclude or self.menus or self.groups:
      raise ValueError(
        'quant.arch fixes every layer; quant.exclude, quant.menus and '
        'quant.groups must be empty with it'
      )


def check_layers(paths: Iterable[str], named: Iterable[str]) -> None:
  """Checks that an assignment names exactly the layers of a model.

  Args:
    paths: path of each layer of the model.
    named: paths that the assignment names.

  Raises:
    ValueError: layers are missing or surplus; the message names them.
  """
  paths, named = list(paths), list(named)
  missing = [path for path in paths if path not in named]
  surplus = [path for path in named if path not in paths]
  if missing or surplus:
    raise ValueError(
      'the assignment (arch.json) does not fit the model: layers it misses: '
      f'{", ".join(missing) or "none"}; layers it names that the model lacks: '
      f'{", ".join(surplus) or "none"}'
    )


def _freeze(
  assignment: Mapping[str, tuple[str | None, str | None]], mode: str
) -> tuple[tuple[str, tuple[Menu | None, Menu | None]], ...]:
  """Turns names into menus of one format; checks them against the mode."""
  if isinstance(assignment, tuple):  # Frozen already: dataclasses.replace.
    return assignment
  if not isinstance(assignment, Mapping):
    raise ValueError(
      f'quant.arch: assignment={assignment!r} must be a dict of pairs, as in '
      "{'head': ('INT4', 'INT8')}"
    )
  frozen = []
  for path, pair in assignment.items():
    if not _is_list(pair) or len(pair) != 2:
      raise ValueError(
        f'quant.arch: {path} has {pair!r}; it must be a pair (weights, '
        "activations), as in ('INT4', 'INT8')"
      )
    weights, activations = pair
    if mode == 'tied' and weights != activations:
      raise ValueError(
        f'quant.arch: {path} has weights {weights} and activations '
        f"{activations}, but quant.mode='tied' allows one format for both; use "
        "'separate'"
      )
    for side, name in (('weights', weights), ('activations', activations)):
      if name and mode in {'weights', 'activations'} - {side}:
        raise ValueError(
          f'quant.arch: {path} has {side} {name}, but quant.mode={mode!r} '
          f"leaves {side} unquantized; use 'separate'"
        )
    frozen.append((path, (_only(weights), _only(activations))))
  return tuple(frozen)


def _is_list(x: Any) -> bool:
  return isinstance(x, (tuple, list))


def _only(name: str | None) -> Menu | None:
  return formats.menu(name) if name else None
