"""Functions that the ImageNet recipes share; the files beside it use them.

All need `--config.data.data_dir`: where TFDS has prepared imagenet2012 as
ArrayRecord (docs/configs.md, "Data"). Of every recipe, the arguments are:
  space: a named space (int_s, int_l, fp_s, fp_l) or one format, which trains
    that uniform network: `space=E4M3` and E1M6, E2M5, E3M4, E5M2 are the five
    runs of Table 7.
  mode: tied, weights, activations or separate.
  target: cost target, as a multiple of uniform 4-bit.
  width: multiplier of all channels; the Pareto curves' are in each file.
  pareto: train as long as for the Pareto curves (A.2), not as for Table 1.
  steps: length of training, in place of the recipe's.
  seed: of everything.
  gamma: weight of the cost against the quality; the preset's own if not given.
  preset: default or paper, the controller.
  arch: an arch.json, to train that assignment.
  references: also train the uniform networks at 4, 8 and 16 bits.
  smoke: a few steps of a tiny network on synthetic images, to see that
    everything runs.

Where values come from. Table 4: optimizer, schedule, base rate, warm-up and
length, start of activation quantization, 4 standard deviations for its clip.
A.2: batch 2048, and the two lengths for the Pareto curves. A.4: label smoothing
0.1, the search from 25 % of training on, and the `paper` controller; the paper
does not say its gamma (WORKSPACE.md does). An epoch is counted as in the paper,
over all 1,281,167 images; 1 % of them is held out for the controller. Each file
tells where the rest of its recipe comes from.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from fliqs_jax.run import config as config_lib
from fliqs_jax.search import presets

BATCH_SIZE = 2048
STEPS_PER_EPOCH = 1_281_167 / BATCH_SIZE


def parse_arg(arg: str | None, **more: Any) -> Any:
  """Returns the arguments of a recipe: those above, and its own."""
  return config_lib.parse_arg(
    arg,
    **more,
    space='int_s',
    mode='tied',
    target=1.25,
    width=1.0,
    pareto=False,
    steps=int,
    seed=0,
    gamma=float,
    preset='default',
    arch='',
    references=False,
    smoke=False,
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
    arg: as of `parse_arg`.
    model: the config's section.
    smoke_model: keys of it that make the network tiny.
    image_size: height and width of images in pixels.
    smoke_image_size: the same in a smoke run.
    augment: of the training images; see `data.make_streams`.
    random_erasing: its probability.
    exclude: patterns of layers that stay at 16 bits.
    epochs: length of training.
    act_start: first step with quantized activations, in training so long.
    pareto_steps: length of training for the Pareto curves.
    pareto_act_start: first step with quantized activations there.
    optimizer: the config's section without `warmup`.
    warmup_epochs: of the learning rate.
    mixup: parameter of its Beta distribution; 0 is off.
    cutmix: the same.
    settle_batches: how many batches the statistics of the found network see.
    widths: of channels, to search among; none: as published.
    kernels: sizes of depthwise kernels, to search among; none: as published.
  """
  whole = round(epochs * STEPS_PER_EPOCH)
  steps = pareto_steps if arg.pareto else whole
  start = pareto_act_start / pareto_steps if arg.pareto else act_start / whole
  steps = arg.steps or steps
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = 'classification'
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
  log_every, checkpoint_every = 100, 2000
  if arg.smoke:
    steps, log_every, checkpoint_every = 12, 3, 6
    config.model = dict(model, **smoke_model)
    config.data = dict(
      name='synthetic',
      data_dir='',
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test[:32]',
      batch_size=8,
      valid_batch_size=8,
      test_batch_size=32,
      image_size=smoke_image_size,
      num_classes=10,
    )
  config.quant = dict(
    formats=arg.space,
    mode=arg.mode,
    exclude=() if arg.arch else exclude,  # An arch.json names them itself.
    menus=(),
    groups=(),
    weight_clip='absmax',
    act_clip=4.0,
    act_start=start,
    arch=arg.arch,
  )
  config.sizes = dict(
    widths=() if arg.arch else widths,
    kernels=() if arg.arch else kernels,
    kernel_weights='branches',
  )
  config.cost = dict(kind='bops', target=arg.target, relative_to='INT4')
  config.search = presets.search_keys(arg.preset, steps, arg.gamma)
  config.optimizer = dict(optimizer, warmup=warmup_epochs / epochs)
  if arg.smoke:  # Batches are so much smaller.
    config.optimizer.learning_rate *= config.data.batch_size / BATCH_SIZE
  config.train = dict(
    steps=steps,
    label_smoothing=0.1,
    mixup=mixup,
    cutmix=cutmix,
    max_loss=1e4,
    log_every=log_every,
    checkpoint_every=checkpoint_every,
    checkpoints_kept=2,
    settle_batches=2 if arg.smoke else settle_batches,
  )
  config.parallel = dict(
    mode='pjit', shard_params=False, accumulate=1, leave_one_out=False
  )
  uniform = ('E2M1', 'E4M3') if arg.space.startswith('fp') else ('INT4', 'INT8')
  config.references = (*uniform, 'BF16') if arg.references else ()
  return config.lock()


def residual_recipe(arg: Any, **network: Any) -> ml_collections.ConfigDict:
  """Returns Table 4's recipe for ResNets and InceptionV3.

  Args:
    arg: as of `parse_arg`.
    **network: what else `recipe` needs: `model`, `smoke_model`,
      `smoke_image_size` and `weight_decay`.
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
    arg: as of `parse_arg`.
    **network: what else `recipe` takes: `model`, `smoke_model`, `image_size`,
      `weight_decay`, and open sizes.
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
    # The mean weights need statistics of their own: 0.99**400 = 0.02.
    settle_batches=400,
  )
