"""Studies: their runs, what a table says of results, and one trained."""

import json
import pathlib

import pytest

from fliqs_jax import analysis
from fliqs_jax.analyses import studies
from fliqs_jax.analyses import study as study_lib
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import train
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import processes
from fliqs_jax.sweep import sweep_file

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

_CONFIG = 'tests/tiny.py:steps=100'


def _plan(name, seeds=2, config=_CONFIG):
  study = studies.STUDIES[name]
  return study, study_lib.plan(study, config, seeds, {})


@pytest.mark.parametrize(
  ('name', 'points'),
  # Entropy: 5 weights x 3 schedules, none, and four uniform networks.
  [
    ('mantissa', 5),
    ('entropy', 20),
    ('activation_start', 10),
    ('clip_multiple', 8),
    ('retraining', 2),
  ],
)
def test_every_run_of_a_study_can_work(name, points):
  study, sweep = _plan(name)
  assert len(sweep.runs) == 2 * points
  for run in sweep.runs[:points]:
    experiment_lib.build(sweep_file.load(run))
  # The paper's numbers stand beside runs.
  values = {run.swept.get(study.varied) for run in sweep.runs}
  for top1 in study.paper.values():
    assert values == set(top1)
  for one, other in study.quoted:
    assert {one[0], other[0]} <= values


def test_the_config_s_own_arguments_replace_those_of_a_study():
  study, sweep = _plan('entropy', config='tests/tiny.py:preset=default')
  assert sweep_file.load(sweep.runs[0]).search.preset == 'default'
  assert sweep_file.load(sweep.runs[0]).quant.formats == 'int_l'
  assert study.arguments['preset'] == 'paper'


def _finish(run, workdir, value, cost=1.0, loss=0.5):
  workdir.mkdir(parents=True)
  config = sweep_file.config(run)
  (workdir / 'config.json').write_text(json.dumps(config))
  found = dict(accuracy=value, loss=loss, cost=cost, unit='GBOPs')
  result = dict(metric='accuracy', found=found, warnings=[])
  (workdir / 'result.json').write_text(json.dumps(result))


def _found(name, out, numbers):
  """Returns the finding of a study of which every run has made-up results.

  Args:
    name: name of the study.
    out: directory of the runs.
    numbers: (what is swept, seed) -> value, cost.
  """
  study, sweep = _plan(name)
  for run in sweep.runs:
    value, cost = numbers(run.swept, int(run.swept['seed']))
    _finish(run, out / run.name, value, cost)
  points = study_lib.read(study, sweep, out)
  return study_lib.finding(study, points)


def test_differences_are_paired_by_seed(tmp_path):
  # A seed is worth 10 points; E5M2 is 1 and 3 points below E1M6.
  def numbers(swept, seed):
    lost = 0.01 + 0.02 * seed if swept['space'] == 'E5M2' else 0
    return 0.5 + 0.1 * seed - lost, 4.0

  finding = _found('mantissa', tmp_path, numbers)
  rows = {row['value']: row for row in finding.rows}
  assert rows['E1M6']['quality'] == pytest.approx(0.55)
  assert rows['E1M6']['quality_spread'] == pytest.approx(0.1 / 2**0.5)
  assert rows['E5M2']['ahead'] == pytest.approx(-0.02)
  # Of the two differences: their distance, by two.
  assert rows['E5M2']['ahead_error'] == pytest.approx(0.01, rel=0.1)
  assert rows['E5M2']['MobileNetV2'] == 72.07
  _, verdict = finding.verdicts
  assert verdict.startswith('E5M2 minus E1M6: -2.00 ± ')
  assert '-0.13 ResNet-18, -0.90 ResNet-50, -1.13 MobileNetV2' in verdict


def test_entropy_is_judged_at_equal_cost(tmp_path):
  # Uniform: 60 % at cost 1, and 10 points for each factor of 2. A search with
  # the cosine costs twice as much and is 12 points better: 2 at equal cost.
  uniform = dict(INT4=1.0, INT5=2.0, INT6=4.0, INT8=8.0)

  def numbers(swept, seed):
    noise = 0.05 * seed
    if 'space' in swept:
      name = swept['space']
      return 0.6 + noise + 0.1 * list(uniform).index(name), uniform[name]
    if swept['search.entropy_schedule'] == 'cosine':
      return 0.72 + noise, 2.0
    return 0.60 + noise, 1.0

  finding = _found('entropy', tmp_path, numbers)
  rows = {(row['value'], row['series']): row for row in finding.rows}
  assert rows['0', 'off']['ahead'] == pytest.approx(0, abs=1e-9)
  assert rows['0.5', 'cosine']['ahead'] == pytest.approx(0.02)
  assert 'ahead' not in rows['INT4', 'uniform']
  assert finding.verdicts[-1] == ('0.5 cosine minus 0 off: +2.00 ± 0.00 points')
  assert any(cell == 'INT8' for row in finding.cells() for cell in row)


def test_a_network_is_compared_with_itself_trained_again(tmp_path):
  study, sweep = _plan('retraining')
  for run in sweep.runs:
    # int_s: served 4 and 2 points better; int_l: 1 point worse and better.
    by_seed = dict(int_s=(0.04, 0.02), int_l=(-0.01, 0.01))
    ahead = by_seed[run.swept['space']][int(run.swept['seed'])]
    _finish(run, tmp_path / run.name, 0.8)
    path = tmp_path / run.name / 'result.json'
    result = json.loads(path.read_text())
    again = dict(accuracy=0.8 - ahead)
    path.write_text(json.dumps(result | dict(retrained=again)))
  finding = study_lib.finding(study, study_lib.read(study, sweep, tmp_path))
  small, large = finding.rows
  assert small['ahead'] == pytest.approx(0.03)
  assert small['ahead_error'] == pytest.approx(0.01, rel=0.1)
  assert small['width 0.75'] == -1.54
  assert large['ahead'] == pytest.approx(0)
  gains, same = finding.verdicts
  assert gains.startswith('int_s: served minus retrained +3.00 ± ')
  assert gains.endswith(', NOT less than two standard errors')
  assert same.startswith('int_l: served minus retrained +0.00 ± ')
  assert same.endswith(', less than two standard errors')


def test_what_was_not_measured_is_said(tmp_path):
  study, sweep = _plan('mantissa', seeds=1)
  for run in sweep.runs[:1]:
    _finish(run, tmp_path / run.name, 0.5)
  points = study_lib.read(study, sweep, tmp_path)
  finding = study_lib.finding(study, points)
  assert finding.verdicts[0] == 'E4M3 minus E1M6: not measured'
  assert finding.cells()[1][2] == '50.00'  # One seed has no spread.


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['best_clip', '--seeds=3'], 'best_clip does not take --seeds'),
    (['best_clip', '--config.a=3'], 'best_clip does not take --config.a'),
    (['mantissa', '--runs=DIR'], 'mantissa does not take --runs'),
    (['allocation_trends'], 'allocation_trends needs --runs=DIR'),
    (['allocation_trends', '--runs=no'], '--runs=no holds no finished search'),
    (['mantissa', '--seeds=0'], '--seeds=0 must be at least 1'),
    (['mantissa'], "config.data.data_dir='' must be a local directory"),
    (['mantissa', '--config=no.py'], "there is no config file 'no.py'"),
    (['mantissa', f'--config={_CONFIG},seed=1'], 'sets seed in each run'),
    (['mantissa', f'--config={_CONFIG},space=INT4'], 'sets space in each run'),
    (['mantissa', '--config.nope=3'], "no such key: 'nope'\n"),
    (['mantissa', '--speed=3'], "unknown flag '--speed=3'"),
    (
      ['clip_multiple', f'--config={_CONFIG}', '--config.quant.act_clip=3'],
      'sets quant.act_clip in each run',
    ),
  ],
)
def test_a_mistake_is_one_line_before_training(
  tmp_path, capsys, monkeypatch, flags, message
):
  monkeypatch.setattr(commands, 'log', lambda: None)
  assert analysis.main([*flags, f'--out={tmp_path / "out"}']) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_runs_of_another_config_are_refused(tmp_path):
  study, sweep = _plan('mantissa')
  _finish(sweep.runs[0], tmp_path / sweep.runs[0].name, 0.5)
  _, other = _plan('mantissa', config='tests/tiny.py:steps=60')
  with pytest.raises(ValueError, match='of another config: .*choose another'):
    study_lib.perform(study, other, tmp_path, lambda: False)


def test_a_study_continues_and_ends_with_status_2_if_a_run_fails(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(commands, 'log', lambda: None)
  monkeypatch.setattr(processes, 'Stop', lambda: lambda: False)
  started = []

  def start(config, workdir, *, stop, retrain):
    del stop, retrain
    started.append(config.quant.formats)
    if config.quant.formats == 'E4M3':
      raise ValueError('a loss is not finite')
    _, sweep = _plan('mantissa', seeds=1)
    (run,) = (r for r in sweep.runs if r.swept['space'] == config.quant.formats)
    _finish(run, pathlib.Path(workdir), 0.9)

  monkeypatch.setattr(train, 'train_and_evaluate', start)
  flags = ['mantissa', '--seeds=1', f'--config={_CONFIG}', f'--out={tmp_path}']
  assert analysis.main(flags) == 2
  assert len(started) == 5
  assert 'E4M3 minus E1M6: not measured' in capsys.readouterr().out
  assert analysis.main(flags) == 2
  assert started[5:] == ['E4M3']
  assert (tmp_path / 'mantissa.csv').read_text().startswith('value,')
  assert 'Mantissa sweep' in (tmp_path / 'mantissa.html').read_text()
