"""Configs: arguments, keys and values that cannot work are refused by name."""

import ast
import math
import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from configs import digits
from configs import recommender_criteo
from fliqs_jax import cost
from fliqs_jax import main
from fliqs_jax import models
from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run.configs import checks
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.search import presets
from fliqs_jax.space import decisions as decisions_lib
from fliqs_jax.space import search_space
from fliqs_jax.space import sizes as sizes_lib
from fliqs_jax.sweep import sweep_file
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[3]


def _changed(section: str, **values):
  config = tiny.get_config()
  with config.unlocked(), config.ignore_type():
    config[section].update(values)
  return config


@pytest.mark.parametrize('arg', ['', 'smoke', 'preset=paper', 'space=fp_l'])
def test_the_digits_config_has_exactly_the_known_keys(arg):
  config_lib.check(digits.get_config(arg))


def test_an_unknown_and_a_missing_key_are_both_named():
  config = tiny.get_config()
  with config.unlocked():
    config.train.stepz = 3
    del config.train.steps
  with pytest.raises(
    ValueError, match=r'unknown key train\.stepz .*missing key train\.steps'
  ):
    config_lib.check(config)


@pytest.mark.parametrize(
  ('section', 'values', 'message'),
  [
    ('quant', dict(formats='INT9'), "unknown format 'INT9'"),
    ('quant', dict(formats=()), 'menu of formats is empty'),
    ('quant', dict(formats=(4, 8)), r'quant.formats=\(4, 8\) must be'),
    (
      'quant',
      dict(exclude=(1,)),
      r'quant.exclude=\(1,\) must be a list of p',
    ),
    ('quant', dict(menus=('head',)), r'quant.menus=.* of pairs \(pattern, for'),
    ('quant', dict(menus=(('head', 4),)), 'quant.menus=.* must be a list of p'),
    (
      'quant',
      dict(groups=(('a', 'b', 'c'),)),
      'quant.groups=.* be a list of p',
    ),
    (
      'quant',
      dict(act_clip=math.nan),
      'quant.act_clip=nan must be of type ',
    ),
    ('sizes', dict(widths=(1.0, math.inf)), 'sizes.widths=.* finite numbers'),
    ('sizes', dict(kernels=('3',)), 'sizes.kernels=.* must be a list of whole'),
    ('search', dict(gamma=math.nan), 'search.gamma=nan must be a number that'),
    (
      'search',
      dict(entropy_beta=math.inf),
      'entropy_beta=inf must be a num',
    ),
    ('optimizer', dict(learning_rate=math.nan), 'learning_rate=nan must be'),
    ('optimizer', dict(learning_rate=math.inf), 'learning_rate=inf must be'),
    ('model', dict(hidden=16), 'model.hidden=16 must be a list of whole numb'),
    ('model', dict(hidden=(16, 0)), 'model.hidden=.* whole numbers above 0'),
    ('model', dict(name=None), 'model.name=None is unknown; allowed: mlp'),
    ('quant', dict(mode='both'), "quant.mode='both'"),
    ('quant', dict(exclude=('hiden*',)), "'hiden\\*' matches no layer"),
    ('quant', dict(act_threshold='rms'), "quant.act_threshold='rms'"),
    ('quant', dict(strategies='kl'), 'must be a list of names of strategies'),
    ('quant', dict(strategies=('aciq',)), 'strategy in .INT4:aciq.; allowed'),
    ('train', dict(frozen=True), 'name a checkpoint with --init_from'),
    ('train', dict(teacher=True), 'whose weights must not move'),
    ('quant', dict(act_clip='profiled', act_start=0.0), 'before they'),
    ('quant', dict(act_start=0.5), 'search.start=0.25 comes before'),
    ('quant', dict(act_start=2), r'quant.act_start=2(.0)? must be'),
    ('quant', dict(arch='nowhere.json'), 'nowhere.json cannot be read'),
    ('cost', dict(target=0.5), 'cheapest assignment costs'),
    ('cost', dict(target=100.0), 'most expensive'),
    ('cost', dict(target=1.0), 'leaves nothing to search'),
    ('cost', dict(bound='below'), "cost.bound='below' is unknown"),
    ('cost', dict(kind='joules'), "cost.kind='joules'"),
    ('cost', dict(relative_to='INT99'), "unknown format 'INT99'"),
    ('search', dict(gamma=0.1), 'search.gamma=0.1 must be negative'),
    ('search', dict(scorings=3), 'search.scorings=3 would change nothing'),
    (
      'search',
      presets.search_keys('sensitivity', 60) | dict(scores='magic'),
      "search.scores='magic' is unknown; allowed: loss, fisher, kl",
    ),
    (
      'search',
      presets.search_keys('sensitivity', 60) | dict(gamma=-0.1),
      'search.gamma=-0.1 would change nothing',
    ),
    ('search', dict(start=0.96), 'leave no search step'),
    ('search', dict(quality='f1'), "search.quality='f1'"),
    ('search', dict(entropy_schedule='sine'), 'entropy_schedule'),
    ('search', dict(entropy_beta=-1.0), 'must not be negative'),
    ('optimizer', dict(name='lion'), "optimizer.name='lion'"),
    ('optimizer', dict(schedule='step'), "optimizer.schedule='step'"),
    ('optimizer', dict(ema_decay=1.0), 'optimizer.ema_decay=1'),
    ('train', dict(mixup=-0.1), 'train.mixup=-0.1 must be'),
    ('train', dict(checkpoint_every=7), 'multiple of train.log_every'),
    ('train', dict(steps=0), 'train.steps=0 must be'),
    ('train', dict(steps=2**31), 'must be a whole number from 1 to 2147483647'),
    ('sizes', dict(widths=(10**400,)), 'must be a list of finite numbers'),
    ('train', dict(label_smoothing=1.0), 'label_smoothing'),
    ('data', dict(valid_split='train[100%:]'), 'valid_split'),
    ('data', dict(batch_size=5000), 'data.batch_size=5000'),
    ('data', dict(valid_batch_size=66), 'must be a multiple of 4'),
    ('data', dict(name='digitz'), 'digitz'),
    ('model', dict(name='resnet51'), "'resnet51' is unknown"),
    ('model', dict(depth=8), 'the keys of model mlp'),
  ],
)
def test_what_cannot_work_is_refused_with_its_key(section, values, message):
  with pytest.raises(ValueError, match=message):
    experiment_lib.build(_changed(section, **values))


@pytest.mark.parametrize('name', ['quant', 'model', 'data'])
def test_a_section_must_be_a_section(name):
  config = tiny.get_config()
  with config.unlocked(), config.ignore_type():
    config[name] = 'INT4'
  with pytest.raises(ValueError, match=f'{name}.* must be a section of keys'):
    config_lib.check(config)


@pytest.mark.parametrize('seed', [-1, 2**32, 2**63, 2**70, 1.5, True])
def test_a_seed_has_the_bits_that_are_used(seed):
  config = tiny.get_config()
  with config.unlocked(), config.ignore_type():
    config.seed = seed
  with pytest.raises(ValueError, match='seed=.* from 0 to 4294967295'):
    experiment_lib.build(config)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (('INT4', 'INT44'), r"references=.*'INT44'"),
    (('int_s',), "references=.*unknown format 'int_s'"),
    ((4,), r'references=\(4,\) must be a list of names of formats'),
  ],
)
def test_a_reference_is_checked_before_the_search(names, message):
  config = tiny.get_config()
  with config.unlocked():
    config.references = names
  with pytest.raises(ValueError, match=message):
    experiment_lib.build(config)


@pytest.mark.parametrize(
  ('keys', 'least', 'most'),
  [
    ('quant.act_start search.start search.freeze', 0, 1),
    ('optimizer.warmup optimizer.momentum optimizer.ema_decay', 0, 1),
    ('train.label_smoothing', 0, 1),
    ('cost.target search.learning_rate optimizer.learning_rate', 0, None),
    ('optimizer.weight_decay train.mixup train.cutmix train.max_loss', 0, None),
    ('train.steps train.log_every train.checkpoint_every', 1, 2**31 - 1),
    ('train.checkpoints_kept parallel.accumulate', 1, 2**31 - 1),
    ('train.settle_batches', 0, 2**31 - 1),
  ],
)
def test_numbers_are_allowed_up_to_their_bounds(keys, least, most):
  for key in keys.split():
    section, name = key.split('.')
    problem = config_lib.SCHEMA[section][name]
    ends = f'>= {least}' if most is None else f'from {least} to {most}'
    for value in (least, 10**9 if most is None else most):
      assert problem(value) is None, key
    above = [10**400] if most is None else [most + 0.1, most + 1]
    for value in (least - 1, least - 0.1, True, *above):
      assert ends in problem(value), key


@pytest.mark.parametrize('labels', [((8,), (3,)), ((8,), (3, 5))])
def test_bits_per_weight_cannot_steer_sizes_of_which_one_is_open(labels):
  channels, kernels = labels
  space = search_space.SearchSpace(
    (),
    (
      decisions_lib.SizeDecision(
        'a', (), sizes_lib.Channels('a', channels, channels)
      ),
      decisions_lib.SizeDecision('b', (), sizes_lib.Kernel('b', kernels)),
    ),
    (),
    0,
  )
  config = _changed('cost', kind='average_bits')
  if len(kernels) == 1:
    checks.sizes(config, space)
    return
  with pytest.raises(ValueError, match='average_bits.* does not depend on siz'):
    checks.sizes(config, space)


def test_strategies_are_refused_where_sizes_are_open():
  config = digits.get_config('nas=True,target=2')
  config.quant.strategies = ('admm',)
  with pytest.raises(ValueError, match='thresholds in all channels'):
    experiment_lib.build(config)


def test_a_mixture_of_formats_is_refused_where_sizes_are_open():
  config = digits.get_config('preset=edmips,nas=True,target=2')
  with pytest.raises(ValueError, match="'edmips' trains a mean over formats"):
    experiment_lib.build(config)


def test_differences_are_named_by_their_whole_keys():
  old = dict(seed=0, train=dict(steps=5, mixup=0.0), sizes=dict(widths=(1,)))
  new = dict(seed=0, train=dict(steps=6, mixup=0.0), sizes=3, task='x')
  assert config_lib.differences(old, new) == [
    "sizes: {'widths': (1,)} -> 3",
    "task: None -> 'x'",
    'train.steps: 5 -> 6',
  ]
  assert config_lib.differences(new, new) == []


def _task(task, quality, **model):
  config = tiny.get_config()
  with config.unlocked(), config.ignore_type():
    config.task, config.search.quality = task, quality
    config.train.mixup = config.train.cutmix = 0.0
    if model:
      config.model = model
  return config


def test_an_unknown_task_is_refused():
  with pytest.raises(ValueError, match="'ranking' is unknown; allowed: class"):
    experiment_lib.build(_task('ranking', 'accuracy'))


def test_a_task_s_qualities_are_its_own():
  with pytest.raises(ValueError, match="'auc' is unknown for task='classif"):
    experiment_lib.build(_task('classification', 'auc'))


def test_a_task_that_the_data_cannot_serve_is_refused():
  with pytest.raises(ValueError, match='two classes, not 10'):
    experiment_lib.build(_task('click_through', 'auc'))


def test_a_model_that_the_data_cannot_feed_is_refused():
  fields = models.published('recommender')
  with pytest.raises(ValueError, match='takes dense, ids, but .* gives image'):
    experiment_lib.build(_task('classification', 'accuracy', **fields))


def test_a_model_whose_output_the_task_cannot_use_is_refused():
  config = recommender_criteo.get_config('smoke')
  with config.unlocked():
    config.task, config.search.quality = 'classification', 'accuracy'
  with pytest.raises(ValueError, match=r'shape \(\) .* needs \(2,\)'):
    experiment_lib.build(config)


def test_buckets_of_model_and_data_must_agree():
  config = recommender_criteo.get_config('smoke')
  with config.unlocked():
    config.data.buckets = 65
  with pytest.raises(ValueError, match='model.buckets=64 and data.buckets=65'):
    experiment_lib.build(config)


def test_clicks_are_not_mixed():
  config = recommender_criteo.get_config('smoke')
  with config.unlocked():
    config.train.mixup = 0.2
  with pytest.raises(ValueError, match='train.mixup=0.2 .* need images'):
    experiment_lib.build(config)


def test_every_key_of_the_schema_is_read():
  read = set()
  for path in (_ROOT / 'fliqs_jax').rglob('*.py'):
    if path == _ROOT / 'fliqs_jax' / 'run' / 'config.py':
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute):
        read.add(node.attr)
      elif isinstance(node, ast.Constant):
        read.add(node.value)  # The data floor goes by names of keys.
  for section, keys in config_lib.SCHEMA.items():
    assert section in read
    for key in keys if isinstance(keys, dict) else ():
      assert key in read, f'{section}.{key} is never read'


def test_an_unwritable_workdir_is_refused(tmp_path):
  from fliqs_jax.run import train

  blocked = tmp_path / 'file'
  blocked.write_text('in the way')
  with pytest.raises(ValueError, match='cannot be used'):
    train.train_and_evaluate(tiny.get_config(), blocked / 'run')


def test_the_cost_command_prints_a_table_and_a_last_line_of_json(capsys):
  assert cost.main(['--model=mobilenetv2', '--format=INT8', '--json']) == 0
  *table, last = capsys.readouterr().out.strip().splitlines()
  # models.md, from Figure 17: 19.25 GBOPs, 53 layers; 300.8 M MACs.
  assert '"gbops": 19.24' in last
  assert '"layers": 53' in last
  assert len(table) == 1 + 53 + 1


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--model=alexnet'], "'alexnet' is unknown; allowed: .*mobilenetv2"),
    (['--model=mobilenetv2', '--format=INT9'], "unknown format 'INT9'"),
    (['--model=mobilenetv2', '--width=-1'], 'must be positive'),
    (
      ['--model=mlp', '--format=int_s'],
      '--format=int_s names 3 formats, .* choose one of INT4, INT8, BF16',
    ),
    (['--model=mlp', '--width=2'], 'mlp has no width'),
    (['--model=resnet_cifar', '--classes=0'], '--classes=0 must be at least 1'),
    (['--model=mlp', '--classes=-3'], '--classes=-3 must be at least 1'),
    (['--model=edsr', '--classes=2'], 'edsr tells no classes apart; omit'),
    (['--model=recommender', '--classes=2'], 'recommender tells no classes'),
  ],
)
def test_the_cost_command_refuses_in_one_line(argv, message, capsys):
  import re

  assert cost.main(argv) == 2
  error = capsys.readouterr().err
  assert re.search(message, error)
  assert error.count('\n') == 1


@pytest.mark.parametrize(
  ('argument', 'words'),
  [
    ('--config=configs/none.py', r'cannot be loaded: .*No such file'),
    ('--config=README.md', r'cannot be loaded: SyntaxError: '),
    ('--config=tests/tiny.py:none=1', 'cannot be loaded: .*allowed: steps'),
    ('--config.train.none=3', "--config: no such key: 'none'"),
    ('--config.train.steps=abc', 'steps=abc: invalid literal'),
    ('--none=1', "Unknown command line flag 'none'"),
  ],
)
@pytest.mark.filterwarnings('ignore:the load_module')  # Of ml_collections.
def test_nonsense_among_the_flags_is_a_line_and_a_mistake(
  monkeypatch, capsys, argument, words
):
  values = flags.FlagValues()
  monkeypatch.setattr(main.flags, 'FLAGS', values)
  config = config_flags.DEFINE_config_file('config', flag_values=values)
  monkeypatch.setattr(main, '_CONFIG', config)
  monkeypatch.setattr(sys, 'argv', ['main', '--config=tests/tiny.py', argument])
  with pytest.raises(SystemExit, match='^2$'):
    main.parsed(sys.argv)
  out, line = capsys.readouterr()
  assert (out, line.count('\n')) == ('', 1)
  assert re.search(words, line)


def test_a_test_split_of_one_class_is_refused_for_auc():
  config = recommender_criteo.get_config('smoke')
  with config.unlocked():
    config.data.update(test_split='test[:1]', test_batch_size=1)
  message = r"data.test_split='test\[:1\]' has no label but \[[01]\], and AUC"
  with pytest.raises(ValueError, match=message):
    experiment_lib.build(config)


@pytest.mark.parametrize('key', ['act_clip', 'weight_clip'])
@pytest.mark.parametrize(
  ('text', 'clip'), [('3', 3.0), ('3.5', 3.5), ('gaussian', 'gaussian')]
)
def test_a_clip_is_a_number_or_a_name_in_any_recipe(key, text, clip):
  config = digits.get_config('smoke')
  config.quant[key] = text  # As an override of a flag does.
  assert getattr(experiment_lib.build(config).spec, key) == clip


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('retrun 3', 'cannot be loaded: SyntaxError: invalid syntax'),
    ('x = 3', r'cannot be loaded: it has no function get_config\(arg\)'),
    ('def get_config(arg): return {}', 'get_config returned a dict; it must'),
    ('def get_config(arg): return {}[0]', 'cannot be loaded: KeyError: 0'),
    ('def get_config(arg): return arg.x', 'AttributeError: .* no attribute'),
    ('def get_config(): return 3', 'TypeError: get_config.. takes 0 posit'),
    ('import no_such_module', 'ModuleNotFoundError: No module'),
  ],
)
@pytest.mark.filterwarnings('ignore:the load_module')  # Of ml_collections.
def test_a_file_that_is_no_config_says_why(text, words, tmp_path, monkeypatch):
  # ml_collections loads every file as one module.
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)
  path = tmp_path / 'c.py'
  path.write_text(text)
  with pytest.raises(ValueError, match=words) as error:
    sweep_file.check_overrides(f'{path}:a=1', {})
  assert str(error.value).startswith(f'--config={path}')
