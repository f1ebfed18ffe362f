r"""FLIQS search for super-resolution, on pictures of a directory.

python -m fliqs_jax.main --workdir=$DIR \
    --config=configs/super_resolution.py:data_dir=$DATA,space=int_l,target=1.5

Not in the paper. The small network takes half an hour on two cores, with the
photographs of Debian's package plasma-workspace-wallpapers.

Arguments:
  data_dir: directory with PNGs or JPEGs, such as /usr/share/wallpapers. If it
    has folders, each is one picture of which the files are versions.
  model: edsr, espcn or rdn, which may start from a trained network of an npm
    package by --init_from=PACKAGE/models/FOLDER/model.json (docs/configs.md).
  size: small (EDSR of 4 blocks and 32 channels, patches of 48 pixels) or paper
    (16 blocks and 64 channels, and the recipe of EDSR's paper, which the others
    have, too). ESPCN has one size.
  scale: factor of enlargement, 2, 3 or 4.
  space: a named space (int_s, int_l, fp_s, fp_l), several formats joined by a
    plus, as INT4+INT6+INT8, or one format, which trains that uniform network.
  strategies: rules for thresholds, joined by a plus, of which each format gets
    each one: max_abs, kl, eq, admm; none if not given.
  mode: tied, weights, activations or separate, which is best here
    (docs/results.md).
  target: cost target, as a multiple of uniform 4-bit.
  cost: bops, size, compressed_bytes, average_bits, or that of a chip:
    latency:t4, energy:45nm, or latency: and your own file (docs/chips.md).
  caps: limits of other costs: size=1.5xINT4+energy:45nm=1.2xINT8.
  reported: costs to report beside: latency:h100+energy:45nm.
  steps: number of steps of training; those of the size, or 12 of a trial, if
    not given.
  seed: seed of all randomness.
  gamma: weight of the cost against the quality, of default and paper; -2 if
    not given, as the quality is the PSNR in dB.
  preset: the search: sensitivity, default, paper, edmips, dnas or dqss.
  arch: an arch.json, to train that assignment.
  references: also train the uniform networks at 4, 8 and 16 bits.
  smoke: a few steps of a tiny network on synthetic pictures, as a trial.

EDSR (Lim et al. 2017, section 4.2): L1 loss; Adam, 1e-4, halved at 200,000 of
300,000 steps; batches of 16 patches, which are 48 pixels before they are
enlarged (192 after it for x4), flipped and rotated. Here a patch is the one
with most texture of four random ones. The small recipe is ours: 1,500 steps,
1e-3, cosine. Of the pictures 60 % train, 20 % validate and 20 % test, by 8
crops of 96 pixels each, those with most texture. gamma is twice what INT8 may
gain over INT4, as of other tasks.
"""

import ml_collections

from fliqs_jax.run import config as config_lib
from fliqs_jax.search import presets

_MODELS = {
  'edsr': dict(
    small=dict(blocks=4, channels=32), paper=dict(blocks=16, channels=64)
  ),
  'espcn': dict(small={}, paper={}),
  'rdn': dict(
    small=dict(blocks=2, convs=1, growth=4, channels=64),
    paper=dict(blocks=16, convs=8, growth=64, channels=64),
  ),
}
_ADAM = dict(name='adamw', momentum=0.9, weight_decay=0.0, ema_decay=0.0)
_OPTIMIZERS = {
  'small': dict(_ADAM, learning_rate=1e-3, schedule='cosine', warmup=0.05),
  'paper': dict(_ADAM, learning_rate=1e-4, schedule='halved', warmup=0.0),
}
_STEPS = {'small': 1500, 'paper': 300_000}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = config_lib.parse_arg(
    arg,
    data_dir='',
    model='edsr',
    size='small',
    scale=2,
    space='int_l',
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
  for key, known in (('model', _MODELS), ('size', _STEPS)):
    if getattr(arg, key) not in known:
      raise ValueError(
        f'config argument {key}={getattr(arg, key)!r} is unknown; allowed: '
        f'{", ".join(known)}'
      )
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = 'super_resolution'
  config.model = dict(
    name=arg.model, scale=arg.scale, **_MODELS[arg.model][arg.size]
  )
  config.data = dict(
    name='pictures',
    data_dir=arg.data_dir,
    train_split='pictures[:60%]',
    valid_split='pictures[60%:80%]',
    test_split='pictures[80%:]',
    batch_size=16,
    valid_batch_size=8,  # Crops have four times the pixels of small patches.
    test_batch_size=16,
    patch=48 if arg.size == 'small' else 48 * arg.scale,
    scale=arg.scale,
    crop=96,
    crops=8,
  )
  steps = _STEPS[arg.size]
  if arg.smoke:
    steps = 12
    config.data.update(name='synthetic_pictures', data_dir='', patch=24)
    config.data.update(crop=24, crops=2, test_batch_size=8)
    if arg.model == 'edsr':
      config.model.update(blocks=1, channels=8)
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
  config.sizes = dict(widths=(), kernels=(), kernel_weights='branches')
  config.cost = dict(
    kind=arg.cost,
    target=arg.target,
    relative_to='INT4',
    bound='near' if arg.preset == 'paper' else 'at_most',
    caps=tuple(filter(None, arg.caps.split('+'))),
    reported=tuple(filter(None, arg.reported.split('+'))),
  )
  config.search = presets.search_keys(
    arg.preset, steps, arg.gamma, usual_gamma=-2.0
  )
  config.search.update(quality='psnr')
  config.optimizer = _OPTIMIZERS[arg.size]
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
    settle_batches=3 if arg.smoke else 10,
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
