"""ONNX models: outputs of ONNX Runtime beside ours, and the stored codes."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import export
from fliqs_jax import models
from fliqs_jax import serving
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing
from fliqs_jax.numerics import quantize
from fliqs_jax.serving import export_files
from fliqs_jax.serving import portable
from fliqs_jax.serving.portable import onnx_nodes
from tests import helpers
from tests.serving import cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def onnx():
  """The packages of the extra."""
  pytest.importorskip('jax2onnx')
  pytest.importorskip('onnxruntime')
  return pytest.importorskip('onnx')


def written(run, out):
  """Exports a model with its ONNX form; returns the manifest's entry."""
  return export.export_model(
    run.model,
    run.variables,
    run.choices,
    *run.args,
    out=out,
    onnx=True,
    **run.call,
  )['onnx']


def in_onnx_runtime(out, *inputs):
  """Returns the outputs for other inputs than the examples."""
  from fliqs_jax.serving.portable import onnx_runtime

  given = {f'inputs/{i}': np.asarray(x) for i, x in enumerate(inputs)}
  return onnx_runtime.session(str(out / 'model.onnx')).run(None, given)


def integers_of(onnx, out):
  """Returns {name of weights: (type, values)} of an ONNX model."""
  graph = onnx.load(out / 'model.onnx').graph
  made_by = {name: node for node in graph.node for name in node.output}
  stored = {x.name: x for x in graph.initializer}
  found = {}
  for node in graph.node:
    if node.op_type == 'DequantizeLinear' and node.output[0] in made_by:
      source = node.input[0]
      if (cast := made_by.get(source)) and cast.op_type == 'Cast':
        source = cast.input[0]
      if source in stored:
        tensor = stored[source]
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        values = onnx.numpy_helper.to_array(tensor).astype(np.int8)
        found[node.output[0]] = kind, values
  return found


class Network(nn.Module):
  """Convolutions of every kind: strides, groups, one pixel, and a head."""

  @nn.compact
  def __call__(self, x, train):
    how = dict(kernel_init=helpers.by_key)
    x = nn.Conv(6, (3, 3), name='first', **how)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    y = nn.Conv(6, (3, 3), feature_group_count=6, name='depthwise', **how)(x)
    x = x + nn.Conv(6, (1, 1), name='pointwise', **how)(nn.relu(y))
    x = nn.Conv(8, (3, 2), (2, 1), 'VALID', name='strided', **how)(x)
    x = nn.max_pool(nn.silu(x), (2, 2))
    x = nn.DenseGeneral((2, 4), axis=(1, 2, 3), name='general', **how)(x)
    return nn.Dense(5, name='head', **how)(x.reshape((x.shape[0], -1)))


IMAGES = helpers.random((3, 8, 8, 3))


def test_codes_of_convolutions_are_those_that_are_stored(onnx, tmp_path):
  names = ['INT4', 'INT8', 'INT5', 'INT2']
  run = cases.Run(
    Network(),
    IMAGES,
    names=names,
    call=dict(train=False),
    spec=fliqs.QuantSpec(tuple(names)),
  )
  entry = written(run, tmp_path / 'out')
  assert entry['batch'] == 'any'
  content = export_files.read(tmp_path / 'out')
  found = integers_of(onnx, tmp_path / 'out')
  assert set(found) == {f'{path}/weights' for path in content.layers}
  for path, layer in content.layers.items():
    codes = packing.decode(
      content.tensors[layer.tensor], layer.weights, layer.shape
    )
    if len(layer.shape) == 4 and path != 'general':
      codes = codes.transpose((3, 2, 0, 1))  # ONNX has output channels first.
    kind, values = found[f'{path}/weights']
    np.testing.assert_array_equal(values, codes.reshape(values.shape))
    assert kind == ('INT4' if layer.weights.bits <= 4 else 'INT8')
  # Another number of examples, and no example of the export.
  images = helpers.random((5, 8, 8, 3), seed=1)
  (outputs,) = in_onnx_runtime(tmp_path / 'out', images)
  expected = serving.load(tmp_path / 'out')(images)
  # Sums of grid values are exact in both; only scales round differently, where
  # no value between two grid points was rounded to the other one.
  apart = np.abs(outputs - expected).max(axis=1)
  assert np.median(apart) <= 1e-5 * np.abs(expected).max()
  checked = export.verify(tmp_path / 'out')['onnx']
  assert checked['mean_difference'] <= 0.05 * checked['largest_output']


def test_residual_network_of_mixed_formats(onnx, tmp_path):
  config = dict(name='resnet_cifar', depth=8, filters=4)
  network = models.construct(config, 10, conv=nn.Conv, dense=nn.Dense)
  run = cases.Run(
    network,
    helpers.random((2, 16, 16, 3)),
    names=['INT4', 'INT8'],
    call=dict(train=False),
    spec=fliqs.QuantSpec(('INT4', 'INT8')),
  )
  # Factors of batch norm become scales, which are positive.
  run.variables['params'] = jax.tree_util.tree_map_with_path(
    lambda path, x: x.at[::2].multiply(-1) if 'scale' in str(path) else x,
    run.variables['params'],
  )
  written(run, tmp_path / 'out')
  model = onnx.load(tmp_path / 'out' / 'model.onnx')
  assert not {'Sub', 'Sqrt', 'Pow'} & {
    node.op_type for node in model.graph.node
  }
  images = helpers.random((4, 16, 16, 3), seed=1)
  (outputs,) = in_onnx_runtime(tmp_path / 'out', images)
  expected = serving.load(tmp_path / 'out')(images)
  # As above; in a network of INT4 one such value counts much.
  apart = np.abs(outputs - expected).max(axis=1)
  assert np.median(apart) <= 1e-5
  assert apart.mean() <= 0.05 * np.abs(expected).max()


class Spread(nn.Module):
  """Convolutions with zeros between pixels, and with pixels cut off."""

  @nn.compact
  def __call__(self, x):
    how = dict(kernel_init=helpers.by_key)
    x = nn.ConvTranspose(4, (3, 2), (2, 3), name='transposed', **how)(x)
    crop = ((-1, 0), (1, -2))
    x = nn.Conv(4, (3, 3), padding=crop, name='cropped', **how)(nn.relu(x))
    return nn.ConvTranspose(3, (2, 2), (2, 2), name='plain', **how)(x)


def test_convolutions_of_spread_and_of_cut_inputs(onnx, tmp_path):
  images = helpers.random((2, 3, 4, 3))
  spec = fliqs.QuantSpec('INT8', exclude=('plain',))
  run = cases.Run(Spread(), images, names=['INT8'], spec=spec)
  assert written(run, tmp_path / 'out')['batch'] == 'any'
  images = helpers.random((5, 3, 4, 3), seed=1)
  (outputs,) = in_onnx_runtime(tmp_path / 'out', images)
  expected = serving.load(tmp_path / 'out')(images)
  helpers.close(outputs, expected)


class Block(nn.Module):
  """A block of a transformer."""

  @nn.compact
  def __call__(self, x):
    how = dict(kernel_init=helpers.by_key)
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2, name='attention', **how)(y)
    y = nn.gelu(nn.Dense(16, name='up', **how)(nn.LayerNorm()(x)))
    return x + nn.Dense(8, name='down', **how)(y)


TOKENS = helpers.random((2, 5, 8))


@pytest.mark.parametrize('names', [('INT8', 'INT4'), ('BF16', 'E3M2')])
def test_block_of_a_transformer_with_its_attention(onnx, names, tmp_path):
  run = cases.Run(
    Block(),
    TOKENS,
    names=names,
    spec=fliqs.QuantSpec(names),
    attention=True,
  )
  entry = written(run, tmp_path / 'out')
  assert entry['batch'] == 'any'
  tokens = helpers.random((3, 5, 8), seed=1)
  (outputs,) = in_onnx_runtime(tmp_path / 'out', tokens)
  helpers.close(outputs, serving.load(tmp_path / 'out')(tokens), 0.05)
  # Floats have no codes in ONNX: they are emulated.
  found = integers_of(onnx, tmp_path / 'out')
  integers = all(formats.parse(name).is_integer for name in names)
  assert len(found) == (6 if integers else 0)


@pytest.mark.parametrize('names', [('INT4', 'INT8'), ('INT8', 'E4M3')])
def test_iterations_of_a_stack_have_their_formats(onnx, names, tmp_path):
  run = cases.Run(
    cases.Scanned(), cases.X, names=names, spec=fliqs.QuantSpec(names)
  )
  found = written(run, tmp_path / 'out')['reference']
  assert found['max_difference'] <= 0.05 * found['largest_output']


def test_an_operation_without_a_form_in_onnx_is_named(onnx, tmp_path):
  class Unknown(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = cases.Dense(4)(x)
      return jax.lax.reduce_window(
        y, jnp.inf, jax.lax.min, (1, 2), (1, 1), 'VALID'
      )

  run = cases.Run(Unknown(), cases.X, names=['INT8'])
  with pytest.raises(ValueError, match='as ONNX: .*reduce_window_min'):
    written(run, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_the_extra_is_named_where_it_is_missing(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'jax2onnx', None)
  monkeypatch.delitem(
    sys.modules, 'fliqs_jax.serving.portable.onnx_model', raising=False
  )
  monkeypatch.delattr(portable, 'onnx_model', raising=False)
  run = cases.Run(cases.Dense(3), cases.X, names=['INT8'])
  with pytest.raises(ValueError, match=r'pip install .fliqs_jax\[onnx\]'):
    written(run, tmp_path / 'out')


def test_rounding_without_bits_is_the_rounding(onnx):
  import onnxruntime

  from fliqs_jax.serving.portable import onnx_model

  grids = [
    quantize.grid_of(formats.parse(name))
    for name in ('E2M1', 'E3M2', 'E4M3', 'E5M2', 'E6M1', 'BF16')
  ]
  # Every exponent, grid points and ties.
  numbers = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
  exponents = np.exp2(np.arange(4000) % 60 - 30).astype(np.float32)
  steps = np.arange(-400, 401, dtype=np.float32) / 16
  x = np.concatenate([numbers * exponents, steps, [1e30, -1e30]])
  x = x.astype(np.float32)
  rule = onnx_nodes.Nodes({}, frozenset())
  model = onnx_model.converted(
    lambda x: [rule._rounded(x, grid) for grid in grids],
    [jax.ShapeDtypeStruct(x.shape, x.dtype)],
    [f'outputs/{i}' for i in range(len(grids))],
  )
  outputs = onnxruntime.InferenceSession(model).run(None, {'inputs/0': x})
  for found, grid in zip(outputs, grids):
    helpers.same(found, quantize.round_to_grid(x, grid))
