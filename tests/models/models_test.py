"""Networks: shapes, gradients, what is random, and sizes known from elsewhere.

At the smallest sizes at which every kind of layer still occurs.
"""

import functools
import json

from flax import traverse_util
import flax.linen as nn
import jax
from jax import tree_util
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.models import deit
from fliqs_jax.models import efficientnet
from fliqs_jax.models import inception_v3
from fliqs_jax.models import mobilenet_v2
from fliqs_jax.models import recommender
from fliqs_jax.models import resnet
from fliqs_jax.space import quant_spec

BATCH = 4
CLASSES = 3


def images(size):
  x = np.random.default_rng(0).normal(size=(BATCH, size, size, 3))
  return jnp.asarray(x, jnp.float32)


def clicks(buckets):
  rng = np.random.default_rng(0)
  return {
    'dense': jnp.asarray(rng.normal(size=(BATCH, 13)), jnp.float32),
    'ids': jnp.asarray(rng.integers(buckets, size=(BATCH, 26)), jnp.int32),
  }


NETWORKS = {
  'resnet_basic': (resnet.ResNet(CLASSES, depth=10, width=1 / 8), images(33)),
  'resnet_bottleneck': (
    resnet.ResNet(CLASSES, depth=14, width=1 / 8),
    images(33),
  ),
  'mobilenet_v2': (
    mobilenet_v2.MobileNetV2(CLASSES, width=1 / 8, depth=0.1),
    images(32),
  ),
  'inception_v3': (
    inception_v3.InceptionV3(CLASSES, width=1 / 16, modules=(1, 1, 1)),
    images(75),
  ),
  # Two blocks in the sixth stage, one in each other.
  'efficientnet': (
    efficientnet.EfficientNet(CLASSES, width=1 / 8, depth=0.3),
    images(32),
  ),
  'deit': (
    deit.DeiT(CLASSES, hidden=16, heads=2, depth=2, patch=8, drop_path=0.5),
    images(16),
  ),
  'recommender': (
    recommender.Recommender(
      buckets=5, embedding_dim=2, hidden=(8, 8), ranks=(4, 4)
    ),
    clicks(buckets=5),
  ),
}
WITH_DROPOUT = ('mobilenet_v2', 'inception_v3', 'efficientnet', 'deit')


def random_variables(model, x):
  """Returns variables as they may be in the middle of training.

  At initialisation some gradients vanish: ResNet's blocks end in a zero scale.
  """
  rng = np.random.default_rng(1)

  def leaf(path, like):
    name = path[-1].key
    if name in ('mean', 'var'):
      value = np.full(like.shape, float(name == 'var'))
    elif name == 'scale':
      value = rng.uniform(0.5, 1.5, like.shape)
    else:
      fan_in = max(1, like.size // like.shape[-1])
      value = rng.normal(size=like.shape) / fan_in**0.5
    return jnp.asarray(value, like.dtype)

  shapes = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), x
  )
  return tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def compiled(name):
  """Returns variables and a function of them and a seed, compiled once.

  The function returns logits of training, the state after it, gradients of the
  sum of squared logits, and logits of evaluation.
  """
  model, x = NETWORKS[name]

  def run(variables, seed):
    state = {k: v for k, v in variables.items() if k != 'params'}

    def loss(params):
      logits, new_state = model.apply(
        {'params': params, **state},
        x,
        train=True,
        rngs={'dropout': jax.random.key(seed)},
        mutable=list(state),
      )
      return jnp.sum(logits**2), (logits, new_state)

    gradients, (logits, new_state) = jax.grad(loss, has_aux=True)(
      variables['params']
    )
    evaluated = model.apply(variables, x, train=False)
    return logits, new_state, gradients, evaluated

  variables = random_variables(model, x)
  return variables, jax.jit(run).lower(variables, 0).compile()


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_logits_are_finite_and_one_row_per_example(name):
  variables, run = compiled(name)
  logits, _, _, evaluated = run(variables, 0)
  expected = (BATCH,) if name == 'recommender' else (BATCH, CLASSES)
  assert logits.shape == evaluated.shape == expected
  assert np.isfinite(logits).all()
  assert np.isfinite(evaluated).all()
  assert len(np.unique(evaluated, axis=0)) == BATCH  # The input matters.


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_every_parameter_has_a_gradient(name):
  variables, run = compiled(name)
  _, _, gradients, _ = run(variables, 0)
  gradients = traverse_util.flatten_dict(gradients, sep='/')
  largest = {path: np.abs(g).max() for path, g in gradients.items()}
  for path in largest:
    # Two kinds of bias do nothing. A key's adds the same to all logits of a
    # query, which softmax does not see. That after a linear projection reaches
    # 1x1 convolutions only, as a constant that their batch norm takes away.
    if path.endswith('key/bias'):
      assert largest[path] < 1e-3 * largest[path.replace('bias', 'kernel')]
    elif path.endswith('project_norm/bias'):
      assert largest[path] < 1e-3 * largest[path.replace('bias', 'scale')]
    else:
      assert 1e-5 < largest[path] < np.inf, path


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_only_dropout_is_random_and_only_in_training(name):
  variables, run = compiled(name)
  first, again, other = run(variables, 0), run(variables, 0), run(variables, 1)
  np.testing.assert_array_equal(first[0], again[0])
  same = bool((first[0] == other[0]).all())
  assert same == (name not in WITH_DROPOUT)
  np.testing.assert_array_equal(first[3], other[3])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet_basic', 'resnet_bottleneck'])
def test_training_differs_from_evaluation_by_the_statistics_alone(name):
  variables, run = compiled(name)
  trained, state, _, evaluated = run(variables, 0)
  assert np.abs(trained - evaluated).max() > 1e-3
  # The new average is 0.9 of the old and 0.1 of the batch's statistic.
  of_batch = jax.tree.map(
    lambda new, old: (new - 0.9 * old) / 0.1,
    state['batch_stats'],
    variables['batch_stats'],
  )
  variables = {**variables, 'batch_stats': of_batch}
  np.testing.assert_allclose(run(variables, 0)[3], trained, rtol=1e-3)


def test_a_recommender_is_the_same_in_training_and_evaluation():
  variables, run = compiled('recommender')
  logits, _, _, evaluated = run(variables, 0)
  np.testing.assert_allclose(logits, evaluated, rtol=1e-5)


def dropouts(model, x, train=True):
  """Returns [(path, rate, axes of one draw)] of all that may be dropped."""
  found = []

  def note(call, args, kwargs, context):
    module = context.module
    if isinstance(module, nn.Dropout) and module.rate:
      assert module.deterministic != train
      path = '/'.join(module.path[:-1])
      found.append((path, module.rate, tuple(module.broadcast_dims)))
    return call(*args, **kwargs)

  def init(x):
    with nn.intercept_methods(note):
      rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
      return model.init(rngs, x, train=train)

  jax.eval_shape(init, x)
  return found


@pytest.mark.slow
@pytest.mark.parametrize('train', [True, False])
def test_efficientnet_drops_whole_shortcut_blocks_ever_more(train):
  model = efficientnet.EfficientNet(CLASSES)
  # Of B0's 16 blocks the first of each stage has no shortcut; the stages have
  # 1, 2, 2, 3, 3, 4, 1 blocks.
  shortcuts = [
    (2, 'stage1_block1'),
    (4, 'stage2_block1'),
    (6, 'stage3_block1'),
    (7, 'stage3_block2'),
    (9, 'stage4_block1'),
    (10, 'stage4_block2'),
    (12, 'stage5_block1'),
    (13, 'stage5_block2'),
    (14, 'stage5_block3'),
  ]
  expected = [(path, 0.2 * i / 16, (1, 2, 3)) for i, path in shortcuts]
  expected += [('', 0.2, ())]  # Before the classifier, each number by itself.
  assert dropouts(model, images(32), train) == expected


def test_deit_drops_either_half_of_a_block():
  model = deit.DeiT(CLASSES, hidden=16, heads=2, depth=3, patch=8)
  # Linear from 0 at the first block to 0.1 at the last.
  expected = [(f'block{i}', 0.05 * i, (1, 2)) for i in (1, 1, 2, 2)]
  assert dropouts(model, images(16)) == expected


def test_deit_without_drop_path_is_the_same_in_training_and_evaluation():
  model, x = NETWORKS['deit']
  model = model.clone(drop_path=0.0)
  variables = random_variables(model, x)
  jaxprs = [
    str(jax.make_jaxpr(functools.partial(model.apply, train=t))(variables, x))
    for t in (True, False)
  ]
  assert jaxprs[0] == jaxprs[1]


def initial(model, x, *path, seed=0):
  """Returns one initial parameter; the rest of `init` is not compiled."""

  @jax.jit
  def one(key):
    leaf = model.init(key, x, train=False)['params']
    for part in path:
      leaf = leaf[part]
    return leaf

  return np.asarray(one(jax.random.key(seed)))


@pytest.mark.slow
def test_initial_spreads_are_the_original_recipes():
  # A sample of n has a standard deviation within 4 / sqrt(2 n) of the true one.
  block = resnet.ResNet(CLASSES, depth=10), images(33), 'stage3_block0'
  assert not initial(*block, 'norm1', 'scale').any()
  # He: variance 2 / fan-out. 3 * 3 * 512 outputs of a weight; n = 1.2M.
  kernel = initial(*block, 'conv0', 'kernel')
  assert kernel.std() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.003)

  net = efficientnet.EfficientNet(CLASSES), images(32), 'stage5_block0'
  # Depthwise, 5x5: variance 2 / 25, whatever the 672 channels; n = 16800.
  kernel = initial(*net, 'depthwise', 'kernel')
  assert kernel.std() == pytest.approx((2 / 25) ** 0.5, rel=0.022)

  net = deit.DeiT(CLASSES, hidden=192, heads=3), images(32)
  # 0.02; n = 4 * 192**2.
  kernel = initial(*net, 'block0', 'mlp0', 'kernel')
  assert kernel.std() == pytest.approx(0.02, rel=0.008)


@pytest.mark.parametrize(
  ('name', 'path'),
  [
    ('deit', ('block1', 'out', 'kernel')),
    ('recommender', ('embedding', 'embedding')),
  ],
)
def test_the_seed_alone_decides_the_initial_parameters(name, path):
  model, x = NETWORKS[name]
  first = initial(model, x, *path)
  np.testing.assert_array_equal(first, initial(model, x, *path))
  assert (first != initial(model, x, *path, seed=1)).any()


@pytest.mark.parametrize(
  ('model', 'params'),
  [
    # torchvision's 11,689,512, and a projection in the first stage, 64 * 64
    # weights and 2 * 64 of its batch norm.
    (resnet.ResNet(1000, depth=18), 11_689_512 + 64 * 64 + 2 * 64),
    (resnet.ResNet(1000, depth=50), 25_557_032),  # torchvision
    (mobilenet_v2.MobileNetV2(1000), 3_504_872),  # torchvision
    (efficientnet.EfficientNet(1000, 'b0'), 5_288_548),  # torchvision
    (efficientnet.EfficientNet(1000, 'b1'), 7_794_184),  # torchvision
    (efficientnet.EfficientNet(1000, 'b2'), 9_109_994),  # torchvision
    (efficientnet.EfficientNet(1000, 'b3'), 12_233_232),  # torchvision
    (efficientnet.EfficientNet(1000, 'b4'), 19_341_616),  # torchvision
    (deit.DeiT(1000, hidden=192, heads=3), 5_717_416),  # timm
    (deit.DeiT(1000, hidden=384, heads=6), 22_050_664),  # timm
    (deit.DeiT(1000), 86_567_656),  # timm
  ],
  ids=lambda value: None if isinstance(value, int) else type(value).__name__,
)
def test_parameters_are_as_many_as_elsewhere(model, params):
  image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), image
  )
  assert sum(p.size for p in jax.tree.leaves(shapes['params'])) == params


def test_parameters_of_the_recommender():
  model = recommender.Recommender()
  x = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), model.input_shape
  )
  shapes = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), x
  )
  # A table of 26 features; 13 numbers and 26 vectors through 4 layers of V, U
  # and a bias; the output.
  expected = 26 * 2**15 * 16
  for inputs in (13 + 26 * 16, 512, 512, 512):
    expected += inputs * 128 + 128 * 512 + 512
  expected += 512 + 1
  assert sum(p.size for p in jax.tree.leaves(shapes['params'])) == expected


def traced(model, *size):
  x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  return jax.eval_shape(
    functools.partial(model.init_with_output, train=False), jax.random.key(0), x
  )


def test_inception_names_its_smallest_image():
  model = inception_v3.InceptionV3(CLASSES, width=1 / 16, modules=(1, 1, 1))
  logits, _ = traced(model, 73, 73)
  assert logits.shape == (1, CLASSES)
  with pytest.raises(ValueError, match='90x72 .* at least 73x73'):
    traced(model, 90, 72)


@pytest.mark.parametrize('size', [(32, 20), (8, 16), (0, 16)])
def test_deit_names_the_sizes_of_images_that_it_takes(size):
  model = deit.DeiT(CLASSES, hidden=16, heads=2, depth=1)
  with pytest.raises(ValueError, match='multiples of 16, at least 16'):
    traced(model, *size)


@pytest.mark.parametrize(
  ('network', 'fields', 'message'),
  [
    (resnet.ResNet, dict(depth=20), r'model.depth=20 .* 18, 34, 50'),
    (resnet.ResNet, dict(width=0.01), 'model.width=0.01'),
    (resnet.ResNet, dict(width=-1.0), 'model.width=-1.0'),
    (inception_v3.InceptionV3, dict(width=0.0), 'model.width=0.0'),
    (inception_v3.InceptionV3, dict(modules=(3, 5, 2)), 'model.modules'),
    (inception_v3.InceptionV3, dict(modules=(3, 4)), 'model.modules'),
    (efficientnet.EfficientNet, dict(variant='b8'), "'b8' .* b0, b1"),
    (efficientnet.EfficientNet, dict(depth=0.0), 'model.depth=0.0'),
    (deit.DeiT, dict(width=0.3), 'model.width=0.3: 230 channels'),
    (deit.DeiT, dict(width=0.0), 'model.width=0.0'),
    (deit.DeiT, dict(heads=0), 'model.heads=0'),
  ],
)
def test_a_network_that_cannot_be_is_refused(network, fields, message):
  with pytest.raises(ValueError, match=message):
    network(CLASSES, **fields)


def test_a_recommender_needs_a_rank_for_each_layer():
  with pytest.raises(ValueError, match='model.hidden=.* model.ranks='):
    recommender.Recommender(hidden=(8, 8), ranks=(4,))


@pytest.mark.parametrize('name', models.MODELS)
def test_a_network_is_hashable_if_its_config_was_read_from_a_file(name):
  config = json.loads(json.dumps(models.published(name)))  # Tuples are lists.
  hash(models.build(config, CLASSES, quant_spec.QuantSpec()))
