"""EDSR, ESPCN and RDN: shapes, sizes known from elsewhere, order of pixels."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.models import edsr
from fliqs_jax.models import espcn
from fliqs_jax.models import rdn
from fliqs_jax.space import sizes


def _init(model, size=4):
  x = jnp.asarray(np.random.default_rng(0).uniform(size=(1, size, size, 3)))
  x = x.astype(jnp.float32)
  variables = model.init(jax.random.key(0), x, train=False)
  return x, variables


def _count(model):
  x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
  shapes = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False), x
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))


def test_parameters_are_those_of_the_papers():
  # EDSR's Table 1: 1.5 M of the baseline and 43 M of the large one, for x4.
  assert round(_count(edsr.EDSR(scale=4)) / 1e6, 1) == 1.5
  large = edsr.EDSR(scale=4, blocks=32, channels=256)
  assert round(_count(large) / 1e6) == 43
  # The published RDN for x2 has files of 888,300 bytes of float32.
  assert _count(rdn.RDN()) == 888_300 / 4
  # By hand; of x3 and RGB: 25 x 3 x 64, 9 x 64 x 32 and 9 x 32 x 27, biases.
  weights = 25 * 3 * 64 + 9 * 64 * 32 + 9 * 32 * 27
  assert _count(espcn.ESPCN()) == weights + 64 + 32 + 27


@pytest.mark.parametrize(
  'model',
  [
    edsr.EDSR(scale=2, blocks=1, channels=4),
    edsr.EDSR(scale=3, blocks=1, channels=4),
    edsr.EDSR(scale=4, blocks=1, channels=4),
    espcn.ESPCN(scale=3),
    rdn.RDN(scale=3, growth=2, channels=4),
  ],
)
def test_a_picture_grows_by_the_scale(model):
  x, variables = _init(model)
  made = model.apply(variables, x, train=True)
  assert made.shape == (1, 4 * model.scale, 4 * model.scale, 3)
  assert made.dtype == jnp.float32


def test_pixels_are_shuffled_in_rows_and_columns():
  # 1 x 2 pixels of 2 x 2 x 2 channels: channel (2 i + j) 2 + c.
  x = jnp.arange(16).reshape(1, 1, 2, 8)
  expected = [
    [[0, 1], [2, 3], [8, 9], [10, 11]],
    [[4, 5], [6, 7], [12, 13], [14, 15]],
  ]
  np.testing.assert_array_equal(edsr.shuffled(x, 2)[0], expected)


def test_only_wide_networks_scale_their_residuals(monkeypatch):
  assert edsr._WIDE == 256
  monkeypatch.setattr(edsr, '_WIDE', 8)  # So many compile slowly.

  def made(channels, factor):
    """Output of one block of which conv1 has only a bias, times `factor`."""
    model = edsr.EDSR(scale=2, blocks=1, channels=channels)
    x, variables = _init(model, size=10)
    params = jax.tree.map(lambda p: p, variables['params'])
    last = params['block0_conv1']
    last['kernel'] = jnp.zeros_like(last['kernel'])
    last['bias'] = jnp.full_like(last['bias'], factor)
    return model.apply({'params': params}, x, train=False)

  def without_block(channels, residual):
    """The same with `residual` added to the head instead of by the block."""
    model = edsr.EDSR(scale=2, blocks=1, channels=channels)
    x, variables = _init(model, size=10)
    params = jax.tree.map(lambda p: p, variables['params'])
    params['block0_conv1'] = jax.tree.map(
      jnp.zeros_like, params['block0_conv1']
    )
    body = params['body']
    # A constant input of the body's convolution, inside of the picture.
    shift = residual * body['kernel'].sum((0, 1, 2))
    body['bias'] = body['bias'] + shift
    return model.apply({'params': params}, x, train=False)

  for channels, factor in ((4, 1.0), (8, 0.1)):
    inside = slice(9, 11)  # Of 20 pixels; the body pads with zeros outside.
    np.testing.assert_allclose(
      made(channels, 1.0)[:, inside, inside],
      without_block(channels, factor)[:, inside, inside],
      atol=2e-4,
    )


def test_the_mean_of_div2k_is_what_a_network_of_zeros_makes():
  model = edsr.EDSR(scale=2, blocks=1, channels=4)
  x, variables = _init(model)
  zeros = jax.tree.map(jnp.zeros_like, variables)
  made = model.apply(zeros, x, train=False)
  np.testing.assert_allclose(made[0, 0, 0], [0.4488, 0.4371, 0.4040])


@pytest.mark.parametrize('name', ['edsr', 'deit_ti16'])
def test_a_network_without_sizes_is_served(name):
  served = sizes.Sizes(is_served=True)
  models.construct(models.published(name), 10, sizes=served, conv=nn.Conv)
  with pytest.raises(ValueError, match='has no sizes to search'):
    models.construct(
      models.published(name), 10, sizes=sizes.Sizes((0.5, 1.0)), conv=nn.Conv
    )


def test_a_scale_that_a_network_lacks_is_refused():
  with pytest.raises(ValueError, match='scale=5 is no scale of EDSR'):
    models.construct(models.published('edsr') | dict(scale=5), 0, conv=nn.Conv)
  with pytest.raises(ValueError, match='scale=1 must be at least 2'):
    espcn.ESPCN(scale=1)


@pytest.fixture(name='published')
def _published(tmp_path):
  """A tiny RDN as TensorFlow.js stores it, in two files, and its parameters."""
  model = rdn.RDN(growth=2, channels=4)
  x, variables = _init(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32),
    variables['params'],
  )
  raw, weights = b'', []
  for layer in sorted(params):
    for name in ('kernel', 'bias'):
      value = params[layer][name]
      raw += value.tobytes()
      weights.append(
        dict(name=f'{layer}/{name}', shape=value.shape, dtype='float32')
      )
  (tmp_path / 'a.bin').write_bytes(raw[:1000])
  (tmp_path / 'b.bin').write_bytes(raw[1000:])
  group = dict(paths=['a.bin', 'b.bin'], weights=weights)
  path = tmp_path / 'model.json'
  path.write_text(json.dumps(dict(weightsManifest=[group])))
  return path, model, x, params


def test_a_published_network_is_read_and_works_in_0_to_1(published):
  path, model, x, params = published
  read = rdn.published(path)
  made = model.apply({'params': read}, x, train=False)
  large = model.apply({'params': params}, 255 * x, train=False)
  np.testing.assert_allclose(255 * made, large, rtol=1e-4, atol=1e-2)
  np.testing.assert_array_equal(read['SR']['kernel'], params['SR']['kernel'])


@pytest.mark.parametrize(
  ('dtype', 'rest', 'raw', 'expected'),
  [
    # It stores round((x - min) / scale): 3 / 2 - 1.25 and 255 / 2 - 1.25.
    ('uint8', dict(scale=0.5, min=-1.25), bytes([3, 255]), [0.25, 126.25]),
    ('uint16', dict(scale=0.5, min=-1.0), bytes([2, 0, 0, 1]), [0, 127]),
    ('float16', {}, np.array([1.5, -2], '<f2').tobytes(), [1.5, -2]),
  ],
)
def test_a_published_network_of_fewer_bits_is_read(
  tmp_path, dtype, rest, raw, expected
):
  stored = dict(dtype=dtype, original_dtype='float32', **rest)
  leaf = dict(name='SR/bias', shape=[2], dtype='float32', quantization=stored)
  group = dict(paths=['c.bin'], weights=[leaf])
  (tmp_path / 'c.bin').write_bytes(raw)
  path = tmp_path / 'model.json'
  path.write_text(json.dumps(dict(weightsManifest=[group])))
  read = rdn.published(path)['SR']['bias']
  np.testing.assert_array_equal(read, np.float32(expected))
  stored['dtype'] = 'int4'
  path.write_text(json.dumps(dict(weightsManifest=[group])))
  with pytest.raises(ValueError, match='SR/bias is float32 stored as int4; al'):
    rdn.published(path)


def test_a_published_network_with_missing_weights_is_refused(published):
  path, *_ = published
  b = path.with_name('b.bin')
  b.write_bytes(b.read_bytes() + b'1234')
  with pytest.raises(ValueError, match='model.json is no .* bytes, files'):
    rdn.published(path)
  b.unlink()
  with pytest.raises(ValueError, match=r'model.json is no .*b\.bin'):
    rdn.published(path)
  path.write_text('{}')
  with pytest.raises(ValueError, match='model.json is no .*weightsManifest'):
    rdn.published(path)
