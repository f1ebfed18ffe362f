"""A comparison: its plan, what its results say, and one from end to end."""

import json
import pathlib

import pytest

from fliqs_jax import compare
from fliqs_jax.comparison import passes
from fliqs_jax.comparison import perform
from fliqs_jax.comparison import plan as plan_lib
from fliqs_jax.comparison import summary as summary_lib
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import train
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import processes
from fliqs_jax.sweep import sweep_file
from tests import tiny

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

_CONFIG = 'tests/tiny.py:space=int_s'
# INT4 there: 2 layers of an MLP, 64 x 16 and 16 x 10, at 4 x 4 bits.
_INT4 = 16 * (1024 + 160) / 1e9


def _plan(out, **fields):
  fields = dict(methods=('uniform', 'ilp', 'default'), seeds=2) | fields
  return plan_lib.Plan(
    config=_CONFIG, out=pathlib.Path(out), targets=('1.5', '2'), **fields
  )


def test_methods_times_targets_times_seeds_have_workdirs_of_their_own():
  plan = _plan('out')
  # Uniform networks have no target, but each format of the menus.
  assert [p.run.name for p in plan.runs if p.seed == 1] == [
    'uniform/INT4/seed1',
    'uniform/INT8/seed1',
    'uniform/BF16/seed1',
    'ilp/1.5/seed1',
    'ilp/2/seed1',
    'default/1.5/seed1',
    'default/2/seed1',
  ]
  assert len(plan.runs) == 14
  configs = {p.run.name: p.run.config for p in plan.runs}
  assert configs['uniform/INT8/seed1'] == 'tests/tiny.py:seed=1,space=INT8'
  assert configs['default/2/seed0'] == (
    'tests/tiny.py:space=int_s,target=2,seed=0,preset=default'
  )
  assert configs['ilp/1.5/seed0'].endswith(
    ',arch=out/ilp/1.5/seed0/assigned.json'
  )
  assert len({*configs.values()}) == 14


def test_manual_has_one_run_per_seed():
  plan = _plan('out', methods=('manual',))
  assert [p.run.name for p in plan.runs] == ['manual/seed0', 'manual/seed1']


def test_the_network_that_is_scored_trains_at_the_dearest_to_the_end():
  plan = _plan('out')
  assert [run.name for run in plan.scored] == ['dearest/seed0', 'dearest/seed1']
  config = sweep_file.load(plan.scored[1])
  assert config.seed == 1
  assert config.search.preset == 'sensitivity'
  # 2 layers of an MLP, 64 x 16 and 16 x 10, at 16 x 16 bits.
  assert config.cost.target == pytest.approx(256 * (1024 + 160) / 1e9)
  assert round(config.search.start * config.train.steps) == 59
  assert not _plan('out', methods=('random', 'default')).scored


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--methods=uniform,luck', "unknown 'luck'; allowed: uniform, manual, "),
    ('--methods=uniform,uniform', 'at least one method, each once'),
    ('--methods=,', 'at least one method, each once'),
    ('--targets=x', "'x' must be a finite number above 0"),
    ('--targets=0', "'0' must be a finite number above 0"),
    ('--targets=inf', "'inf' must be a finite number above 0"),
    ('--targets=1.5,1.5', 'each once, such as 1.15,1.5'),
    ('--targets=0.5', 'cannot be reached: the cheapest assignment costs'),
    ('--targets=1', 'leaves nothing to search'),
    ('--seeds=0', '--seeds=0 must be at least 1'),
    ('--metric=luck', '--metric=luck is unknown; allowed: loss, '),
    (
      '--config=tests/tiny.py:space=int_s --config.quant.mode=separate'
      ' --metric=hessian',
      "--metric='hessian': hessian sees weights alone, but hidden0/activations",
    ),
    (
      '--config=configs/digits.py:nas --metric=error',
      "--metric='error': error sees formats alone, but stage0/channels",
    ),
    (
      '--config=configs/super_resolution.py:smoke --metric=kl',
      "--metric='kl' compares softmax outputs, which task='super_resolution'",
    ),
    ('--out=a,b', 'holds a comma'),
    ('--config=no.py', "there is no config file 'no.py'"),
    ('--config=tests/tiny.py:space=INT4', 'leaves nothing to choose'),
    ('--config=tests/tiny.py:seed=3', 'sets seed in each run'),
    ('--config.train.stepz=3', 'no such key: '),
    ('--epochs=3', "unknown flag '--epochs=3'"),
  ],
)
def test_what_cannot_be_is_refused_in_one_line_before_training(
  tmp_path, capsys, monkeypatch, flags, message
):
  monkeypatch.setattr(commands, 'log', lambda: None)
  given = [f'--config={_CONFIG}', '--targets=1.5', '--seeds=1']
  assert (
    compare.main([*given, f'--out={tmp_path / "out"}', *flags.split()]) == 2
  )
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_a_config_without_the_arguments_is_refused(tmp_path):
  path = tmp_path / 'own.py'
  path.write_text('def get_config(arg=None):\n  raise ValueError("no args")\n')
  plan = plan_lib.Plan(str(path), tmp_path / 'out', ('uniform',), ('1.5',), 1)
  with pytest.raises(ValueError, match=r'arguments space, target, seed'):
    plan.check()


def test_a_plan_that_was_cut_off_may_be_deleted(tmp_path):
  plan = _plan(tmp_path)
  (tmp_path / 'plan.json').write_text('{"config": ')
  with pytest.raises(ValueError, match=r'plan\.json is damaged: .*; delete it'):
    plan.check()


def _finish(plan, planned, value, cost, **more):
  """Writes what a finished run leaves that a comparison reads."""
  workdir = plan.workdir(planned.run)
  workdir.mkdir(parents=True)
  config = sweep_file.config(planned.run)
  (workdir / 'config.json').write_text(json.dumps(config))
  found = dict(accuracy=value, loss=1 - value, cost=cost * _INT4, unit='GBOPs')
  # The target of a run that knows no other network than its own.
  found |= dict(cost_target=found['cost'])
  result = dict(
    metric='accuracy',
    found=found,
    decisions=dict(a=dict(options=['INT4', 'INT8', 'BF16'])),
    warnings=[],
    step_seconds=20.0 + planned.seed,
  )
  (workdir / 'result.json').write_text(json.dumps(result | more))
  return workdir


@pytest.fixture
def compared(tmp_path):
  """Uniform, random and default networks at one target, two seeds each.

  Costs are multiples of INT4. Uniform: 60 % and 64 % at cost 1, 80 % and 84 %
  at cost 4. Half way between in the logarithm, at cost 2, it has 70 % and 74 %.
  """
  plan = plan_lib.Plan(
    _CONFIG, tmp_path, ('uniform', 'random', 'default'), ('1.5',), 2
  )
  uniform = dict(INT4=(0.60, 1.0), INT8=(0.80, 4.0), BF16=(0.81, 16.0))
  for planned in plan.runs:
    noise = 0.04 * planned.seed
    if planned.method == 'uniform':
      value, cost = uniform[planned.run.swept['format']]
      _finish(plan, planned, value + noise, cost)
    elif planned.method == 'random':
      _finish(plan, planned, 0.65 + noise, 2.0)
    else:
      again = dict(accuracy=0.80 + noise, loss=0.1)
      size = 1000 * (planned.seed + 1)
      beside = dict(retrained=again, step_bytes=size)
      if planned.seed:  # The other run is one of an earlier version.
        beside |= dict(step_seconds=None)
      _finish(plan, planned, 0.75 + noise, 1.5, **beside)
  return plan


def _row(summary, method):
  (row,) = [row for row in summary.rows if row.method == method]
  return row


def test_a_row_has_the_numbers_by_hand(compared):
  summary = summary_lib.summarize(compared)
  random, default = _row(summary, 'random'), _row(summary, 'default')
  assert random.quality.value == pytest.approx(0.67)
  # Of two numbers: their difference by the root of two.
  assert random.quality.spread == pytest.approx(0.04 / 2**0.5)
  assert random.relative.value == pytest.approx(2 / 1.5)
  assert random.within == 0
  # Both seeds are 5 points below the uniform network of the same seed.
  assert random.ahead.value == pytest.approx(-0.05)
  assert random.ahead.error == pytest.approx(0, abs=1e-12)
  assert random.gap is None
  assert random.seconds.value == 20.5
  assert default.within == 1
  assert default.scratch.value == pytest.approx(0.82)
  assert default.gap.value == pytest.approx(-0.05)
  assert default.gap.spread == pytest.approx(0, abs=1e-12)
  # .25 and .21 against .1 and .1.
  assert default.loss_gap.value == pytest.approx(0.13)
  assert default.seconds is None  # One of the two is unknown.
  assert (default.memory, random.memory) == (2000, None)
  # 60 steps, each judging a batch of 64 beside a training batch of 64.
  assert (default.forward, default.backward) == (120, 60)


def test_it_warns_of_what_uniform_formats_match_and_of_budgets(compared):
  assert summary_lib.summarize(compared).warnings == [
    'random at 1.5 is not better than uniform formats at equal cost: '
    '-5.00 ± 0.00 points',
    'random at 1.5 exceeds its target in 100% of the runs',
  ]


def test_pairs_are_compared_where_they_have_costs_in_common(compared):
  summary = summary_lib.summarize(compared)
  pairs = summary.sweep.pairs
  assert ('random', 'default') not in pairs  # Costs of 2 and of 1.5.
  apart = pairs['uniform', 'random']
  assert apart.value == pytest.approx(0.05)
  ((head, *rows),) = summary.sweep.differences()
  assert head == ['minus', 'uniform', 'random', 'default']
  assert rows[1][:2] == ['random', '-5.00 ± 0.00']


def test_the_page_needs_no_network_and_links_each_run(compared):
  summary = summary_lib.summarize(compared)
  summary.write()
  page = (compared.out / 'compare.html').read_text()
  assert '://' not in page
  assert 'href="default/1.5/seed1/report.html"' in page
  assert 'not better than uniform' in page
  kept = json.loads((compared.out / 'compare.json').read_text())
  assert [row['method'] for row in kept['rows']] == [
    *('uniform',) * 3,
    'random',
    'default',
  ]
  assert kept['rows'][3]['ahead']['value'] == pytest.approx(-0.05)
  picture = (compared.out / 'compare.png').read_bytes()
  assert picture.startswith(b'\x89PNG')


def test_a_missing_run_is_listed_and_counted(compared):
  (compared.out / 'random/1.5/seed1/result.json').unlink()
  summary = summary_lib.summarize(compared)
  assert 'random/1.5/seed1: unfinished' in summary.markdown()
  assert '| random | 1.5 | 1 of 2 |' in summary.markdown()


def test_passes_of_scores_and_branches_are_counted():
  decisions = {
    'a': dict(options=['INT4', 'INT8', 'BF16']),
    'b': dict(options=['INT4']),
  }

  def of(preset, decisions=decisions):
    config = tiny.get_config(f'preset={preset}').to_dict()
    return passes.of_run(config, dict(decisions=decisions))

  # A scoring of 8 batches: a pass of the dearest and of 2 others.
  assert of('sensitivity') == (60 + 8 * 3, 60)
  # Menus of 3 and 1 formats: 2 products a step in the mean.
  assert of('dnas') == (120, 120)
  assert of('edmips') == (60, 60)
  assert of('default', dict(a=dict(options=['INT8']))) == (60, 60)


@pytest.fixture
def started(monkeypatch):
  """The names of the runs that are started; nothing trains."""
  names = []

  def start(config, workdir, *, stop, retrain):
    del config, stop
    names.append((str(workdir), retrain))

  monkeypatch.setattr(train, 'train_and_evaluate', start)
  return names


def test_only_what_is_missing_is_started(compared, started):
  out = compared.out
  (out / 'random/1.5/seed1/result.json').unlink()
  compared.check()
  assert not perform.perform(compared, False, lambda: False)
  assert started == [(f'{out}/random/1.5/seed1', False)]
  assert (out / 'random/1.5/seed1/assigned.json').exists()


def test_a_search_that_was_not_retrained_is_continued(compared, started):
  path = compared.out / 'default/1.5/seed0/result.json'
  result = json.loads(path.read_text())
  path.write_text(json.dumps(result | dict(retrained=None)))
  assert not perform.perform(compared, True, lambda: False)
  assert started == [(f'{compared.out}/default/1.5/seed0', True)]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
  def fail(config, workdir, *, stop, retrain):
    del config, stop, retrain
    if 'INT4' in str(workdir):
      raise ValueError('a score is not finite')

  monkeypatch.setattr(train, 'train_and_evaluate', fail)
  plan = _plan(tmp_path / 'out', methods=('uniform', 'random'), seeds=1)
  failed = perform.perform(plan, True, lambda: False)
  assert failed == {'uniform/INT4/seed0': 'a score is not finite'}


def test_why_every_run_failed_is_the_last_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(commands, 'log', lambda: None)
  monkeypatch.setattr(processes, 'Stop', lambda: lambda: False)

  def fail(config, workdir, *, stop, retrain):
    del config, workdir, stop, retrain
    raise ValueError('a score is not finite')

  monkeypatch.setattr(train, 'train_and_evaluate', fail)
  flags = [f'--config={_CONFIG}', '--targets=1.5', '--seeds=2']
  out = tmp_path / 'out'
  assert compare.main([*flags, '--methods=random', f'--out={out}']) == 2
  assert capsys.readouterr().err == (
    f'no run is finished in {out}; the first of 2, random/1.5/seed0, is failed:'
    ' a score is not finite\n'
  )


def test_why_a_run_failed_is_listed(compared):
  (compared.out / 'random/1.5/seed1/result.json').unlink()
  # The other run is finished, but could not be trained again.
  failed = {'random/1.5/seed1': 'no gain', 'default/1.5/seed1': 'no gain'}
  summary = summary_lib.summarize(compared, failed)
  assert [run['name'] for run in summary.sweep.missing] == ['random/1.5/seed1']
  assert '- random/1.5/seed1: failed: no gain' in summary.markdown()


def test_rules_of_a_config_do_not_contradict_an_assignment(
  tmp_path, monkeypatch
):
  spaces = {}

  def build(config, workdir, *, stop, retrain):
    del stop, retrain
    experiment = experiment_lib.build(config)
    spaces[workdir.parent.name] = experiment.space

  monkeypatch.setattr(train, 'train_and_evaluate', build)
  rules = {
    'quant.exclude': "('head',)",
    'quant.menus': "(('hidden0', ('INT4', 'INT8')),)",
  }
  # 16 x 1024 + 256 x 160 at INT4; with INT8 it is 1.86 times that.
  plan = plan_lib.Plan(
    _CONFIG, tmp_path, ('uniform', 'random'), ('1.5', '1.8'), 1, rules
  )
  plan.check()
  assert not perform.perform(plan, False, lambda: False)
  # The menu of the one layer that is left.
  assert list(spaces) == ['INT4', 'INT8', '1.5', '1.8']
  for space in spaces.values():
    assert space.is_fixed
    assert space.assignment(space.only())['head'] == (None, None)


def test_another_comparison_in_the_directory_is_refused(compared, started):
  perform.perform(compared, True, lambda: False)
  other = plan_lib.Plan(
    _CONFIG, compared.out, ('random',), ('1.5',), 1, metric='kl'
  )
  with pytest.raises(ValueError, match="metric: 'fisher' -> 'kl'; choose"):
    other.check()
  # More seeds and targets are the same comparison.
  more = plan_lib.Plan(_CONFIG, compared.out, ('random',), ('1.5', '2'), 3)
  more.check()
  path = compared.out / 'random/1.5/seed0/config.json'
  config = json.loads(path.read_text())
  config['train']['steps'] = 7
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'seed0 there is of another config: '):
    more.check()


@pytest.mark.slow
@pytest.mark.usefixtures('empty_pictures')
def test_from_end_to_end_and_again(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(commands, 'log', lambda: None)
  monkeypatch.setattr(processes, 'Stop', lambda: lambda: False)
  flags = [
    f'--config={_CONFIG}',
    '--methods=uniform,random,ilp,sensitivity',
    '--targets=1.5',
    '--seeds=1',
    f'--out={tmp_path / "out"}',
    '--config.train.log_every=20',
    '--config.train.checkpoint_every=60',
  ]
  assert compare.main(flags) == 0
  first = capsys.readouterr().out
  kept = json.loads((tmp_path / 'out/compare.json').read_text())
  rows = {row['method']: row for row in kept['rows']}
  assert list(rows) == ['uniform', 'random', 'ilp', 'sensitivity']
  assert all(row['memory'] > 4000 for row in kept['rows'])
  for name in ('random', 'ilp', 'sensitivity'):
    assert rows[name]['within'] == 1
    assert rows[name]['quality']['value'] > 0.3  # A tenth is chance.
  assert rows['sensitivity']['scratch'] is not None
  # Both take the assignment of least scores, of networks trained alike.
  for name in ('random', 'ilp'):
    given = json.loads(
      (tmp_path / f'out/{name}/1.5/seed0/assigned.json').read_text()
    )
    arch = json.loads(
      (tmp_path / f'out/{name}/1.5/seed0/arch.json').read_text()
    )
    assert arch['layers'] == given['layers']
  # What was killed before its end is finished from its last checkpoint.
  (tmp_path / 'out/random/1.5/seed0/result.json').unlink()
  before = (tmp_path / 'out/ilp/1.5/seed0/result.json').stat().st_mtime_ns
  assert compare.main(flags) == 0
  assert (
    tmp_path / 'out/ilp/1.5/seed0/result.json'
  ).stat().st_mtime_ns == before

  def qualities(text):
    return [
      line.split('|')[7] for line in text.splitlines() if '| 1.5 |' in line
    ]

  assert qualities(capsys.readouterr().out) == qualities(first)
