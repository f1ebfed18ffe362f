r"""FLIQS search on real handwritten digits, on a laptop's CPU.

python -m fliqs_jax.main --workdir=runs/digits \
    --config=configs/digits.py:space=int_s,target=1.5

A ResNet-8 of 4, 8 and 16 channels learns scikit-learn's 8x8 digits (1797
images, in its wheel). It is so small that four bits reduce its accuracy. A run
takes about half a minute on two cores; docs/results.md has the measured
results.

Arguments, beside those of every recipe (docs/configs.md):
  nas: also search the channels of each layer, 0.5, 1, 1.5 or 2 times.
"""

import ml_collections

from fliqs_jax.run.configs import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = recipe.parse_arg(arg, **recipe.ARGUMENTS, nas=False)
  widths = (0.5, 1.0, 1.5, 2.0) if arg.nas else ()
  config = recipe.base(arg, steps=1500, trial=40, widths=widths)
  config.model = dict(name='resnet_cifar', depth=8, filters=4)
  config.data = dict(
    name='digits',
    data_dir='',
    train_split='train[:80%]',
    valid_split='train[80%:]',
    test_split='test',
    batch_size=128,
    valid_batch_size=128,
    test_batch_size=128,
  )
  config.optimizer = dict(
    name='sgd',
    learning_rate=0.1,
    schedule='cosine',
    warmup=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    ema_decay=0.0,
  )
  log_every = max(1, config.train.steps // 75)
  config.train.update(
    label_smoothing=0.1,
    log_every=log_every,
    checkpoint_every=15 * log_every,
    settle_batches=20,
  )
  return config.lock()
