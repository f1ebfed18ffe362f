"""All tests: warnings are errors, no implicit rank promotion, 8 devices.

Runs use one of them; a test that wants all says `jax.default_device(None)`.
Programs are compiled once for all tests of a worker and the runs they start:
compiling is most of what tests do. Those that compile most are marked `slow`;
docs/testing.md says when to run which.
"""

import atexit
import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix='compiled')
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE  # Before jax is imported.

import jax  # noqa: E402

# The files that take longest, first: no worker shall end alone with one.
_LONG = (
  'recipes_test',
  'compare_test',
  'processes_test',
  'examples_test',
  'devices_test',
  'export_intercepted_test',
  'scanned_test',
  'models_test',
  'benchmarks_test',
  'train_test',
  'quant_layers_test',
  'searchable_test',
  'served_layers_test',
  'slicing_test',
  'open_layers_test',
  'checkpoint_test',
  'found_networks_test',
  'export_test',
  'report_sizes_test',
  'published_costs_test',
)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_device', jax.devices()[0])


def pytest_collection_modifyitems(items):
  """Sorts tests by file; xdist hands files out in this order."""

  def place(item):
    name = item.path.stem
    return _LONG.index(name) if name in _LONG else len(_LONG)

  items.sort(key=place)
