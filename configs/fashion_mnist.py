r"""FLIQS search on Fashion-MNIST, a small network, on a CPU.

python -m fliqs_jax.main --workdir=$DIR \
    --config=configs/fashion_mnist.py:data_dir=$DATA,space=int_l,target=1.5

Not in the paper. The networks have so few channels that low bits reduce their
accuracy, and train in minutes on two cores.

Arguments:
  data_dir: directory of the four IDX files; Debian's package
    dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist.
  model: resnet (ResNet-8 of 4, 8 and 16 channels), mobilenet (MobileNetV2 at
    a quarter of its channels, with one block a stage) or transformer (DeiT of
    3 blocks of 48 channels, 16 patches of 7x7 pixels, 20 quantized layers).
  space: a named space (int_s, int_l, fp_s, fp_l), several formats joined by a
    plus, as INT2+INT3+INT4+INT8, or one format, which trains that uniform
    network.
  nas: also search the channels of each layer: 0.5, 1, 1.5 or 2 times for the
    ResNet, 1 or 2 times for the MobileNetV2, which has multiples of 8 only.
    The transformer has no sizes to search.
  strategies: rules for thresholds, joined by a plus, of which each format gets
    each one: max_abs, kl, eq, admm; none if not given.
  mode: tied, weights, activations or separate.
  target: cost target, as a multiple of uniform 4-bit.
  cost: bops, size, compressed_bytes, average_bits, or that of a chip:
    latency:t4, energy:45nm, or latency: and your own file (docs/chips.md).
  caps: limits of other costs: size=1.5xINT4+energy:45nm=1.2xINT8.
  reported: costs to report beside: latency:h100+energy:45nm.
  steps: number of steps of training; 2000, or 12 of a trial, if not given.
  seed: seed of all randomness.
  gamma: weight of the cost against the quality; the preset's own if not given.
  preset: the search: sensitivity, default, paper, edmips, dnas or dqss.
  arch: an arch.json, to train that assignment.
  references: also train the uniform networks at 4, 8 and 16 bits.
  smoke: a few steps on synthetic images, as a trial.

Activations are clipped by the table: at 4 standard deviations INT2 leaves most
of them zero, and MobileNetV2 diverges. 2,000 steps are 2.7 epochs, so images
are not augmented. Running statistics of MobileNetV2 move by a hundredth a
batch, so they need 200 batches to settle, those of the others 20.
"""

import ml_collections

from fliqs_jax.run import config as config_lib
from fliqs_jax.search import presets

_MODELS = {
  'resnet': dict(name='resnet_cifar', depth=8, filters=4),
  'mobilenet': dict(
    name='mobilenetv2',
    width=0.25,
    depth=0.1,
    strides=(2, 1, 2, 1, 2, 1, 2, 1),
    dropout=0.0,
  ),
  'transformer': dict(
    name='deit_ti16', width=0.25, depth=3, patch=7, drop_path=0.0
  ),
}
_WIDTHS = {'resnet': (0.5, 1.0, 1.5, 2.0), 'mobilenet': (1.0, 2.0)}
_SETTLE = {'mobilenet': 200}
_SGD = dict(name='sgd', learning_rate=0.05, weight_decay=5e-4)
_ADAMW = dict(name='adamw', learning_rate=2e-3, weight_decay=0.05)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = config_lib.parse_arg(
    arg,
    data_dir='',
    model='resnet',
    space='int_s',
    nas=False,
    strategies='',
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
  if arg.model not in _MODELS:
    raise ValueError(
      f'config argument model={arg.model!r} is unknown; allowed: '
      f'{", ".join(_MODELS)}'
    )
  if arg.nas and arg.model not in _WIDTHS:
    raise ValueError(
      f'config argument nas: {arg.model} has no sizes to search; allowed: '
      f'{", ".join(_WIDTHS)}'
    )
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = 'classification'
  config.model = _MODELS[arg.model]
  config.data = dict(
    name='fashion_mnist',
    data_dir=arg.data_dir,
    train_split='train[:80%]',
    valid_split='train[80%:]',
    test_split='test',
    batch_size=64,
    valid_batch_size=64,
    test_batch_size=500,
    augment='none',
  )
  steps = 2000
  if arg.smoke:
    steps = 12
    config.data = dict(
      name='synthetic',
      data_dir='',
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test',
      batch_size=16,
      valid_batch_size=16,
      test_batch_size=16,
      image_size=28,
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
    strategies=tuple(filter(None, arg.strategies.split('+'))),
    weight_clip='absmax',
    act_clip='laplacian',
    act_threshold='deviation' if arg.preset == 'paper' else 'magnitude',
    act_start=0.15,
    arch=arg.arch,
  )
  config.sizes = dict(
    widths=_WIDTHS[arg.model] if arg.nas and not arg.arch else (),
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
    _ADAMW if arg.model == 'transformer' else _SGD,
    schedule='cosine',
    warmup=0.05,
    momentum=0.9,
    ema_decay=0.0,
  )
  log_every = max(1, steps // 40)
  config.train = dict(
    dtype='float32',
    steps=steps,
    label_smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    max_loss=100.0,
    log_every=log_every,
    checkpoint_every=10 * log_every,
    checkpoints_kept=2,
    settle_batches=3 if arg.smoke else _SETTLE.get(arg.model, 20),
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
