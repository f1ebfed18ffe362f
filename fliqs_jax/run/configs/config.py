"""Keys of a config: which there are, and which values are allowed."""

from collections.abc import Callable, Mapping
import json
import math
import numbers
import os
import pathlib
import sys
from typing import Any

import ml_collections

from fliqs_jax.runtime import files
from fliqs_jax.runtime import workdir as workdir_lib


def _number(
  least: float, most: float = math.inf, kind=numbers.Real
) -> Callable:
  noun = 'a whole number' if kind is numbers.Integral else 'a number'
  ends = f'>= {least}' if most == math.inf else f'from {least} to {most}'
  ends = 'that is finite' if least == -math.inf else ends

  def problem(value):
    if isinstance(value, bool) or not isinstance(value, kind):
      return f'must be {noun} {ends}'
    # Neither NaN nor infinity, nor a whole number that no float holds.
    if least <= value <= most and abs(value) <= sys.float_info.max:
      return None
    return f'must be {noun} {ends}'

  return problem


def _count(least: int, most: int = 2**31 - 1) -> Callable:
  # Devices count in 32 bits.
  return _number(least, most, kind=numbers.Integral)


def _of_type(*kinds: type) -> Callable:
  def problem(value):
    if isinstance(value, kinds):
      return None
    return f'must be of type {" or ".join(k.__name__ for k in kinds)}'

  return problem


def _section(value: Any) -> str | None:
  return None if isinstance(value, Mapping) else 'must be a section of keys'


def _list_of(what: str, item: Callable) -> Callable:
  def problem(value):
    is_list = isinstance(value, (tuple, list))
    if is_list and all(item(one) is None for one in value):
      return None
    return f'must be a list of {what}'

  return problem


def _pair(first: Callable, second: Callable) -> Callable:
  def problem(value):
    if isinstance(value, (tuple, list)) and len(value) == 2:
      return first(value[0]) or second(value[1])
    return 'must be a pair'

  return problem


def _either(one: Callable, other: Callable) -> Callable:
  def problem(value):
    problems = one(value), other(value)
    if None in problems:
      return None
    return ' or '.join(problems).replace(' or must', ' or')

  return problem


_FINITE = _number(-math.inf)
_TEXT = _of_type(str)
_FORMATS = _either(_TEXT, _list_of('names of formats', _TEXT))


def _one_of(*allowed: str) -> Callable:
  def problem(value):
    return None if value in allowed else f'must be one of {", ".join(allowed)}'

  return problem


# Every key of a config. The keys of `model` are the fields of its network, and
# those of `data` depend on the data set: both are checked where they are used.
SCHEMA: dict[str, Any] = {
  # More bits would be dropped, and two seeds be one.
  'seed': _count(0, 2**32 - 1),
  'task': _TEXT,
  'model': _section,
  'data': _section,
  'quant': {
    'formats': _FORMATS,
    'mode': _TEXT,
    'exclude': _list_of('patterns of layers', _TEXT),
    'menus': _list_of('pairs (pattern, formats)', _pair(_TEXT, _FORMATS)),
    'groups': _list_of('pairs (name, pattern)', _pair(_TEXT, _TEXT)),
    'strategies': _list_of('names of strategies', _TEXT),
    'weight_clip': _either(_TEXT, _FINITE),
    'act_clip': _either(_TEXT, _FINITE),
    'act_threshold': _TEXT,
    'act_start': _number(0, 1),
    'arch': _TEXT,
  },
  'sizes': {
    'widths': _list_of('finite numbers', _FINITE),
    'kernels': _list_of('whole numbers', _count(1)),
    'kernel_weights': _TEXT,
  },
  'cost': {
    'kind': _TEXT,
    'target': _number(0),
    'relative_to': _TEXT,
    'bound': _TEXT,
    'reported': _list_of('kinds of costs', _TEXT),
    'caps': _list_of('limits KIND=NUMBER or KIND=NUMBERxFORMAT', _TEXT),
  },
  'search': {
    'preset': _TEXT,
    'start': _number(0, 1),
    'freeze': _number(0, 1),
    'gamma': _FINITE,
    'quality': _TEXT,
    'learning_rate': _number(0),
    'entropy_schedule': _TEXT,
    'entropy_beta': _FINITE,
    'scores': _TEXT,
    'scorings': _count(0),
  },
  'optimizer': {
    'name': _TEXT,
    'learning_rate': _number(0),
    'schedule': _TEXT,
    'warmup': _number(0, 1),
    'momentum': _number(0, 1),
    'weight_decay': _number(0),
    'ema_decay': _number(0, 1),
  },
  'train': {
    'dtype': _one_of('float32', 'bfloat16'),
    'steps': _count(1),
    'label_smoothing': _number(0, 1),
    'mixup': _number(0),
    'cutmix': _number(0),
    'max_loss': _number(0),
    'log_every': _count(1),
    'checkpoint_every': _count(1),
    'checkpoints_kept': _count(1),
    'settle_batches': _count(0),
    'frozen': _of_type(bool),
    'teacher': _of_type(bool),
  },
  'parallel': {
    'mode': _TEXT,
    'shard_params': _of_type(bool),
    'accumulate': _count(1),
    'leave_one_out': _of_type(bool),
  },
  'references': _list_of('names of formats', _TEXT),
  'init_from': _TEXT,
}


# Keys that configs of 0.2.0 lack, and the values that mean what they did.
_ADDED = {
  'cost': {'bound': 'near', 'caps': (), 'reported': ()},
  'search': {'scores': '', 'scorings': 0},
  'quant': {'act_threshold': 'deviation', 'strategies': ()},
  'train': {'dtype': 'float32', 'frozen': False, 'teacher': False},
}

# Keys on which the training of the network does not depend.
FREE = {
  'cost.reported',
  'data.data_dir',
  'references',
  'train.checkpoint_every',
  'train.checkpoints_kept',
  'train.max_loss',
}
# Keys that say where other files are, on another machine perhaps elsewhere. Of
# the one that `quant.arch` names, the formats are compared.
_PLACES = ('quant.arch:', 'init_from:')


def _completed(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the content of a config.json with the keys added since."""
  known = {'init_from': '', **content}
  for section, added in _ADDED.items():
    if isinstance(known.get(section), Mapping):
      known[section] = {**added, **known[section]}
  return json.loads(json.dumps(known))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the content of a config.json, with the keys added since.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged.
  """
  try:
    content = files.read_json(path)
    if not isinstance(content, dict):
      kind = type(content).__name__
      raise ValueError(f'{path} is damaged: it holds {kind}, not an object')
    return _completed(content)
  except ValueError as error:
    raise ValueError(
      f'{error}. Delete it and start the run with its own command again, which '
      'writes it anew and trains nothing twice'
    ) from None


def claimed(
  workdir: str | os.PathLike[str], content: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Returns the content of the config.json of a workdir; None: it has none.

  Args:
    workdir: path of the workdir.
    content: the config of the run that shall use it, as JSON values.

  Raises:
    ValueError: the workdir is that of a run of another config, or damaged.
  """
  try:
    found = read(pathlib.Path(workdir, workdir_lib.CONFIG))
  except FileNotFoundError:
    return None
  if lines := differences_in_training(found, content):
    raise ValueError(
      f'--workdir={workdir} belongs to a run of another config, which '
      f'differs in {"; ".join(lines)}; choose another workdir or the same '
      'config'
    )
  return found


def check(config: ml_collections.ConfigDict) -> None:
  """Checks that a config has exactly the known keys, with possible values.

  Raises:
    ValueError: the message names every unknown key, missing key and impossible
      value.
  """
  problems = _problems(config.to_dict(), SCHEMA, '')
  if not problems:
    every, log_every = config.train.checkpoint_every, config.train.log_every
    if every % log_every:
      problems.append(
        f'train.checkpoint_every={every} must be a multiple of '
        f'train.log_every={log_every}: a checkpoint is saved only after the '
        'metrics were checked for NaN'
      )
  if problems:
    raise ValueError('the config cannot work: ' + '; '.join(problems))


def _problems(config: Mapping, schema: Mapping, prefix: str) -> list[str]:
  problems = []
  for key in sorted(set(config) - set(schema)):
    problems.append(
      f'unknown key {prefix}{key} (allowed here: {", ".join(schema)})'
    )
  for key, expected in schema.items():
    name = prefix + key
    if key not in config:
      problems.append(f'missing key {name}')
    elif isinstance(expected, dict):
      if isinstance(config[key], Mapping):
        problems += _problems(config[key], expected, f'{name}.')
      else:
        problems.append(f'{name} must be a section of keys')
    elif problem := expected(config[key]):
      problems.append(f'{name}={config[key]!r} {problem}')
  return problems


def differences(old: Mapping, new: Mapping, prefix: str = '') -> list[str]:
  """Returns `key: old -> new` for every key in which two configs differ."""
  lines = []
  for key in sorted(set(old) | set(new)):
    name, a, b = prefix + key, old.get(key), new.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f'{name}.')
    elif a != b:
      lines.append(f'{name}: {a!r} -> {b!r}')
  return lines


def differences_in_training(old: Mapping, new: Mapping) -> list[str]:
  """Returns the `differences` of which a trained network depends on the key."""
  return [
    line for line in differences(old, new) if line.split(':')[0] not in FREE
  ]


def binding(
  config: ml_collections.ConfigDict,
  assigned: Mapping[str, Any],
  chips: Mapping[str, str],
) -> dict[str, Any]:
  """Returns what the checkpoints of a run are bound to, as JSON values.

  Args:
    config: config of the run.
    assigned: {layer: names of its formats}, if `quant.arch` gives them.
    chips: {kind of cost: hash of the file of its chip}.
  """
  content = dict(
    config=config.to_dict(), assigned=dict(assigned), chips=dict(chips)
  )
  return json.loads(json.dumps(content))


def check_binding(
  own: Mapping[str, Any], extra: Mapping[str, Any], workdir: str
) -> None:
  """Checks that a checkpoint was saved by a run of this config.

  A config.json may be edited or lost, so its content is in checkpoints, too.

  Args:
    own: `binding` of the run that shall use the checkpoint.
    extra: what was saved beside the state; 0.2.0 saved no binding.
    workdir: path of the workdir, for the message.

  Raises:
    ValueError: the run had another config; the message names the keys.
  """
  if 'binding' not in extra:
    return
  saved = extra['binding']
  # A later version has more keys.
  saved = {'chips': {}, **saved, 'config': _completed(saved['config'])}
  lines = [
    line
    for line in differences_in_training(saved['config'], own['config'])
    if not line.startswith(_PLACES)
  ]
  lines += differences(saved['assigned'], own['assigned'])
  lines += differences(saved['chips'], own['chips'], 'the file of ')
  if lines:
    raise ValueError(
      f'the checkpoints in {workdir} belong to a run of another config, which '
      f'differs in {"; ".join(lines)}; use the config of that run, or another '
      'workdir'
    )
