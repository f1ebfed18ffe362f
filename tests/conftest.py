"""All tests: warnings are errors, no implicit rank promotion, 8 devices.

Runs use one of them; a test that wants all says `jax.default_device(None)`.

Compiling is most of what tests do. So programs are compiled fast and run slow,
those of started processes, too; a test marked `optimized` compiles as users do.
Programs are compiled once for all workers and the processes they start.
Tests that compile most are marked `slow`; docs/testing.md says when to run
which.
"""

import atexit
import gc
import os
import shutil
import tempfile

if 'PYTEST_XDIST_WORKER' not in os.environ:  # Workers inherit the directory.
  _CACHE = tempfile.mkdtemp(prefix='compiled')
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE  # Before jax is imported.
# Small programs, too: all processes compile the same ones again and again.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['XLA_FLAGS'] = ''

if hasattr(os, 'sched_setaffinity'):  # Linux has it.
  # A worker for each core has it alone: threads that move cost a twelfth.
  _CORES = sorted(os.sched_getaffinity(0))
  if os.environ.get('PYTEST_XDIST_WORKER_COUNT') == str(len(_CORES)):
    _WORKER = int(os.environ['PYTEST_XDIST_WORKER'].removeprefix('gw'))
    os.sched_setaffinity(0, {_CORES[_WORKER]})

import jax  # noqa: E402
from jax._src import compiler  # noqa: E402
from matplotlib import figure as figure_lib  # noqa: E402
import pytest  # noqa: E402

from fliqs_jax.report import figures  # noqa: E402
from tests import helpers  # noqa: E402

# The files that take longest, first: no worker shall end alone with one.
_LONG = (
  'recipes_test',
  'processes_test',
  'export_model_test',
  'train_test',
  'served_products_test',
  'slicing_test',
  'foreign_test',
  'searchable_test',
  'examples_test',
  'found_networks_test',
  'compare_test',
  'benchmarks_test',
  'quant_layers_test',
  'onnx_test',
  'devices_test',
  'models_test',
  'published_costs_test',
  'float_ops_test',
  'checkpoint_test',
  'workdir_test',
  'dtype_test',
  'export_test',
  'frozen_test',
  'report_test',
  'quantize_test',
  'aqt_test',
  'open_layers_test',
  'scanned_test',
  'relaxed_layers_test',
)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_device', jax.devices()[0])
# For the processes that tests start; the devices of this one exist.
os.environ['XLA_FLAGS'] = ' '.join(
  f'--{name}={str(value).lower()}' for name, value in helpers.FAST.items()
)


_optimized_options = compiler.get_compile_options


def _fast_options(*args, env_options_overrides, **kwargs):
  options = helpers.FAST | env_options_overrides
  return _optimized_options(*args, env_options_overrides=options, **kwargs)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Chooses how programs are compiled; JAX has no public way to do so."""
  optimized = item.get_closest_marker('optimized')
  options = _optimized_options if optimized else _fast_options
  if compiler.get_compile_options is not options:
    jax.clear_caches()  # Of programs that are compiled in the other way.
    compiler.get_compile_options = options


def pytest_collection_finish():
  """Collects garbage seldom: while JAX traces, that is a sixth of the time."""
  gc.freeze()
  gc.set_threshold(200_000)


def pytest_collection_modifyitems(items):
  """Sorts tests by file; xdist hands files out in this order.

  In a file, those that are `optimized` come first: so a fixture that they share
  with others is compiled as they are, and the caches are cleared once.
  """

  def place(item):
    name = item.path.stem
    rank = _LONG.index(name) if name in _LONG else len(_LONG)
    return rank, item.path, item.get_closest_marker('optimized') is None

  items.sort(key=place)


@pytest.fixture(scope='session')
def _picture():
  return figures.pngs(figure_lib.Figure)


@pytest.fixture
def empty_pictures(_picture, monkeypatch):
  """Draws figures without rendering them, which is half of a report's time.

  What is rendered is looked at in tests/report.
  """

  def drawn(draw):
    draw()
    return _picture

  monkeypatch.setattr(figures, 'pngs', drawn)
