r"""FLIQS search for super-resolution, on pictures of a directory.

python -m fliqs_jax.main --workdir=$DIR \
    --config=configs/super_resolution.py:data_dir=$DATA,space=int_l,target=1.5

Not in the paper. The small network takes half an hour on two cores, with the
photographs of Debian's package plasma-workspace-wallpapers.

Arguments, beside those of every recipe (docs/configs.md):
  data_dir: directory with PNGs or JPEGs, such as /usr/share/wallpapers. If it
    has folders, each is one picture of which the files are versions.
  model: edsr, espcn or rdn, which may start from a trained network of an npm
    package by --init_from=PACKAGE/models/FOLDER/model.json (docs/configs.md).
  size: small (EDSR of 4 blocks and 32 channels, patches of 48 pixels) or paper
    (16 blocks and 64 channels, and the recipe of EDSR's paper, which the others
    have, too). ESPCN has one size.
  scale: factor of enlargement, 2, 3 or 4.

EDSR (Lim et al. 2017, section 4.2): L1 loss; Adam, 1e-4, halved at 200,000 of
300,000 steps; batches of 16 patches, which are 48 pixels before they are
enlarged (192 after it for x4), flipped and rotated. Here a patch is the one
with most texture of four random ones. The small recipe is ours: 1,500 steps,
1e-3, cosine. Of the pictures 60 % train, 20 % validate and 20 % test, by 8
crops of 96 pixels each, those with most texture. gamma is twice what INT8 may
gain over INT4, as of other tasks.
"""

import ml_collections

from fliqs_jax.run.configs import recipe

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
  arg = recipe.parse_arg(
    arg,
    **recipe.ARGUMENTS | dict(space='int_l'),
    data_dir='',
    model=tuple(_MODELS),
    size=tuple(_STEPS),
    scale=2,
  )
  config = recipe.base(arg, steps=_STEPS[arg.size], usual_gamma=-2.0)
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
  config.optimizer = _OPTIMIZERS[arg.size]
  config.train.settle_batches = 3 if arg.smoke else 10
  config.quant.act_clip = 'laplacian'
  config.search.quality = 'psnr'
  if arg.smoke:
    config.data.update(name='synthetic_pictures', data_dir='', patch=24)
    config.data.update(crop=24, crops=2, test_batch_size=8)
    if arg.model == 'edsr':
      config.model.update(blocks=1, channels=8)
  return config.lock()
