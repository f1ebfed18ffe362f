"""A found network, built small, is the searched one with its decisions made.

What is cut away is done here by other means than in the project itself: by what
each size decision is about, not by the shapes that are wanted.
"""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from fliqs_jax.space import sizes
from tests import helpers

pytestmark = pytest.mark.slow

BATCH, CLASSES = 3, 3
WIDTHS = (0.5, 1.0, 1.5)
# Compiling their statistics of a batch takes as long again.
TRAINED = ('mlp', 'resnet_cifar', 'recommender')
# Half of the large networks' layers, for the same reason.
UNQUANTIZED = ('stage[1256]_*',)
MOBILENET = dict(width=1 / 8, depth=0.3, strides=(1, 1, 2, 1, 2, 1, 1, 1))
# Fields, what is open, size of the image.
NETWORKS = {
  'mlp': (dict(hidden=(6, 8)), sizes.Sizes(WIDTHS), 4),
  'resnet_cifar': (dict(depth=14, filters=4), sizes.Sizes(WIDTHS), 9),
  'resnet10': (dict(width=1 / 16), sizes.Sizes(WIDTHS), 33),
  'resnet14': (dict(width=1 / 16), sizes.Sizes(WIDTHS), 33),
  'mobilenetv2': (MOBILENET, sizes.Sizes((1, 2, 3), (3, 5)), 12),
  # In the last stage a map of 3x3, the least for a kernel of 5.
  'efficientnet_b0': (
    dict(width=1 / 8, depth=0.3),
    sizes.Sizes((1, 2, 4), (3, 5), sizes.MASKED),
    96,
  ),
  'recommender': (
    dict(buckets=5, embedding_dim=2, hidden=(16, 12), ranks=(8, 6)),
    sizes.Sizes(WIDTHS),
    None,
  ),
}


def inputs(size, batch):
  rng = np.random.default_rng(0)
  if size is None:
    return {
      'dense': jnp.asarray(rng.normal(size=(batch, 13)), jnp.float32),
      'ids': jnp.asarray(rng.integers(5, size=(batch, 26)), jnp.int32),
    }
  # Of different colours, which a mean over the map leaves different.
  x = rng.normal(size=(batch, 1, 1, 3)) + rng.normal(
    size=(batch, size, size, 3)
  )
  return jnp.asarray(x, jnp.float32)


def build(name, spec, open_sizes):
  fields, _, size = NETWORKS[name]
  config = models.published(name) | fields
  model = models.build(config, CLASSES, spec, open_sizes)
  return model, discovery.find(model, inputs(size, 1), spec=spec, train=False)


@functools.cache
def shapes(model, name):
  """Returns the variables as `jax.ShapeDtypeStruct`, flat."""
  init = functools.partial(model.init, train=False)
  x = inputs(NETWORKS[name][2], BATCH)
  found = jax.eval_shape(init, jax.random.key(0), x)
  return traverse_util.flatten_dict(found, sep='/')


def random_variables(model, name):
  """Returns variables as they may be in the middle of a search, flat."""
  rng = np.random.default_rng(1)
  result = {}
  for path, like in shapes(model, name).items():
    collection, leaf = path.split('/')[0], path.rpartition('/')[2]
    if collection in ('cost', 'sizes', 'arch'):
      continue
    value = rng.normal(size=like.shape)
    if collection == 'quant_stats':
      known = dict(mean=0.1, variance=0.09, count=7, active=True)
      value = np.full(like.shape, known.get(leaf, 3.0))
    elif leaf in ('scale', 'var'):
      value = rng.uniform(0.2, 0.6, like.shape) ** (1 if leaf == 'var' else 0.5)
    elif leaf in ('bias', 'mean'):
      value = value * 0.2
    elif leaf.startswith('kernel'):
      value = 1.5 * value / max(1, like.size // like.shape[-1]) ** 0.5
    result[path] = np.asarray(value, like.dtype)
  return result


def sliced(variables, picked, space, choices):
  """Returns the variables of the found network, by what picks their sizes."""
  leaves = {k: int(np.argmax(v)) for k, v in space.leaves(choices).items()}

  def count(layer, leaf):
    path = f'{layer}/{leaf}'
    return picked[path][0].counts[leaves[path]] if path in leaves else None

  result = {}
  for path, value in variables.items():
    collection, _, rest = path.partition('/')
    layer, _, name = rest.rpartition('/')
    outputs = count(layer, 'output_channels') or count(layer, 'channels')
    if collection == 'quant_stats':
      if name == 'clip':
        index = leaves[f'{layer}/format']
        value = value[index : index + 1]
    elif name.startswith('kernel'):
      size = count(layer, 'kernel')
      if name != 'kernel' and name != f'kernel{size}':
        continue
      if size and size < len(value):
        first = (len(value) - size) // 2
        value = value[first : first + size, first : first + size]
      path = f'{collection}/{layer}/kernel'
      value = value[..., :outputs]
      if value.shape[-2] > 1:  # Else depthwise.
        rows = count(layer, 'input_channels')
        if layer.endswith('excite') and outputs:  # It follows its neighbour.
          rows = picked[f'{layer[:-6]}squeeze/channels'][0]
          rows = rows.counts[leaves[f'{layer[:-6]}squeeze/channels']]
        if layer.endswith('squeeze') and outputs:
          block = layer.rpartition('/')[0]
          rows = count(f'{block}/depthwise_norm', 'channels')
        value = value[..., :rows, :]
    elif outputs:
      value = value[:outputs]
    result[path] = value
  return result


def random_choices(space, seed):
  choices = helpers.random_choices(space, seed)
  if any(d.kind == 'kernel' for d in space.decisions):
    # Inverted bottlenecks: the first stage is by choice as wide as the stem,
    # and has a shortcut no more than else.
    choices['stage0/channels'] = np.eye(3, dtype=np.float32)[0]
  return choices


def nested(flat):
  return traverse_util.unflatten_dict(flat, sep='/')


@functools.cache
def searched(name):
  """Returns model, space, flat variables and `compiled`."""
  exclude = () if name in TRAINED else UNQUANTIZED
  spec = quant_spec.QuantSpec('int_s', exclude=exclude)
  model, space = build(name, spec, NETWORKS[name][1])
  x = inputs(NETWORKS[name][2], BATCH)
  variables = random_variables(model, name)
  run = compiled(
    name, model, space, variables, helpers.random_choices(space, 0), x
  )
  return model, space, variables, run


def compiled(name, model, space, variables, choices, x):
  """Returns (variables, arch, x) -> logits, state after a step of training."""

  def run(variables, arch, x):
    variables = {**variables, 'arch': arch}
    logits, state = model.apply(variables, x, train=False), {}
    if name in TRAINED:
      mutable = [k for k in variables if k in ('batch_stats', 'quant_stats')]
      _, state = model.apply(variables, x, train=True, mutable=mutable)
    return logits, state

  args = nested(variables), space.expand(choices), x
  return jax.jit(run).lower(*args).compile()


@pytest.mark.parametrize(
  ('name', 'seed'),
  [*((name, 0) for name in NETWORKS), *((name, 1) for name in TRAINED)],
)
def test_the_found_network_is_the_searched_one_with_the_rest_cut_away(
  name, seed
):
  x = inputs(NETWORKS[name][2], BATCH)
  model, space, variables, run = searched(name)
  choices = helpers.random_choices(space, seed)
  expected, expected_state = run(nested(variables), space.expand(choices), x)

  spec = quant_spec.QuantSpec(assignment=space.assignment(choices))
  found, found_space = build(
    name, spec, sizes.Sizes(found=space.sizes(choices))
  )
  assert found_space.is_fixed
  picked = {
    path.removeprefix('sizes/'): value
    for path, value in shapes(model, name).items()
    if path.startswith('sizes/')
  }
  cut = sliced(variables, picked, space, choices)
  assert {k: v.shape for k, v in cut.items()} == {
    k: v.shape for k, v in random_variables(found, name).items()
  }
  only = found_space.only()
  small_run = compiled(name, found, found_space, cut, only, x)
  actual, state = small_run(nested(cut), found_space.expand(only), x)
  # Not bit-equal where a mean or an unquantized sum is over other lengths.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  assert len(np.unique(actual, axis=0)) == BATCH

  # Statistics of live channels move as in the found network; those of dead
  # ones stay.
  after = traverse_util.flatten_dict(expected_state, sep='/')
  cut_after = sliced(after, picked, space, choices)
  for path, value in traverse_util.flatten_dict(state, sep='/').items():
    np.testing.assert_allclose(
      value, cut_after[path], rtol=1e-5, atol=1e-6, err_msg=path
    )

  for kind in ('bops', 'size'):
    costs = [
      float(s.cost(kind)(c))
      for s, c in ((space, choices), (found_space, found_space.only()))
    ]
    # Shares of what is allocated are float32.
    assert costs[0] == pytest.approx(costs[1], rel=1e-6), kind
