"""Arguments of recipes, and the sections that follow from them."""

import importlib
import pathlib
import re

import pytest

from configs import fashion_mnist
from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.run.configs import recipe

_DOCS = pathlib.Path(__file__).parents[3] / 'docs'


def test_arguments_are_typed_as_their_defaults():
  arg = recipe.parse_arg(
    'n=3,x=0.5,flag,name=a,kind=c',
    n=1,
    x=1.0,
    flag=False,
    name='',
    gamma=float,
    kind=('b', 'c'),
    size=('s', 'm'),
  )
  assert vars(arg) == dict(
    n=3, x=0.5, flag=True, name='a', gamma=None, kind='c', size='s'
  )


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('stepz=3', "unknown config argument 'stepz'; allowed: .*steps"),
    ('steps=3,steps=4', "'steps' is given twice"),
    ('steps=many', 'must be of type int'),
    ('steps', "'steps' needs a value"),
    ('smoke=maybe', 'must be true or false'),
    ('preset=ours', 'allowed: paper, default'),
    ('model=dense', "'dense' is unknown; allowed: resnet, mobilenet, tran"),
  ],
)
def test_a_wrong_argument_is_refused(arg, message):
  with pytest.raises(ValueError, match=message):
    fashion_mnist.get_config(arg)


@pytest.mark.parametrize(
  ('name', 'usual', 'smoke'),
  [
    ('digits', 1500, 40),
    ('cifar10', 64_000, 12),
    ('fashion_mnist', 2000, 12),
    ('super_resolution', 1500, 12),
    # 84 % of the examples in batches of 4096; 350 epochs in batches of 2048.
    ('recommender_criteo', 9400, 60),
    ('resnet18_imagenet', 218_949, 12),
  ],
)
def test_steps_that_are_given_count_in_a_trial_too(name, usual, smoke):
  get_config = importlib.import_module(f'configs.{name}').get_config
  for arg, steps in (('', usual), ('smoke', smoke)):
    assert get_config(arg).train.steps == steps
    for given in (0, 8):  # None at all is refused when the config is checked.
      assert get_config(f'{arg},steps={given}').train.steps == given


def test_an_assignment_has_no_open_sizes():
  arg = recipe.parse_arg('arch=a.json', **recipe.ARGUMENTS)
  sizes = recipe.base(arg, steps=10, widths=(1.0, 2.0), kernels=(3, 5)).sizes
  assert (sizes.widths, sizes.kernels) == ((), ())


def test_items_are_joined_by_a_plus():
  arg = recipe.parse_arg(
    'strategies=kl+eq,caps=size=2xINT4,references,space=fp_s',
    **recipe.ARGUMENTS,
  )
  config = recipe.base(arg, steps=10)
  assert config.quant.strategies == ('kl', 'eq')
  assert (config.cost.caps, config.cost.reported) == (('size=2xINT4',), ())
  assert config.references == ('E2M1', 'E4M3', 'BF16')


def test_the_config_of_the_docs_is_complete():
  text = (_DOCS / 'configs.md').read_text()
  names = {}
  example = r'```py\n(from fliqs_jax.run.configs import.*?)```'
  exec(re.search(example, text, re.DOTALL)[1], names)
  config_lib.check(names['get_config']())
  config_lib.check(names['get_config']('smoke,preset=paper,space=fp_l'))


def test_the_docs_list_every_argument():
  text = (_DOCS / 'configs.md').read_text()
  section = text.split('## Arguments')[1].split('## Data')[0]
  listed = re.findall(r'^\| `(\w+)`', section, re.MULTILINE)
  assert listed == list(recipe.ARGUMENTS)
