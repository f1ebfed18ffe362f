"""Functions that the ImageNet recipes share; the files beside it use them.

All need `--config.data.data_dir`: the directory in which TFDS has prepared
imagenet2012 as ArrayRecord (docs/configs.md, "Data"). Arguments, beside those
of every recipe (docs/configs.md):
  width: multiplier of all channels; each file names those of the Pareto curves.
  pareto: train as long as for the Pareto curves (A.2), not as for Table 1.

With one format, `space=E4M3` and E1M6, E2M5, E3M4, E5M2 are the five runs of
Table 7.

Sources of the values. Table 4: optimizer, schedule, base rate, warm-up and
length, start of activation quantization, 4 standard deviations for its clip.
A.2: batch 2048, and the two lengths for the Pareto curves. A.4: label smoothing
0.1, the search from 25 % of training on, and the `paper` controller; the paper
does not give its gamma (WORKSPACE.md does). An epoch has all 1,281,167 images,
as in the paper; 1 % of them is held out for the controller. Each file names the
sources of the rest of its recipe.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from fliqs_jax.run.configs import recipe as recipe_lib

BATCH_SIZE = 2048
STEPS_PER_EPOCH = 1_281_167 / BATCH_SIZE


def parse_arg(arg: str | None, **more: Any) -> Any:
  """Returns the arguments of a recipe: those above, and its own.

  Args:
    arg: the text after the colon in `--config=FILE:ARGUMENTS`.
    **more: {argument of this recipe alone: default}.
  """
  return recipe_lib.parse_arg(
    arg,
    **recipe_lib.ARGUMENTS | dict(target=1.25, preset='default'),
    **more,
    width=1.0,
    pareto=False,
  )


def recipe(
  arg: Any,
  *,
  model: Mapping[str, Any],
  smoke_model: Mapping[str, Any],
  image_size: int,
  smoke_image_size: int,
  augment: str,
  random_erasing: float,
  exclude: tuple[str, ...],
  epochs: float,
  act_start: int,
  pareto_steps: int,
  pareto_act_start: int,
  optimizer: Mapping[str, Any],
  warmup_epochs: float,
  mixup: float,
  cutmix: float,
  settle_batches: int,
  widths: tuple[float, ...] = (),
  kernels: tuple[int, ...] = (),
) -> ml_collections.ConfigDict:
  """Returns the config of a recipe.

  Args:
    arg: the arguments that `parse_arg` returned.
    model: the section `model` of the config.
    smoke_model: keys of `model` that make the network tiny in a smoke run.
    image_size: height and width of images, in pixels.
    smoke_image_size: height and width of images in a smoke run, in pixels.
    augment: augmentation of the training images; see `data.make_streams`.
    random_erasing: share of training images with an erased rectangle, 0 to 1.
    exclude: patterns of layers that stay at 16 bits.
    epochs: length of training, in epochs.
    act_start: first step with quantized activations in a training of `epochs`.
    pareto_steps: number of steps of training for the Pareto curves.
    pareto_act_start: first step with quantized activations in a training of
      `pareto_steps`.
    optimizer: the section `optimizer` of the config, without `warmup`.
    warmup_epochs: length of the warm-up of the learning rate, in epochs.
    mixup: parameter of the Beta distribution of mixup; 0 switches it off.
    cutmix: parameter of the Beta distribution of cutmix; 0 switches it off.
    settle_batches: number of batches with which the running statistics of the
      selected network are settled.
    widths: multiples of the channels to search among; (): as published.
    kernels: sizes of depthwise kernels to search among, in pixels; (): as
      published.
  """
  whole = round(epochs * STEPS_PER_EPOCH)
  steps = pareto_steps if arg.pareto else whole
  start = pareto_act_start / pareto_steps if arg.pareto else act_start / whole
  config = recipe_lib.base(arg, steps=steps, widths=widths, kernels=kernels)
  config.model = dict(model)
  config.data = dict(
    name='imagenet2012',
    data_dir='',
    train_split='train[:99%]',
    valid_split='train[99%:]',
    test_split='validation',
    batch_size=BATCH_SIZE,
    valid_batch_size=BATCH_SIZE,
    test_batch_size=1000,
    image_size=image_size,
    augment=augment,
    random_erasing=random_erasing,
  )
  config.optimizer = dict(optimizer, warmup=warmup_epochs / epochs)
  config.train.update(
    label_smoothing=0.1,
    mixup=mixup,
    cutmix=cutmix,
    max_loss=1e4,
    log_every=100,
    checkpoint_every=2000,
    settle_batches=settle_batches,
  )
  if arg.smoke:
    config.model.update(smoke_model)
    config.data = recipe_lib.synthetic_images(smoke_image_size, batch=8)
    config.data.test_split = 'test[:32]'
    # The learning rate is proportional to the batch size.
    config.optimizer.learning_rate *= config.data.batch_size / BATCH_SIZE
    config.train.update(log_every=3, checkpoint_every=6, settle_batches=2)
  config.quant.act_start = start
  if not arg.arch:  # An arch.json fixes every layer.
    config.quant.exclude = exclude
  # A Pareto point quantizes activations late in its short training.
  config.search.start = max(config.search.start, start)
  return config.lock()


def residual_recipe(arg: Any, **network: Any) -> ml_collections.ConfigDict:
  """Returns Table 4's recipe for ResNets and InceptionV3.

  Args:
    arg: the arguments that `parse_arg` returned.
    **network: further arguments of `recipe`: `model`, `smoke_model` and
      `smoke_image_size`; and `weight_decay` of the optimizer.
  """
  weight_decay = network.pop('weight_decay')
  return recipe(
    arg,
    **network,
    image_size=224,
    augment='crop_flip',
    random_erasing=0.0,
    exclude=(),
    epochs=350,
    act_start=15_000,
    pareto_steps=30_200,
    pareto_act_start=7500,
    optimizer=dict(
      name='sgd',
      learning_rate=2.64,
      schedule='cosine',
      momentum=0.9,
      weight_decay=weight_decay,
      ema_decay=0.0,
    ),
    warmup_epochs=10,
    mixup=0.0,
    cutmix=0.0,
    settle_batches=20,
  )


def mobile_recipe(arg: Any, **network: Any) -> ml_collections.ConfigDict:
  """Returns Table 4's recipe for MobileNetV2 and EfficientNets.

  Args:
    arg: the arguments that `parse_arg` returned.
    **network: further arguments of `recipe`: `model`, `smoke_model`,
      `image_size`, `widths` and `kernels`; and `weight_decay` of the optimizer.
  """
  weight_decay = network.pop('weight_decay')
  return recipe(
    arg,
    **network,
    smoke_image_size=32,
    augment='crop_flip',
    random_erasing=0.0,
    exclude=(),
    epochs=360,
    act_start=18_000,
    pareto_steps=112_000,
    pareto_act_start=20_000,
    optimizer=dict(
      name='rmsprop',
      learning_rate=0.256,
      schedule='exponential',
      momentum=0.9,
      weight_decay=weight_decay,
      ema_decay=0.9999,
    ),
    warmup_epochs=15,
    mixup=0.0,
    cutmix=0.0,
    # The mean of the weights needs its own statistics: 0.99**400 = 0.02.
    settle_batches=400,
  )
