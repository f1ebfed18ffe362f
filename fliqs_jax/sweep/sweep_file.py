r"""Sweep files: each declares many runs.

A sweep file is YAML: data, not code.

  config: configs/digits.py
  arguments:                     # arguments of the config, after its colon
    steps: 600
    seed: [0, 1, 2]
  overrides:                     # values of keys, --config.KEY=VALUE
    quant.act_clip: 3.0
  runs:                          # optional; each adds to the above
  - arguments: {space: [int_s, int_l], target: [1.25, 1.5, 2]}
  - arguments: {space: [INT4, INT8]}

Every list is swept, and each item of `runs` is a separate grid: 2 x 3 x 3 and
2 x 3 runs here. The name of a run consists of the values of all lists, also of
lists with one element; so a seed or a target can be added later without a
change of the other names.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import os
import pathlib
import re
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from fliqs_jax.run.configs import config as config_lib
from fliqs_jax.runtime import commands
from fliqs_jax.runtime import files

# Tells the runs of several sweeps apart.
SWEEP = 'sweep'
_SECTIONS = ('arguments', 'overrides')
# Keys that configs make from the number of steps, and that fit any number.
_OF_LENGTH = ('train.log_every', 'train.checkpoint_every')
_LONGEST_NAME = 200  # File systems allow 255 bytes.


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: name of its workdir in the sweep's directory.
    swept: {argument or dotted key: text} of the values that are lists in the
      file.
    config: the config file and its arguments, as `--config` takes them.
    overrides: {dotted key: text} of the keys that are overridden.
  """

  name: str
  swept: Mapping[str, str]
  config: str
  overrides: Mapping[str, str]

  @property
  def flags(self) -> list[str]:
    """The flags of `fliqs_jax.main` without the workdir."""
    overrides = [f'--config.{k}={v}' for k, v in self.overrides.items()]
    return [f'--config={self.config}', *overrides]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep: its name (the file's) and its runs in the order of the file."""

  name: str
  runs: Sequence[Run]

  @property
  def out(self) -> str:
    """The default directory of the runs."""
    return os.path.join('runs', self.name)


def read(path: str | os.PathLike[str]) -> Sweep:
  """Reads a sweep file and checks the config of every run.

  Args:
    path: path of the file.

  Raises:
    ValueError: the file cannot be read, or a run cannot work; the message names
      file, run and value.
  """
  file = pathlib.Path(path)
  try:
    content = files.read_yaml(file)
  except (OSError, ValueError) as error:
    message = ' '.join(str(error).split())
    raise ValueError(f'sweep {path}: {message}') from None
  return declared(file.stem, content, str(path))


def declared(name: str, content: Any, where: str) -> Sweep:
  """Returns the sweep that the content of a file declares.

  Args:
    name: name of the sweep.
    content: what the YAML holds.
    where: what messages call it.

  Raises:
    ValueError: as of `read`.
  """
  try:
    runs = tuple(_runs(content))
  except ValueError as error:
    raise ValueError(f'sweep {where}: {error}') from None
  names: dict[str, Run] = {}
  for run in runs:
    if run.name in names:
      raise ValueError(
        f'sweep {where}: two runs are called {run.name!r}; write what they '
        'differ in as a list, [value], so that it becomes part of the name'
      )
    names[run.name] = run
    try:
      config(run)
    except ValueError as error:
      raise ValueError(f'sweep {where}, run {run.name!r}: {error}') from None
  return Sweep(name, runs)


def joined(sweeps: Sequence[Sweep]) -> Sweep:
  """Returns several sweeps as one, each in a directory of its own name.

  Args:
    sweeps: the sweeps, at least one; a single one is returned as it is.

  Raises:
    ValueError: two have the same name.
  """
  if len(sweeps) == 1:
    return sweeps[0]
  names = [sweep.name for sweep in sweeps]
  if len(set(names)) < len(names):
    raise ValueError(f'two sweeps have the same name: {", ".join(names)}')
  runs = [
    dataclasses.replace(
      run,
      name=f'{sweep.name}/{run.name}',
      swept={SWEEP: sweep.name, **run.swept},
    )
    for sweep in sweeps
    for run in sweep.runs
  ]
  return Sweep('sweeps', runs)


def config(run: Run) -> dict[str, Any]:
  """Returns the content of a run's config; raises as `load` does."""
  return load(run).to_dict()


def load(run: Run) -> ml_collections.ConfigDict:
  """Returns a run's config, made and checked as in the run itself.

  Raises:
    ValueError: the file, an argument or a key does not exist, or a value is not
      allowed.
  """
  file = run.config.partition(':')[0]
  if not pathlib.Path(file).is_file():
    raise ValueError(
      f'there is no config file {file!r}; name one of configs/ or your own'
    )
  made = _made(run.flags)
  config_lib.check(made)
  check_overrides(run.config, run.overrides)
  return made


def overrides(flags_: Sequence[str]) -> dict[str, str]:
  """Returns {dotted key: text} of flags --config.KEY=VALUE.

  Args:
    flags_: arguments of a command that are no flags of its own.

  Raises:
    ValueError: one of them is another flag.
  """
  result = {}
  for flag in flags_:
    key, equals, value = flag.partition('=')
    if not key.startswith('--config.') or not equals:
      raise ValueError(
        f'unknown flag {flag!r}; keys of the config are set by '
        '--config.KEY=VALUE'
      )
    result[key.removeprefix('--config.')] = value
  return result


def check_overrides(config: str, overrides: Mapping[str, Any]) -> None:
  """Checks that no value stays that was made from one that is overridden.

  An argument of a config file may set several keys: `preset=paper` sets all of
  `search`, and `steps=9` the learning rate, too. An override of one of them
  would leave the others.

  Args:
    config: the config file and its arguments, as `--config` takes them.
    overrides: {dotted key: value} of the keys that are overridden.

  Raises:
    ValueError: the message names the keys, and the argument to use.
  """
  file, _, arguments = config.partition(':')
  plain = _made([f'--config={config}']).to_dict()
  for key, value in overrides.items():
    name = key.rpartition('.')[2]
    kept = [a for a in arguments.split(',') if a.partition('=')[0] != name]
    argument = f'{name}={value}'
    try:
      other = _made([f'--config={file}:{",".join([*kept, argument])}'])
    except ValueError:
      continue  # The file has no such argument.
    lines = config_lib.differences_in_training(plain, other.to_dict())
    left = [line.partition(':')[0] for line in lines]
    left = [k for k in left if k not in {*overrides, *_OF_LENGTH}]
    if left:
      raise ValueError(
        f'--config.{key}={value} changes this key alone and leaves '
        f'{", ".join(left)} as made for another value: give it as an argument, '
        f'--config={file}:{argument}, or override these keys, too'
      )


def _made(arguments: Sequence[str]) -> ml_collections.ConfigDict:
  """Returns the config that the flags of `fliqs_jax.main` give, unchecked."""
  # The parser of `fliqs_jax.main`, so that both accept the same flags.
  values, argv = flags.FlagValues(), ['sweep', *arguments]
  holder = config_flags.DEFINE_config_file(
    'config', flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
    return commands.loaded(holder.value)
  except Exception as error:  # Loading a file as Python raises any.
    raise ValueError(commands.no_config(error, ' '.join(arguments))) from None


def _runs(content: Any) -> Iterator[Run]:
  if not isinstance(content, dict) or not isinstance(
    content.get('config'), str
  ):
    raise ValueError('must be a mapping with `config: FILE`')
  _only(content, 'a sweep', 'config', *_SECTIONS, 'runs')
  shared = {name: _section(content, name) for name in _SECTIONS}
  blocks = content.get('runs', [{}])
  if not isinstance(blocks, list) or not blocks:
    raise ValueError('`runs` must be a list of at least one mapping')
  for block in blocks:
    if not isinstance(block, dict):
      raise ValueError(f'an item of `runs` must be a mapping, not {block!r}')
    _only(block, 'an item of `runs`', *_SECTIONS)
    sections = {k: {**shared[k], **_section(block, k)} for k in _SECTIONS}
    yield from _grid(content['config'], sections)


def _only(mapping: Mapping[str, Any], what: str, *allowed: str) -> None:
  for key in mapping:
    if key not in allowed:
      raise ValueError(
        f'unknown key {key!r} of {what}; allowed: {", ".join(allowed)}'
      )


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
  section = content.get(name, {})
  if not isinstance(section, dict):
    raise ValueError(f'`{name}` must be a mapping')
  for key, value in section.items():
    if not isinstance(key, str):
      raise ValueError(f'{name}: {key!r} must be a name')
    if isinstance(value, list) and not value:
      raise ValueError(
        f'{name}.{key} is an empty list, which gives no run; name at least one '
        'value'
      )
  return section


def _grid(file: str, sections: Mapping[str, Mapping[str, Any]]):
  """Yields every combination; the last list of the file varies fastest."""
  keys = [(s, key) for s in _SECTIONS for key in sections[s]]
  lists = [
    v if isinstance(v := sections[s][key], list) else [v] for s, key in keys
  ]
  for values in itertools.product(*lists):
    texts = {
      (s, key): _text(f'{s}.{key}', value)
      for (s, key), value in zip(keys, values)
    }
    swept = {
      key: texts[s, key]
      for s, key in keys
      if isinstance(sections[s][key], list)
    }
    arguments = [
      f'{key}={text}' for (s, key), text in texts.items() if s == 'arguments'
    ]
    for argument in arguments:
      if ',' in argument:
        raise ValueError(
          f'{argument!r} holds a comma, which separates arguments; use '
          '`overrides`'
        )
    yield Run(
      name=_name(swept),
      swept=swept,
      config=f'{file}:{",".join(arguments)}' if arguments else file,
      overrides={
        key: text for (s, key), text in texts.items() if s == 'overrides'
      },
    )


def _text(where: str, value: Any) -> str:
  if not isinstance(value, (str, int, float)):
    raise ValueError(
      f'{where}: {value!r} must be a text, a number, true, false, or a list of '
      'these'
    )
  return str(value).lower() if isinstance(value, bool) else str(value)


def _name(swept: Mapping[str, str]) -> str:
  name = ','.join(f'{key}={text}' for key, text in swept.items()) or 'run'
  # A path in a value must not create directories.
  name = re.sub(r'[^\w=,.+-]', '_', name)
  if len(name) > _LONGEST_NAME:
    raise ValueError(
      f'the name {name!r} has over {_LONGEST_NAME} characters; write only '
      'those values as lists in which the runs differ'
    )
  return name
