r"""FLIQS search, the recommender of A.13 on Criteo's display advertising data.

python -m fliqs_jax.main --workdir=$DIR --config.data.data_dir=$DATA \
    --config=configs/recommender_criteo.py:space=int_l,target=2

DATA holds train.txt of the Kaggle challenge (45,840,617 lines). The paper
draws AUC against MBOPs (Figure 13) and prints no numbers.

Arguments, beside those of every recipe (docs/configs.md):
  nas: also search the rank and the width of each hidden layer, 0.25 to 2 times
    the published one (A.13).

A.13 describes the data and the layers only. Our choices: one epoch, which is
usual for clicks, where a second one overfits; batch 4096; AdamW without decay
at 1e-3, cosine; the first six of the seven days for training, their end for the
controller (Wang et al. 2020 test on the seventh day, too); quality AUC, with
the gamma of accuracy, -0.1, because both are fractions.
"""

import ml_collections

from fliqs_jax.run.configs import recipe

_BATCH_SIZE = 4096
_STEPS = 45_840_617 * 84 // 100 // _BATCH_SIZE  # One epoch.


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = recipe.parse_arg(
    arg,
    **recipe.ARGUMENTS | dict(space='int_l', target=2.0, preset='default'),
    nas=False,
  )
  widths = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
  config = recipe.base(
    arg,
    steps=_STEPS,
    trial=60,
    widths=widths if arg.nas else (),
    usual_gamma=-0.1,
  )
  buckets = 2**15
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
  config.train.update(log_every=50, checkpoint_every=500)
  if arg.smoke:
    config.train.update(log_every=5, checkpoint_every=20)
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
  config.search.quality = 'auc'
  config.optimizer = dict(
    name='adamw',
    learning_rate=1e-3,
    schedule='cosine',
    warmup=0.05,
    momentum=0.9,
    weight_decay=0.0,
    ema_decay=0.0,
  )
  config.references = config.references[1:]  # Without four bits.
  return config.lock()
