r"""FLIQS search on Fashion-MNIST, a small network, on a CPU.

python -m fliqs_jax.main --workdir=$DIR \
    --config=configs/fashion_mnist.py:data_dir=$DATA,space=int_l,target=1.5

Not in the paper. The networks have so few channels that low bits reduce their
accuracy, and train in minutes on two cores.

Arguments, beside those of every recipe (docs/configs.md):
  data_dir: directory of the four IDX files; Debian's package
    dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist.
  model: resnet (ResNet-8 of 4, 8 and 16 channels), mobilenet (MobileNetV2 at
    a quarter of its channels, with one block a stage) or transformer (DeiT of
    3 blocks of 48 channels, 16 patches of 7x7 pixels, 20 quantized layers).
  nas: also search the channels of each layer: 0.5, 1, 1.5 or 2 times for the
    ResNet, 1 or 2 times for the MobileNetV2, which has multiples of 8 only.
    The transformer has no sizes to search.

Activations are clipped by the table: at 4 standard deviations INT2 leaves most
of them zero, and MobileNetV2 diverges. 2,000 steps are 2.7 epochs, so images
are not augmented. Running statistics of MobileNetV2 move by a hundredth a
batch, so they need 200 batches to settle, those of the others 20.
"""

import ml_collections

from fliqs_jax.run.configs import recipe

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
_SETTLE = {'resnet': 20, 'mobilenet': 200, 'transformer': 20}
_SGD = dict(name='sgd', learning_rate=0.05, weight_decay=5e-4)
_ADAMW = dict(name='adamw', learning_rate=2e-3, weight_decay=0.05)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = recipe.parse_arg(
    arg, **recipe.ARGUMENTS, data_dir='', model=tuple(_MODELS), nas=False
  )
  if arg.nas and arg.model not in _WIDTHS:
    raise ValueError(
      f'config argument nas: {arg.model} has no sizes to search; allowed: '
      f'{", ".join(_WIDTHS)}'
    )
  widths = _WIDTHS[arg.model] if arg.nas else ()
  config = recipe.base(arg, steps=2000, widths=widths)
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
  if arg.smoke:
    config.data = recipe.synthetic_images(pixels=28, batch=16)
  else:
    config.train.settle_batches = _SETTLE[arg.model]
  config.quant.act_clip = 'laplacian'
  config.optimizer = dict(
    _ADAMW if arg.model == 'transformer' else _SGD,
    schedule='cosine',
    warmup=0.05,
    momentum=0.9,
    ema_decay=0.0,
  )
  return config.lock()
