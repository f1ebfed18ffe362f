"""Plan of a comparison: the runs of methods x targets x seeds, as a sweep.

Every run has a workdir of its own, OUT/METHOD/TARGET/seedN, and is a run of
`fliqs_jax.main`, which could continue it. Methods that need scores share one
run for each seed, OUT/dearest/seedN, a network trained at the dearest formats.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib

from fliqs_jax.comparison import methods as methods_lib
from fliqs_jax.run import budgets
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import sensitivity_table
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib
from fliqs_jax.search import presets
from fliqs_jax.space import allocation
from fliqs_jax.sweep import checks
from fliqs_jax.sweep import sweep_file

# The arguments of a config that the comparison sets.
_SET = ('target', 'seed', 'preset', 'arch')
# The keys that leave decisions open, or join them.
_OPEN = ('quant.menus', 'quant.groups', 'sizes.widths', 'sizes.kernels')


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run of a comparison.

  Attributes:
    run: the run as one of a sweep.
    method: name of its method.
    target: the target, as in `--targets`; empty if the method has none.
    seed: seed of all its randomness.
  """

  run: sweep_file.Run
  method: str
  target: str
  seed: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is compared.

  Attributes:
    config: a config file, and its arguments after a colon.
    out: directory of the runs.
    methods: names of the methods.
    targets: cost targets as texts, in the unit of the config's targets.
    seeds: number of seeds, 0, 1, ...
    overrides: {dotted key: text} of keys that are overridden in every run.
    metric: how options are scored for `greedy` and `ilp`, a key of
      `sensitivity_table.METRICS`.
  """

  config: str
  out: pathlib.Path
  methods: Sequence[str]
  targets: Sequence[str]
  seeds: int
  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  metric: str = 'fisher'

  def check(self) -> None:
    """Checks everything that can be known before the first step.

    Raises:
      ValueError: a name, a number, the config or a target is not possible, or
        `out` holds another comparison; the message says what to do.
    """
    methods_lib.check(list(self.methods))
    self._check_values()
    self._check_config()
    sensitivity_table.check_metric(
      self.experiment(self.targets[0]), '--metric', self.metric
    )
    for target in self.targets:
      self.experiment(target)
    for planned in self.runs:
      if planned.seed == 0 and planned.method in presets.PRESETS:
        _build(planned.run)
    self._check_out()

  @functools.cached_property
  def runs(self) -> tuple[Planned, ...]:
    """All runs of the table, those of the first seed first."""
    return tuple(
      run
      for seed in range(self.seeds)
      for method in self.methods
      for run in self._of_method(method, seed)
    )

  @property
  def sweep(self) -> sweep_file.Sweep:
    """The runs of the table as a sweep."""
    return sweep_file.Sweep(
      self.out.name or 'comparison', [planned.run for planned in self.runs]
    )

  def workdir(self, run: sweep_file.Run) -> pathlib.Path:
    """Returns the path of a run's workdir."""
    return self.out / run.name

  def dearest(self, seed: int) -> sweep_file.Run:
    """Returns the run of which scores are measured.

    It is the search `sensitivity` with the highest budget there is, so it
    trains at the most precise formats from the first step to the last.

    Args:
      seed: seed of all its randomness.
    """
    experiment = self.experiment(self.targets[0])
    steps = experiment.phases.steps
    _, most = allocation.bounds(experiment.space, experiment.cost)
    return self._run(
      f'dearest/seed{seed}',
      dict(method='dearest', seed=str(seed)),
      dict(seed=str(seed), preset='sensitivity'),
      {
        'cost.target': repr(most),
        'cost.relative_to': '',
        'cost.bound': budgets.AT_MOST,
        'search.start': repr((steps - 1) / steps),
        'search.freeze': '1.0',
        'search.scorings': '1',
      },
    )

  def experiment(self, target: str) -> experiment_lib.Experiment:
    """Returns the parts of a run with open decisions at a target.

    Raises:
      ValueError: the config cannot work, or the target cannot be reached.
    """
    return self._experiments(target)

  @functools.cached_property
  def _experiments(self):
    return functools.cache(
      lambda target: _build(self._run('open', {}, dict(target=target)))
    )

  @property
  def claim(self) -> dict[str, object]:
    """What all runs in `out` must have in common."""
    return dict(
      config=self.config, overrides=dict(self.overrides), metric=self.metric
    )

  def _check_values(self) -> None:
    if not self.targets or len(set(self.targets)) < len(self.targets):
      raise ValueError(
        f'--targets={",".join(self.targets)} must be at least one number, each '
        'once, such as 1.15,1.5'
      )
    for target in self.targets:
      try:
        possible = 0 < float(target) < math.inf
      except ValueError:
        possible = False
      if not possible:
        raise ValueError(
          f'--targets: {target!r} must be a finite number above 0'
        )
    if self.seeds < 1:
      raise ValueError(f'--seeds={self.seeds} must be at least 1')
    if ',' in str(self.out):
      raise ValueError(
        f'--out={self.out} holds a comma, which separates the arguments of a '
        'config; choose another directory'
      )

  def _check_config(self) -> None:
    arguments = self.config.partition(':')[2].split(',')
    for name in arguments:
      if (name := name.partition('=')[0].strip()) in _SET:
        raise ValueError(
          f'--config={self.config}: the comparison sets {name} in each run; '
          'leave it out, and use --targets, --seeds and --methods'
        )
    try:
      self._loaded(dict.fromkeys(_SET, '1') | dict(preset='default'))
    except ValueError as error:
      raise ValueError(
        f'{error}; a comparison needs a config with the arguments space, '
        f'{", ".join(_SET)}'
      ) from None
    experiment = self.experiment(self.targets[0])
    if experiment.space.is_fixed:
      raise ValueError(
        f'--config={self.config} leaves nothing to choose; give it a menu, '
        'such as space=int_l'
      )

  def _loaded(self, arguments: Mapping[str, str]):
    return sweep_file.load(self._run('any', {}, arguments))

  def _check_out(self) -> None:
    path = self.out / workdir_lib.COMPARISON_PLAN
    if path.exists():
      try:
        claimed = files.read_json(path)
      except ValueError as error:
        raise ValueError(
          f'{error}; delete it, and the same command writes it anew'
        ) from None
      differences = config_lib.differences(
        claimed, json.loads(json.dumps(self.claim))
      )
      if differences:
        raise ValueError(
          f'--out={self.out} holds another comparison, which differs in '
          f'{"; ".join(differences)}; choose another directory'
        )
    runs = (*self.sweep.runs, *self.scored)
    checks.workdirs(sweep_file.Sweep(self.sweep.name, runs), self.out)

  @property
  def scored(self) -> tuple[sweep_file.Run, ...]:
    """The runs of which scores are measured."""
    rows = [methods_lib.ASSIGNED.get(name) for name in self.methods]
    if not any(row and row.has_scores for row in rows):
      return ()
    return tuple(self.dearest(seed) for seed in range(self.seeds))

  def _of_method(self, method: str, seed: int) -> Iterator[Planned]:
    settings = dict(method=method)
    if method == methods_lib.UNIFORM:
      for name in self._formats():
        run = self._run(
          f'{method}/{name}/seed{seed}',
          settings | dict(format=name, seed=str(seed)),
          dict(seed=str(seed), space=name),
          self._without(*_OPEN),
        )
        yield Planned(run, method, '', seed)
      return
    row = methods_lib.ASSIGNED.get(method)
    targets = self.targets if row is None or row.has_target else ('',)
    for target in targets:
      point = dict(target=target) if target else {}
      name = '/'.join(filter(None, (method, target, f'seed{seed}')))
      arguments = point | dict(seed=str(seed))
      overrides: dict[str, str] = {}
      if row is None:
        arguments |= dict(preset=method)
      else:
        arguments |= dict(arch=str(self.out / name / workdir_lib.ASSIGNED))
        # An arch.json fixes every layer, also those that are not quantized.
        overrides = self._without(*_OPEN, 'quant.exclude')
      swept = settings | point | dict(seed=str(seed))
      run = self._run(name, swept, arguments, overrides)
      yield Planned(run, method, target, seed)

  def _formats(self) -> list[str]:
    """Returns the formats of all menus, from few bits to many."""
    space = self.experiment(self.targets[0]).space
    menus = [d.menu for d in space.formats if len(d.menu) > 1]
    formats = {f.name: f for menu in menus for f in menu}.values()
    return [
      f.name for f in sorted(formats, key=lambda f: (f.bits, f.mantissa_bits))
    ]

  def _without(self, *keys: str) -> dict[str, str]:
    """Returns overrides that empty those keys that the config has filled."""
    config = self.experiment(self.targets[0]).config
    filled = {}
    for key in keys:
      section, _, name = key.partition('.')
      if config[section][name]:
        filled[key] = '()'
    return filled

  def _run(
    self,
    name: str,
    swept: Mapping[str, str],
    arguments: Mapping[str, str],
    overrides: Mapping[str, str] | None = None,
  ) -> sweep_file.Run:
    """Returns a run with more arguments, which replace those of the config."""
    file, _, own = self.config.partition(':')
    kept = [
      item
      for item in filter(None, own.split(','))
      if item.partition('=')[0].strip() not in arguments
    ]
    added = [f'{key}={value}' for key, value in arguments.items()]
    return sweep_file.Run(
      name,
      swept,
      f'{file}:{",".join([*kept, *added])}',
      {**self.overrides, **(overrides or {})},
    )


def _build(run: sweep_file.Run) -> experiment_lib.Experiment:
  return experiment_lib.build(sweep_file.load(run))
