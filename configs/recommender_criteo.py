r"""FLIQS search, the recommender of A.13 on Criteo's display advertising data.

python -m fliqs_jax.main --workdir=$DIR --config.data.data_dir=$DATA \
    --config=configs/recommender_criteo.py:space=int_l,target=2

DATA holds train.txt of the Kaggle challenge (45,840,617 lines). The paper
draws AUC against MBOPs (Figure 13) and prints no numbers.

Arguments:
  space: a named space (int_s, int_l, fp_s, fp_l), one format, or several joined
    by a +; one format trains that uniform network. The paper searches int_l and
    fp_l.
  nas: also search the rank and the width of each hidden layer, 0.25 to 2 times
    the published one (A.13).
  mode: tied, weights, activations or separate.
  target: cost target, as a multiple of uniform 4-bit.
  cost: bops, size, compressed_bytes, average_bits, or that of a chip:
    latency:t4, energy:45nm, or latency: and your own file (docs/chips.md).
  caps: limits of other costs: size=1.5xINT4+energy:45nm=1.2xINT8.
  reported: costs to report beside: latency:h100+energy:45nm.
  steps: number of steps of training; one epoch, or 60 steps of a trial, if not
    given.
  seed: seed of all randomness.
  gamma: weight of the cost against the quality, of default and paper; -0.1 if
    not given.
  preset: default, paper, sensitivity, edmips, dnas or dqss, the search.
  arch: an arch.json, to train that assignment.
  references: also train the uniform networks at 8 and 16 bits.
  smoke: a few steps of a tiny network on synthetic clicks, as a trial.

A.13 describes the data and the layers only. Our choices: one epoch, which is
usual for clicks, where a second one overfits; batch 4096; AdamW without decay
at 1e-3, cosine; the first six of the seven days for training, their end for the
controller (Wang et al. 2020 test on the seventh day, too); quality AUC, with
the gamma of accuracy, -0.1, because both are fractions.
"""

import ml_collections

from fliqs_jax.run import config as config_lib
from fliqs_jax.search import presets

_BATCH_SIZE = 4096
_STEPS = 45_840_617 * 84 // 100 // _BATCH_SIZE  # One epoch.


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = config_lib.parse_arg(
    arg,
    space='int_l',
    nas=False,
    mode='tied',
    target=2.0,
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
  buckets = 2**15
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.task = 'click_through'
  config.model = dict(
    name='recommender',
    buckets=buckets,
    embedding_dim=16,
    hidden=(512,) * 4,
    ranks=(128,) * 4,
  )
  config.data = dict(
    name='criteo',
    data_dir='',
    # Examples are in the order of time; 6/7 of them are 85.7 %.
    train_split='train[:84%]',
    valid_split='train[84%:86%]',
    test_split='train[86%:]',
    batch_size=_BATCH_SIZE,
    valid_batch_size=_BATCH_SIZE,
    test_batch_size=_BATCH_SIZE,
    buckets=buckets,
    max_bad_lines=0,
  )
  steps, log_every, checkpoint_every = _STEPS, 50, 500
  if arg.smoke:
    steps, log_every, checkpoint_every = 60, 5, 20
    config.model.update(buckets=64, hidden=(32,) * 4, ranks=(8,) * 4)
    config.data = dict(
      name='synthetic_criteo',
      data_dir='',
      train_split='train[:80%]',
      valid_split='train[80%:]',
      test_split='test',
      batch_size=128,
      valid_batch_size=128,
      test_batch_size=128,
      buckets=64,
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
  widths = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
  config.sizes = dict(
    widths=widths if arg.nas and not arg.arch else (),
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
    arg.preset, steps, arg.gamma, sizes=arg.nas, usual_gamma=-0.1
  )
  config.search.update(quality='auc')
  config.optimizer = dict(
    name='adamw',
    learning_rate=1e-3,
    schedule='cosine',
    warmup=0.05,
    momentum=0.9,
    weight_decay=0.0,
    ema_decay=0.0,
  )
  config.train = dict(
    dtype='float32',
    steps=steps,
    label_smoothing=0.0,
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
  eight = 'E4M3' if arg.space.startswith('fp') else 'INT8'
  config.references = (eight, 'BF16') if arg.references else ()
  config.init_from = ''
  return config.lock()
