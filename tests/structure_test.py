"""The house stands: imports go down, heavy libraries stay in their room."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

_PACKAGE = pathlib.Path(__file__).parents[1] / 'fliqs_jax'

# From the ground up: a folder imports from itself and from earlier rows only.
FLOORS = (
  ('numerics', 'runtime'),
  ('data', 'space'),
  ('layers',),
  ('models', 'program', 'tasks'),
  ('search',),
  ('serving', 'report'),
  ('run',),
  ('sweep',),
  ('comparison',),
  ('analyses',),
)

# The files in which a heavy library may be imported: one each, but TFDS, of
# which `digits` is a builder and `tfds_records` a reader.
ROOMS = {
  'orbax': ('runtime/array_files.py',),
  'clu': ('run/records/metrics.py',),
  'tensorboardX': ('run/records/metrics.py',),
  'tensorflow_datasets': (
    'data/sources/digits.py',
    'data/sources/tfds_records.py',
  ),
  'sklearn': ('data/sources/digits.py',),
  'grain': ('data/pipeline.py',),
  'tensorflow': ('data/convert.py',),
  'safetensors': ('serving/export_files.py',),
  'qwix': (),
  'yaml': ('runtime/files.py',),
  'aqt': ('serving/aqt_configs.py',),
  'chex': (),
  'jax2onnx': ('serving/portable/onnx_model.py',),
  'onnx': (),
  'onnxruntime': ('serving/portable/onnx_runtime.py',),
}


def _files():
  return sorted(_PACKAGE.rglob('*.py'))


def _imports(path):
  """Yields every module that a file imports, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def test_imports_only_go_down_and_in_no_circle():
  floor_of = {name: i for i, row in enumerate(FLOORS) for name in row}
  graph = {}
  for path in _files():
    own = ('fliqs_jax', *path.relative_to(_PACKAGE).with_suffix('').parts)
    if own[1:] == ('__init__',):
      continue  # The public names: above all.
    for name in _imports(path):
      parts = tuple(name.split('.'))
      if parts[0] == 'fliqs_jax' and parts[1] == own[1]:
        graph.setdefault(own, set()).add(parts)
      elif parts[0] == 'fliqs_jax':
        # Commands, the files at the top, stand above all folders; `ptq` is
        # `main` with another config.
        floor = floor_of.get(own[1], len(FLOORS) + (own[1] == 'ptq'))
        assert floor_of.get(parts[1], len(FLOORS)) < floor, (path, name)
  graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.


def test_no_folder_is_crowded():
  for folder in _PACKAGE.rglob('*/'):
    modules = [p for p in folder.glob('*.py') if p.stem[0] != '_']
    assert len(modules) <= 12, folder


def test_each_heavy_library_is_imported_in_one_file():
  for path in _files():
    where = str(path.relative_to(_PACKAGE))
    for name in _imports(path):
      rooms = ROOMS.get(name.split('.')[0], (where,))
      assert where in rooms, f'{where} imports {name}'


def test_module_docstrings_begin_with_a_noun_or_a_verb():
  questions = {'What', 'How', 'Where', 'Which', 'Who', 'When', 'Why'}
  for path in _files():
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text.split()[0] not in questions, path


def test_no_file_reads_a_config_with_a_default():
  for path in _files():
    assert 'config.get(' not in path.read_text(), path.name


@pytest.mark.parametrize('module', ['fliqs_jax', 'fliqs_jax.cost'])
def test_importing_stays_light(module):
  code = (
    f'import sys, {module}\n'
    'heavy = ("tensorflow", "tensorflow_datasets", "clu", "orbax", "grain", '
    '"matplotlib", "tensorboardX", "sklearn", "flax.nnx")\n'
    'print([name for name in heavy if name in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_files_have_the_same_text_in_every_locale():
  for path in _PACKAGE.rglob('*.py'):
    for call in re.findall(r'(?:read|write)_text\([^\n]*', path.read_text()):
      assert 'utf-8' in call, f'{path}: {call}'
