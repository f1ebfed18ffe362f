"""RDN: Zhang et al. 2018 (arXiv:1802.08797), super-resolution by dense blocks.

Names of layers and the enlarging end are those of the trained networks in the
npm packages @upscalerjs/esrgan-legacy and esrgan-slim, which `published` reads:
three convolutions of the small picture, its pixels repeated, and one of the
large picture. The paper has sub-pixel convolutions there.
"""

import functools
import pathlib
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.runtime import files

# The types in which TensorFlow.js stores float32.
_STORED = ('float32', 'float16', 'uint16', 'uint8')
_PEAK = 255.0  # The networks of esrgan-slim take and make 0 .. 255.


class RDN(nn.Module):
  """RDN for pictures in [0, 1]; defaults are those of esrgan-slim.

  The network of the paper has 16 blocks of 8 convolutions, and a growth of 64.

  Attributes:
    scale: factor of enlargement, at least 2.
    blocks: number of residual dense blocks, D in the paper.
    convs: number of convolutions of a block, C.
    growth: number of channels that each of them adds, G.
    channels: number of channels between blocks, G0.
    conv: constructor of convolutions.
    dtype: type in which layers compute; parameters stay float32.
  """

  input_shape: ClassVar[tuple[int, int, int]] = (48, 48, 3)

  scale: int = 2
  blocks: int = 2
  convs: int = 1
  growth: int = 4
  channels: int = 64
  conv: Any = nn.Conv
  dtype: Any = None

  def __post_init__(self):
    if self.scale < 2:
      raise ValueError(f'model.scale={self.scale} must be at least 2')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns pictures [N, scale H, scale W, 3] of pictures [N, H, W, 3]."""
    del train  # Nothing is random, and there are no norms.

    def conv(channels: int, size: int, name: str) -> Any:
      make = functools.partial(self.conv, dtype=self.dtype, name=name)
      return make(channels, (size, size))

    x = jnp.asarray(x, self.dtype)
    shortcut = conv(self.channels, 3, 'F_m1')(x)
    x = conv(self.channels, 3, 'F_0')(shortcut)
    results = []
    for d in range(1, self.blocks + 1):
      dense = x
      for c in range(1, self.convs + 1):
        y = nn.relu(conv(self.growth, 3, f'F_{d}_{c}')(dense))
        dense = jnp.concatenate([dense, y], axis=-1)
      x = conv(self.channels, 1, f'LFF_{d}')(dense) + x
      results.append(x)
    x = conv(self.channels, 1, 'GFF_1')(jnp.concatenate(results, axis=-1))
    x = conv(self.channels, 3, 'GFF_2')(x) + shortcut
    x = nn.relu(conv(64, 5, 'UPN1')(x))
    x = nn.relu(conv(32, 3, 'UPN2')(x))
    x = conv(3 * self.scale**2, 3, 'UPN3')(x)
    for axis in (1, 2):
      x = jnp.repeat(x, self.scale, axis=axis)
    return jnp.asarray(conv(3, 3, 'SR')(x), jnp.float32)


def published(path: pathlib.Path) -> dict[str, Any]:
  """Returns the parameters of a trained network of an npm package, float32.

  Networks of @upscalerjs/esrgan-legacy are stored in 8 bits and take pictures
  in [0, 1]. Those of @upscalerjs/esrgan-slim are stored as float32 and take
  0 .. 255; their biases are divided by 255, because the network is homogeneous.

  Args:
    path: a model.json of TensorFlow.js, beside the files that it names.

  Raises:
    ValueError: the file is none, or a file beside it is missing or of another
      length.
  """
  content = files.read_json(path)
  try:
    params: dict[str, Any] = {}
    for group in content['weightsManifest']:
      raw = b''.join((path.parent / p).read_bytes() for p in group['paths'])
      start = 0
      for leaf in group['weights']:
        layer, name = leaf['name'].rsplit('/', 1)
        value, length = _parameter(leaf, raw, start)
        if name == 'bias' and 'quantization' not in leaf:
          value = value / np.float32(_PEAK)
        params.setdefault(layer, {})[name] = value
        start += length
      if start != len(raw):
        raise ValueError(f'its weights have {start} bytes, files {len(raw)}')
  except (KeyError, TypeError, ValueError, OSError) as error:
    raise ValueError(
      f'{path} is no model.json of TensorFlow.js with its weights beside it: '
      f'{type(error).__name__}: {error}'
    ) from error
  return params


def _parameter(leaf: Any, raw: bytes, start: int) -> tuple[np.ndarray, int]:
  """Returns an array of a manifest, float32, and its length in bytes."""
  stored = leaf.get('quantization', {})
  dtype = stored.get('dtype', leaf['dtype'])
  if leaf['dtype'] != 'float32' or dtype not in _STORED:
    raise ValueError(
      f'{leaf["name"]} is {leaf["dtype"]} stored as {dtype}; allowed: float32 '
      f'stored as {", ".join(_STORED)}'
    )
  value = np.frombuffer(
    raw, np.dtype(dtype).newbyteorder('<'), int(np.prod(leaf['shape'])), start
  ).reshape(leaf['shape'])
  length, value = value.nbytes, value.astype(np.float32)
  if dtype.startswith('uint'):
    value = value * np.float32(stored['scale']) + np.float32(stored['min'])
  return value, length
