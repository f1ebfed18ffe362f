"""Arrays, assertions and calls that tests of several folders share."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

# Options of `jax.jit` that compile in less than half of the time, to programs
# that take twice as long; for tests that are `optimized`, where no bits of a
# program are compared. The others have them anyway (tests/conftest.py).
FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  # To split a program for the threads that a single core lacks takes a quarter.
  'xla_cpu_parallel_codegen_split_count': 1,
}
if jax.__version_info__ < (0, 11):  # Later versions have no such option.
  FAST['xla_cpu_use_fusion_emitters'] = False


def random(shape, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape)
  return x.astype(np.float32)


def by_key(key, shape, dtype=jnp.float32):
  """An initializer that tells keys apart and compiles fast."""
  key = jax.random.key_data(key)[1] % 1000 / 1000 - 0.5
  ramp = jnp.cos(jnp.arange(np.prod(shape)))
  return (key + ramp).reshape(shape).astype(dtype)


def same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    actual,
    expected,
  )


def init(model, *args, **kwargs):
  """Returns initial variables; compiles only what leads to them."""
  return jax.jit(
    lambda key: model.init(key, *args, **kwargs),
    compiler_options=FAST,
  )(jax.random.key(0))


def step(model):
  """Returns a compiled (variables, x) -> (y, changed), (dparams, dx)."""

  @jax.jit
  def compiled(variables, x):
    def apply(params, x):
      y, changed = model.apply(
        {**variables, 'params': params}, x, mutable=['quant_stats']
      )
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, changed)

    gradients, out = jax.grad(apply, (0, 1), has_aux=True)(
      variables['params'], x
    )
    return out, gradients

  return compiled


def chosen(space, names):
  """Returns the `arch` in which decision i has the i-th name, in turn."""
  return space.expand(
    {
      d.name: d.one_hot(names[i % len(names)])
      for i, d in enumerate(space.decisions)
    }
  )


def one_hots(space, indices):
  """Returns the choices of {decision: index of its option}."""
  return {
    d.name: np.eye(len(d.labels), dtype=np.float32)[indices[d.name]]
    for d in space.decisions
  }


def random_choices(space, seed=0):
  """Returns choices that are drawn at random."""
  rng = np.random.default_rng(seed)
  return one_hots(
    space, {d.name: rng.integers(len(d.labels)) for d in space.decisions}
  )


def architectures(space):
  """Yields {decision: index of its option} of every architecture."""
  names = [d.name for d in space.decisions]
  menus = [range(len(d.labels)) for d in space.decisions]
  for indices in itertools.product(*menus):
    yield dict(zip(names, indices))


def large_state(step):
  """Returns a state of 8 MB, so that it can be killed while it is saved."""
  return {
    f'x{i}': jax.random.normal(jax.random.key(step + i), (1 << 20,))
    for i in range(2)
  }


def facts(workdir):
  """Returns what a run leaves that must not depend on clocks or kills."""
  result = json.loads((workdir / 'result.json').read_text())
  times = 'wall_seconds', 'step_seconds', 'compile_seconds'
  for name in (*times, 'compilations', 'step_bytes'):
    del result[name]
  names = ('arch.json', 'config.json', 'history.jsonl')
  return result, [(workdir / name).read_bytes() for name in names]


def tree_of(directory):
  """What any change below a directory changes, of folders, too."""
  return {
    path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
    for path in (directory, *directory.rglob('*'))
  }
