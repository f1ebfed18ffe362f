"""The smallest search that is whole: an MLP on the real digits, 60 steps.

With all that a run may keep and do: mixed images, a mean of the weights.

python -m fliqs_jax.main --config=tests/tiny.py:seed=1 --workdir=DIR
"""

import ml_collections

from configs import digits
from fliqs_jax.run.configs import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the digits config with another network and fewer steps."""
  arg = recipe.parse_arg(
    arg,
    steps=60,
    seed=0,
    space='int_s',
    preset='default',
    target=1.5,
    arch='',
    data_dir='',
    act_clip='',
  )
  config = digits.get_config(
    f'steps={arg.steps},seed={arg.seed},space={arg.space},'
    f'preset={arg.preset},target={arg.target}'
    + (f',arch={arg.arch}' if arg.arch else '')
  )
  with config.unlocked(), config.ignore_type():
    config.model = dict(name='mlp', hidden=(16,))
    config.data.data_dir = arg.data_dir
    config.data.batch_size = 64
    config.data.valid_batch_size = 64
    config.data.test_batch_size = 64
    config.train.log_every = 5
    config.train.checkpoint_every = 10
    config.train.settle_batches = 3
    config.train.mixup = 0.2
    config.train.cutmix = 1.0
    config.optimizer.ema_decay = 0.9
    if arg.act_clip:
      config.quant.act_clip = arg.act_clip
  return config
