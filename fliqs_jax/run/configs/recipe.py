"""Parts that recipes share: the arguments of a search, and what they set.

A recipe is a config file. It parses its arguments, starts with `base`, and adds
the task, the network, the data, the optimizer and whatever differs.
"""

import types
from typing import Any

import ml_collections

from fliqs_jax.search import presets

# {argument: default} of every recipe; docs/configs.md says what each means.
ARGUMENTS: dict[str, Any] = dict(
  space='int_s',
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
_TRUE, _FALSE = ('true', '1', 'yes'), ('false', '0', 'no')


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
  """Returns a config's arguments; each has the type of its default.

  Args:
    arg: the text after the colon in `--config=FILE:key=value,...`; a key
      without a value is a flag that becomes true.
    **defaults: {argument: default}; those of a recipe are `ARGUMENTS` and its
      own. A type in place of a default declares an argument of that type, which
      is None unless given. A tuple lists the texts that are allowed; the first
      is the default.

  Raises:
    ValueError: an argument is unknown or repeated, or a value has the wrong
      type or is not allowed.
  """
  values = {key: _unless_given(default) for key, default in defaults.items()}
  seen = set()
  for item in filter(None, (arg or '').split(',')):
    key, _, text = item.partition('=')
    key = key.strip()
    if key not in defaults:
      raise ValueError(
        f'unknown config argument {key!r}; allowed: {", ".join(defaults)}'
      )
    if key in seen:
      raise ValueError(f'config argument {key!r} is given twice; give it once')
    seen.add(key)
    values[key] = _convert(
      key, text.strip() if '=' in item else None, defaults[key]
    )
  return types.SimpleNamespace(**values)


def _unless_given(default: Any) -> Any:
  if isinstance(default, type):
    return None
  return default[0] if isinstance(default, tuple) else default


def _convert(key: str, text: str | None, default: Any) -> Any:
  if isinstance(default, bool):
    if text is None or text.lower() in _TRUE:
      return True
    if text.lower() in _FALSE:
      return False
    raise ValueError(f'config argument {key}={text!r} must be true or false')
  if not text:
    raise ValueError(f'config argument {key!r} needs a value: {key}=...')
  if isinstance(default, tuple):
    if text not in default:
      raise ValueError(
        f'config argument {key}={text!r} is unknown; allowed: '
        f'{", ".join(default)}'
      )
    return text
  kind = default if isinstance(default, type) else type(default)
  try:
    return kind(text)
  except ValueError:
    raise ValueError(
      f'config argument {key}={text!r} must be of type {kind.__name__}'
    ) from None


def base(
  arg: Any,
  *,
  steps: int,
  trial: int = 12,
  widths: tuple[float, ...] = (),
  kernels: tuple[int, ...] = (),
  usual_gamma: float | None = None,
) -> ml_collections.ConfigDict:
  """Returns the sections that depend on the arguments alone.

  Args:
    arg: the arguments, with all of `ARGUMENTS`.
    steps: number of steps of training, unless the arguments say it.
    trial: the same of a smoke run.
    widths: multiples of the channels to search among; (): as published.
    kernels: sizes of depthwise kernels to search among, in pixels; (): as
      published.
    usual_gamma: the weight of the cost of presets that read one, if the quality
      is not accuracy; None: the preset's.

  Returns:
    A config without `model`, `data` and `optimizer`. Activations are clipped at
    four standard deviations (Table 4), and quantized after 15 % of training.

  Raises:
    ValueError: the preset is unknown, or does not read the `gamma` given.
  """
  if arg.smoke:
    steps = trial
  if arg.steps is not None:
    steps = arg.steps
  log_every = max(1, steps // 40)
  is_paper, has_floats = arg.preset == 'paper', arg.space.startswith('fp')
  uniform = ('E2M1', 'E4M3') if has_floats else ('INT4', 'INT8')
  return ml_collections.ConfigDict(
    dict(
      seed=arg.seed,
      task='classification',
      init_from='',
      references=(*uniform, 'BF16') if arg.references else (),
      quant=dict(
        formats=arg.space,
        mode=arg.mode,
        exclude=(),
        menus=(),
        groups=(),
        strategies=_joined(arg.strategies),
        weight_clip='absmax',
        act_clip='4',  # A number as text, so that a name may replace it.
        act_threshold='deviation' if is_paper else 'magnitude',
        act_start=0.15,
        arch=arg.arch,
      ),
      sizes=dict(  # An arch.json has fixed them.
        widths=() if arg.arch else widths,
        kernels=() if arg.arch else kernels,
        kernel_weights='branches',
      ),
      cost=dict(
        kind=arg.cost,
        target=arg.target,
        relative_to='INT4',
        bound='near' if is_paper else 'at_most',
        caps=_joined(arg.caps),
        reported=_joined(arg.reported),
      ),
      search=presets.search_keys(
        arg.preset,
        steps,
        arg.gamma,
        sizes=bool(widths or kernels),
        usual_gamma=usual_gamma,
      ),
      train=dict(
        dtype='float32',
        steps=steps,
        label_smoothing=0.0,
        mixup=0.0,
        cutmix=0.0,
        max_loss=100.0,
        log_every=log_every,
        checkpoint_every=10 * log_every,
        checkpoints_kept=2,
        settle_batches=3 if arg.smoke else 20,
        frozen=False,
        teacher=False,
      ),
      parallel=dict(
        mode='pjit', shard_params=False, accumulate=1, leave_one_out=False
      ),
    )
  )


def _joined(text: str) -> tuple[str, ...]:
  """Returns the items of a text that joins them by a +."""
  return tuple(filter(None, text.split('+')))


def synthetic_images(pixels: int, batch: int) -> dict[str, Any]:
  """Returns the section `data` of a smoke run: images of ten classes.

  Args:
    pixels: height and width of the images.
    batch: number of images in each batch.
  """
  return dict(
    name='synthetic',
    data_dir='',
    train_split='train[:80%]',
    valid_split='train[80%:]',
    test_split='test',
    batch_size=batch,
    valid_batch_size=batch,
    test_batch_size=batch,
    image_size=pixels,
    num_classes=10,
  )
