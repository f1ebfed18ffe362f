"""WORKSPACE.md is true: each name of this project in it exists."""

import ast
import collections
import importlib.util
import pathlib
import re

import pytest

from fliqs_jax.run.configs import config

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = _ROOT / 'fliqs_jax'
_MAP = (_ROOT / 'WORKSPACE.md').read_text()
_FILES = [
  path
  for folder in ('fliqs_jax', 'launch', 'configs', 'tests', 'examples')
  for path in sorted((_ROOT / folder).rglob('*.py'))
  if path != pathlib.Path(__file__)
]
_SPANS = sorted(set(re.findall(r'`([^`]+)`', _MAP)))
_NAMES = [span for span in _SPANS if re.fullmatch(r'[A-Za-z_][\w./]*', span)]


def _modules():
  """Returns {name of a module or folder: the modules that have it}."""
  modules = {'fliqs_jax': ['fliqs_jax']}
  for path in sorted(_PACKAGE.rglob('*.py')):
    parts = path.relative_to(_ROOT).with_suffix('').parts
    parts = parts[:-1] if parts[-1] == '__init__' else parts
    if parts[-1] != '__main__' and len(parts) > 1:
      modules.setdefault(parts[-1], []).append('.'.join(parts))
  return modules


def _words():
  """Returns the names and the one-word strings of the project's code."""
  words = {'fliqs_jax'}
  for path in _FILES:
    words |= set(path.relative_to(_ROOT).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text())):
      for field in ('id', 'attr', 'arg', 'name', 'module', 'value'):
        text = getattr(node, field, None)
        if isinstance(text, str) and ' ' not in text:
          words |= set(re.findall(r'\w+', text))
  return words


def _has(owner, names):
  """Whether an object has an attribute, or a field without a default."""
  for name in names:
    fields = getattr(owner, '__annotations__', {})
    if not hasattr(owner, name):
      return name in fields
    owner = getattr(owner, name)
  return True


_MODULES, _WORDS = _modules(), _words()
_CLASSES = collections.defaultdict(list)
for _path in _PACKAGE.rglob('*.py'):
  for _node in ast.parse(_path.read_text()).body:
    if isinstance(_node, ast.ClassDef):
      _parts = _path.relative_to(_ROOT).with_suffix('').parts
      _CLASSES[_node.name].append('.'.join(_parts))


def _exists(name):
  """Whether a path, a config key, a module's name or a word of code exists."""
  module = _ROOT / f'{name.replace(".", "/")}.py'
  places = (module, _ROOT / name, _PACKAGE / name, _PACKAGE / f'{name}.py')
  if any(place.exists() for place in places):
    return True
  first, *rest = name.split('.')
  if '/' not in name and not rest:
    return first in _WORDS
  owners = [importlib.import_module(m) for m in _MODULES.get(first, ())]
  owners += [
    getattr(importlib.import_module(m), first) for m in _CLASSES[first]
  ]
  keys = config.SCHEMA.get(first)
  if owners or isinstance(keys, dict):
    is_key = isinstance(keys, dict) and rest[0] in keys
    return is_key or any(_has(owner, rest) for owner in owners)
  return '/' not in name and all(word in _WORDS for word in (first, *rest))


@pytest.mark.parametrize('name', _NAMES)
def test_each_name_in_backticks_exists(name):
  assert _exists(name), f'WORKSPACE.md names {name}, which is not there'


@pytest.mark.parametrize(
  'name',
  [
    'space/live.py',
    'quant.precision',
    'linear_ops',
    'train._claims',
    'fliqs_jax.config_lib',
    'SearchSpace.leafs',
  ],
)
def test_a_name_that_is_not_there_is_noticed(name):
  assert not _exists(name)


def test_each_command_in_backticks_exists():
  commands = re.findall(r'python -m ([\w.]+)', _MAP)
  assert commands
  for command in commands:
    assert importlib.util.find_spec(command), command


def test_the_table_of_floors_names_every_module():
  rows = re.findall(
    r'^\| \d+ \| `?([\w/]+)`? \|.*\| (.*) \|$', _MAP, re.MULTILINE
  )
  named = {folder: re.findall(r'`(\w+)`', modules) for folder, modules in rows}
  for folder in (_PACKAGE, *_PACKAGE.rglob('*/')):
    modules = [p.stem for p in folder.glob('*.py') if p.stem[0] != '_']
    if modules:
      place = folder.relative_to(_PACKAGE)
      row = 'commands' if folder == _PACKAGE else place.as_posix()
      assert sorted(named[row]) == sorted(modules), row
