"""Devices of a run: the placement of arrays, and compilation of the step.

`pjit` is one program over all devices, with one architecture a step. Its result
is that of one device, except for the order in which sums are rounded. `pmap`
copies the step to every device, each with its own architecture (`replicas`).

In both, batches are split over the devices, and the state is the same on all;
`shard_params` splits large parameters, their mean and their moments instead.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import logging
import pathlib
from typing import Any

import filelock
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np

from fliqs_jax.runtime import files
from fliqs_jax.runtime import replicas as replicas_lib

_LOG = logging.getLogger(__name__)

MODES = ('pjit', 'pmap')
# Bytes of compiled programs that are kept: some hundred networks.
_KEPT = 1 << 30
_AXIS = 'data'
# The least number of elements of a leaf that is split, our choice. Smaller ones
# would cost more communication than they save memory.
_LARGE = 1 << 14
# For programs that run once or a few times, such as initial weights, scoring,
# settling and evaluation. On the CPU they compile in three fifths of the time,
# random initial weights in a fifth; they are slower by a tenth, and sums of
# floats may differ in the last bit.
_ONCE: dict[str, Any] = {'xla_backend_optimization_level': 1}
# For the programs of a run of so few steps that compiling them well takes
# longer than it saves. On the CPU they compile in less than half of the time,
# and are slower by half or more.
_FEW_STEPS = 50
_FEW: dict[str, Any] = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
if jax.__version_info__ < (0, 11):  # Later versions have no such option.
  _ONCE['xla_cpu_use_fusion_emitters'] = False
  _FEW['xla_cpu_use_fusion_emitters'] = False


def replicas(keys: ml_collections.ConfigDict) -> replicas_lib.Replicas:
  """Returns the replicas of a step in the mode of `config.parallel`."""
  return replicas_lib.along(_AXIS) if keys.mode == 'pmap' else replicas_lib.ONE


def check(keys: ml_collections.ConfigDict) -> None:
  """Checks `config.parallel` as far as it does not depend on the devices.

  Args:
    keys: the section `parallel` of a config.

  Raises:
    ValueError: the mode is unknown, or keys contradict each other.
  """
  if keys.mode not in MODES:
    raise ValueError(
      f'parallel.mode={keys.mode!r} is unknown; allowed: {", ".join(MODES)}'
    )
  if keys.shard_params and keys.mode == 'pmap':
    raise ValueError(
      "parallel.shard_params=True needs parallel.mode='pjit': in 'pmap' every "
      'device has all parameters; set one of the two keys'
    )
  if keys.leave_one_out and keys.mode != 'pmap':
    raise ValueError(
      'parallel.leave_one_out=True is a baseline across replicas, which only '
      "parallel.mode='pmap' has"
    )


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices of a run, and the placement of arrays on them.

  Attributes:
    mesh: a mesh with one axis, over which batches are split.
    mode: one of `MODES`.
    shard_params: whether large parameters are split, too.
    steps: number of steps of the run; None: many.
  """

  mesh: jax.sharding.Mesh
  mode: str = 'pjit'
  shard_params: bool = False
  steps: int | None = None

  @property
  def everywhere(self) -> NamedSharding:
    """The sharding that gives every device the whole array."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def split(self) -> NamedSharding:
    """The sharding that gives every device its rows of a batch."""
    return NamedSharding(self.mesh, PartitionSpec(_AXIS))

  def of_state(self, state: Any) -> Any:
    """Returns the sharding of each leaf of a `TrainState`.

    Args:
      state: a `TrainState` of arrays or of `jax.ShapeDtypeStruct`.
    """
    where = jax.tree.map(lambda _: self.everywhere, state)
    if not self.shard_params:
      return where
    return where.replace(
      **{
        field: jax.tree.map(self._spread, getattr(state, field))
        for field in ('params', 'average', 'opt_state')
      }
    )

  @property
  def _on_cpu(self) -> bool:
    return self.mesh.devices.flat[0].platform == 'cpu'

  def _options(self, often: bool) -> dict[str, Any] | None:
    """Returns the options of the compiler for a program of the run."""
    if not self._on_cpu:
      return None
    if self.steps is not None and self.steps <= _FEW_STEPS:
      return _FEW
    return None if often else _ONCE

  def _spread(self, leaf: Any) -> NamedSharding:
    """Returns a sharding along the longest axis that can be split evenly."""
    even = [n if n % self.mesh.size == 0 else 0 for n in leaf.shape]
    if np.prod(leaf.shape) < _LARGE or not any(even):
      return self.everywhere
    axis = int(np.argmax(even))
    return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, _AXIS))

  def create(self, initial_state: Callable[[], Any]) -> Any:
    """Returns the `TrainState` that `initial_state` makes, on the devices."""
    where = self.of_state(jax.eval_shape(initial_state))
    return self.jit(initial_state, out_shardings=where)()

  def jit(self, function: Callable, **kwargs: Any) -> Callable:
    """Returns `jax.jit(function, **kwargs)` for a program that runs seldom."""
    options = self._options(often=False)
    return jax.jit(function, compiler_options=options, **kwargs)

  def feed(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches on the devices.

    Args:
      batches: pytrees of NumPy arrays [B / processes, ...], the rows of a batch
        of B examples that this process has read.
    """
    for batch in batches:
      yield jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(self.split, x), batch
      )

  def jit_everywhere(self, function: Callable) -> Callable:
    """Returns `jit` of a function whose results all processes can read."""
    return self.jit(function, out_shardings=self.everywhere)

  def compile(self, step: Callable, state: Any, *batches: Any) -> Callable:
    """Returns the compiled step; on other shapes it raises, never recompiles.

    Args:
      step: takes `(state, *batches)` and returns `(state, metrics)`; it uses
        the `replicas` of this mode.
      state: pytree of arrays or of `jax.ShapeDtypeStruct`; a call donates it.
      *batches: pytrees of arrays [B, ...] on the devices.
    """
    if self.mode == 'pmap':
      rows = [PartitionSpec(_AXIS)] * len(batches)
      # With check_vma, a gradient would silently be summed over the replicas.
      # Without it, `Replicas.mean` makes the outputs equal on all devices.
      local = jax.shard_map(
        step,
        mesh=self.mesh,
        in_specs=(PartitionSpec(), *rows),
        out_specs=PartitionSpec(),
        check_vma=False,
      )
    else:
      local = step
    where = self.of_state(state)
    return (
      jax.jit(
        local,
        in_shardings=(where, *[self.split] * len(batches)),
        out_shardings=(where, self.everywhere),
        donate_argnums=0,
      )
      .lower(state, *batches)
      .compile(compiler_options=self._options(often=True))
    )


def jit_once(function: Callable) -> Callable:
  """Returns `jax.jit(function)` for a program that runs once, without a run."""
  is_on_cpu = jax.default_backend() == 'cpu'
  return jax.jit(function, compiler_options=_ONCE if is_on_cpu else None)


def keep_compiled(directory: str | None = None) -> None:
  """Keeps compiled programs for later starts, in JAX's compilation cache.

  Runs may share the directory. Of more than 1 GiB, what was not used for the
  longest time is deleted.

  Args:
    directory: local path; '' keeps nothing; None: what JAX was told to use
      (`JAX_COMPILATION_CACHE_DIR`), or else one in the user's cache.

  Raises:
    ValueError: a directory was given that cannot be used.
  """
  if directory is None and jax.config.jax_compilation_cache_dir:
    return
  if directory == '':
    jax.config.update('jax_enable_compilation_cache', False)
    return
  if '://' in (directory or ''):
    raise ValueError(
      f'--compilation_cache={directory} is no local directory; name one, or '
      'set JAX_COMPILATION_CACHE_DIR instead'
    )
  path = pathlib.Path(directory or files.user_cache() / 'compiled')
  try:
    path = path.expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _drop_unfinished(path)
  except (OSError, RuntimeError, filelock.Timeout) as error:
    if directory is None:
      _LOG.warning('compiled programs are not kept: %s', error)
      return
    raise ValueError(
      f'--compilation_cache={directory} cannot be used: {error}; choose a '
      "directory that can be written, or '' for none"
    ) from None
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_compilation_cache_max_size', _KEPT)
  _LOG.info('compiled programs are kept in %s', path)


def _drop_unfinished(path: pathlib.Path) -> None:
  """Deletes programs that a killed process did not write to the end.

  JAX writes a time beside each program last, fails where one is missing, and
  never writes a program again.
  """
  with filelock.FileLock(path / '.lockfile', timeout=10):
    for program in path.glob('*-cache'):
      time = program.with_name(program.name.removesuffix('cache') + 'atime')
      if not time.exists() or time.stat().st_size != 8:
        program.unlink()


def step_bytes(compiled: Any) -> int | None:
  """Returns the memory that a compiled step needs beside its arguments.

  Args:
    compiled: the result of `Devices.compile`.

  Returns:
    Bytes of one device, by the compiler's accounting; None if it has none.
  """
  analysis = compiled.memory_analysis()
  return analysis and int(analysis.temp_size_in_bytes)


def one_device(config: ml_collections.ConfigDict) -> Devices:
  """Returns one device of this process: JAX's default, or else the first.

  Args:
    config: the checked config of the run that is evaluated.
  """
  device = jax.config.jax_default_device or jax.local_devices()[0]
  return Devices(_mesh([device]), steps=config.train.steps)


def all_devices(config: ml_collections.ConfigDict, samples: int) -> Devices:
  """Returns all devices of all processes, for a run.

  If `jax.default_device` is set, that device alone.

  Args:
    config: the checked config of the run.
    samples: the number of architectures that a step evaluates.

  Raises:
    ValueError: the mode cannot have so many devices, or they cannot share a
      batch evenly.
  """
  keys, devices = config.parallel, jax.devices()
  if jax.config.jax_default_device is not None:
    devices = [jax.config.jax_default_device]
  count = len(devices)
  if keys.leave_one_out and count == 1:
    raise ValueError(
      'parallel.leave_one_out=True needs several devices, but there is one'
    )
  valid = samples if keys.mode == 'pmap' else 1
  for name, shares, why in (
    ('batch_size', keys.accumulate, f'parallel.accumulate={keys.accumulate}'),
    ('valid_batch_size', valid, f'{valid} architectures judged on each'),
    ('test_batch_size', 1, ''),
  ):
    size, unit = config.data[name], count * shares
    if size % unit:
      below = size - size % unit
      nearest = [str(n) for n in (below, below + unit) if n]
      times = f', {why}' if shares > 1 else ''
      raise ValueError(
        f'data.{name}={size} must be a multiple of {unit} ({count} '
        f'devices{times}); the nearest: {", ".join(nearest)}'
      )
  return Devices(
    _mesh(devices), keys.mode, keys.shard_params, config.train.steps
  )


def _mesh(devices) -> jax.sharding.Mesh:
  return jax.sharding.Mesh(
    np.asarray(devices), (_AXIS,), axis_types=(AxisType.Auto,)
  )
