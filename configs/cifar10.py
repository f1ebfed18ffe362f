r"""FLIQS search on CIFAR-10, a ResNet-20.

python -m fliqs_jax.main --workdir=$DIR --config.data.data_dir=$DATA \
    --config=configs/cifar10.py:space=int_l,target=1.5

The paper has no such search. He et al. 2015 report 91.25 % for the float
network; not yet measured by us.

Arguments:
  space: a named space (int_s, int_l, fp_s, fp_l), one format, or several joined
    by a +; one format trains that uniform network.
  mode: tied, weights, activations or separate.
  target: cost target, as a multiple of uniform 4-bit.
  cost: bops, size, compressed_bytes, average_bits, or that of a chip:
    latency:t4, energy:45nm, or latency: and your own file (docs/chips.md).
  caps: limits of other costs: size=1.5xINT4+energy:45nm=1.2xINT8.
  reported: costs to report beside: latency:h100+energy:45nm.
  steps: number of steps of training; 64,000, or 12 of a trial, if not given.
  seed: seed of all randomness.
  gamma: weight of the cost against the quality; the preset's own if not given.
  preset: default, paper, sensitivity, edmips, dnas or dqss, the search.
  arch: an arch.json, to train that assignment.
  references: also train the uniform networks at 4, 8 and 16 bits.
  smoke: a few steps on synthetic images, as a trial.

Batch 128, 64,000 steps, rate 0.1, momentum 0.9, weight decay 1e-4, padded crop
and flip are section 4.2 of He et al. 2015; the cosine schedule and the keys of
the search are those of digits.py.
"""

import ml_collections

from fliqs_jax.run import config as config_lib
from fliqs_jax.search import presets


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = config_lib.parse_arg(
    arg,
    space='int_s',
    mode='tied',
    target=1.5,
    cost='bops',
    caps='',
    reported='',
    steps=int,
    seed=0,
    gamma=float,
    preset='default',
    arch='',
    references=False,
    smoke=False,
  )
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = 'classification'
  config.model = dict(name='resnet_cifar', depth=20, filters=16)
  config.data = dict(
    name='cifar10',
    data_dir='',
    train_split='train[:90%]',
    valid_split='train[90%:]',
    test_split='test',
    batch_size=128,
    valid_batch_size=128,
    test_batch_size=500,
    augment='crop_flip',
  )
  steps, log_every, checkpoint_every = 64_000, 100, 1000
  if arg.smoke:
    steps, log_every, checkpoint_every = 12, 3, 6
    config.model.update(depth=8, filters=4)
    config.data = dict(
      name='synthetic',
      data_dir='',
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test',
      batch_size=16,
      valid_batch_size=16,
      test_batch_size=16,
      image_size=32,
      num_classes=10,
    )
  if arg.steps is not None:
    steps = arg.steps
  config.quant = dict(
    formats=arg.space,
    mode=arg.mode,
    exclude=(),
    menus=(),
    groups=(),
    strategies=(),
    weight_clip='absmax',
    act_clip='4',  # A number as text, so that a name may replace it.
    act_threshold='deviation' if arg.preset == 'paper' else 'magnitude',
    act_start=0.15,
    arch=arg.arch,
  )
  config.sizes = dict(widths=(), kernels=(), kernel_weights='branches')
  config.cost = dict(
    kind=arg.cost,
    target=arg.target,
    relative_to='INT4',
    bound='near' if arg.preset == 'paper' else 'at_most',
    caps=tuple(filter(None, arg.caps.split('+'))),
    reported=tuple(filter(None, arg.reported.split('+'))),
  )
  config.search = presets.search_keys(arg.preset, steps, arg.gamma)
  config.optimizer = dict(
    name='sgd',
    learning_rate=0.1,
    schedule='cosine',
    warmup=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    ema_decay=0.0,
  )
  config.train = dict(
    dtype='float32',
    steps=steps,
    label_smoothing=0.1,
    mixup=0.0,
    cutmix=0.0,
    max_loss=100.0,
    log_every=log_every,
    checkpoint_every=checkpoint_every,
    checkpoints_kept=2,
    settle_batches=3 if arg.smoke else 20,
    frozen=False,
    teacher=False,
  )
  config.parallel = dict(
    mode='pjit', shard_params=False, accumulate=1, leave_one_out=False
  )
  uniform = ('E2M1', 'E4M3') if arg.space.startswith('fp') else ('INT4', 'INT8')
  config.references = (*uniform, 'BF16') if arg.references else ()
  config.init_from = ''
  return config.lock()
