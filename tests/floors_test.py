"""The house stands: imports go down, heavy libraries stay in their room."""

import ast
import pathlib
import subprocess
import sys

import pytest

_PACKAGE = pathlib.Path(__file__).parents[1] / 'fliqs_jax'

# From the ground up; a module may import from floors below its own only.
FLOORS = (
  (
    'formats',
    'files',
    'config_lib',
    'schedules',
    'policy',
    'optimizers',
    'sizes',
    'replicas',
    'processes',
  ),
  (
    'clipping',
    'quantize',
    'linear',
    'packing',
    'cost_model',
    'controller',
    'metrics',
    'sweep_file',
    'pareto',
    'parallel',
    'watch',
  ),
  (
    'live',
    'quant_spec',
    'integer',
    'fingerprint',
    'classification',
    'click_through',
    'augment',
    'data',
  ),
  ('operands', 'decisions'),
  ('layers', 'search_space', 'checkpoint'),
  (
    'models',
    'train_state',
    'profile',
    'carried',
    'unhooked',
    'served_layers',
  ),
  ('train_step', 'cost', 'repeats', 'stored', 'linen_calls', 'stacks'),
  ('intercept', 'artifact', 'stablehlo', 'qwix_rules', 'served_model'),
  ('found', 'serving'),
  ('experiment', 'model_export'),
  ('results', 'finished_run', 'spelling'),
  ('evaluate', 'pictures'),
  (
    'architecture_picture',
    'policy_picture',
    'allocation_picture',
    'report_tables',
    'sweep_picture',
  ),
  ('report_page',),
  ('report', 'sweep_page', 'journal'),
  ('loop',),
  ('train',),
  ('main', 'slicing', 'sweep'),
  ('export',),
)

# The files in which a heavy library may be imported: one each, but TFDS, of
# which `digits` is a builder and `tfds_records` a reader.
ROOMS = {
  'orbax': ('checkpoint.py',),
  'clu': ('metrics.py',),
  'tensorboardX': ('metrics.py',),
  'tensorflow_datasets': ('data/digits.py', 'data/tfds_records.py'),
  'sklearn': ('data/digits.py',),
  'grain': ('data/pipeline.py',),
  'tensorflow': ('data/convert.py',),
  'safetensors': ('artifact.py',),
  'qwix': (),
  'yaml': ('sweep_file.py',),
  'aqt': (),
  'chex': (),
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


def _floor(module):
  for floor, modules in enumerate(FLOORS):
    if module in modules:
      return floor
  raise AssertionError(f'{module} stands on no floor: add it to FLOORS')


def test_imports_only_go_down():
  for path in _files():
    own = path.relative_to(_PACKAGE).with_suffix('').parts[0]
    if own == '__init__':
      continue  # The roof.
    for name in _imports(path):
      parts = name.split('.')
      if parts[0] != 'fliqs_jax' or parts[1] == own:
        continue
      assert _floor(parts[1]) < _floor(own), f'{path.name} imports {name}'


def test_each_heavy_library_is_imported_in_one_file():
  for path in _files():
    where = str(path.relative_to(_PACKAGE))
    for name in _imports(path):
      rooms = ROOMS.get(name.split('.')[0], (where,))
      assert where in rooms, f'{where} imports {name}'


def test_no_file_reads_a_config_with_a_default():
  for path in _files():
    assert 'config.get(' not in path.read_text(), path.name


@pytest.mark.parametrize('module', ['fliqs_jax', 'fliqs_jax.cost'])
def test_importing_stays_light(module):
  code = (
    f'import sys, {module}\n'
    'heavy = ("tensorflow", "tensorflow_datasets", "clu", "orbax", "grain", '
    '"matplotlib", "tensorboardX", "sklearn")\n'
    'print([name for name in heavy if name in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'
