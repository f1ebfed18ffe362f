r"""FLIQS search on real handwritten digits, on a laptop's CPU.

python -m fliqs_jax.main --workdir=runs/digits \
    --config=configs/digits.py:space=int_s,target=1.5

A ResNet-8 of 4, 8 and 16 channels learns scikit-learn's 8x8 digits (1797
images, in its wheel). It is so small that four bits reduce its accuracy. A run
takes about half a minute on two cores; docs/results.md has the measured
results.

Arguments:
  space: a named space (int_s, int_l, fp_s, fp_l), one format, or several joined
    by a +; one format trains that uniform network.
  nas: also search the channels of each layer, 0.5, 1, 1.5 or 2 times.
  mode: tied, weights, activations or separate.
  target: cost target, as a multiple of uniform 4-bit.
  cost: bops, size, compressed_bytes, average_bits, or that of a chip:
    latency:t4, energy:45nm, or latency: and your own file (docs/chips.md).
  caps: limits of other costs: size=1.5xINT4+energy:45nm=1.2xINT8.
  reported: costs to report beside: latency:h100+energy:45nm.
  steps: number of steps of training; 1500, or 40 of a trial, if not given.
  seed: seed of all randomness.
  gamma: weight of the cost against the quality; the preset's own if not given.
  preset: default, paper, sensitivity, edmips, dnas or dqss, the search.
  arch: an arch.json, to train that assignment.
  references: also train the uniform networks at 4, 8 and 16 bits.
  smoke: a few steps, as a trial.
"""

import ml_collections

from fliqs_jax.run import config as config_lib
from fliqs_jax.search import presets


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = config_lib.parse_arg(
    arg,
    space='int_s',
    nas=False,
    mode='tied',
    target=1.5,
    cost='bops',
    caps='',
    reported='',
    steps=int,
    seed=0,
    gamma=float,
    preset='sensitivity',
    arch='',
    references=False,
    smoke=False,
  )
  steps = 40 if arg.smoke else 1500
  if arg.steps is not None:
    steps = arg.steps
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = 'classification'
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
  config.sizes = dict(
    widths=(0.5, 1.0, 1.5, 2.0) if arg.nas and not arg.arch else (),
    kernels=(),
    kernel_weights='branches',
  )
  config.cost = dict(
    kind=arg.cost,
    target=arg.target,
    relative_to='INT4',
    bound='near' if arg.preset == 'paper' else 'at_most',
    caps=tuple(filter(None, arg.caps.split('+'))),
    reported=tuple(filter(None, arg.reported.split('+'))),
  )
  config.search = presets.search_keys(
    arg.preset, steps, arg.gamma, sizes=arg.nas
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
  config.train = dict(
    dtype='float32',
    steps=steps,
    label_smoothing=0.1,
    mixup=0.0,
    cutmix=0.0,
    max_loss=100.0,
    log_every=max(1, steps // 75),
    checkpoint_every=max(1, steps // 75) * 15,
    checkpoints_kept=2,
    settle_batches=20,
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
