"""Super-resolution task: pictures from smaller ones, judged by PSNR and SSIM.

As papers do, metrics compare 8-bit pictures without a border of as many pixels
as the scale, on the luma Y of BT.601 and on RGB.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import data

Batch = Mapping[str, jax.Array]

METRIC, UNIT, LEAST_CLASSES = 'PSNR', 'dB', 1

# Luma of BT.601 in 16 .. 235, of red, green and blue in 0 .. 255.
_LUMA, _BLACK = np.array([65.738, 129.057, 25.064], np.float32) / 256, 16.0
_PEAK = 255.0
# Equal pictures have no error and would have an infinite PSNR.
_HIGHEST = 100.0
# Wang et al. 2004: a Gaussian window, and constants that keep quotients finite.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2


def output_shape(streams: data.Streams) -> tuple[int, ...]:
  """Returns the shape of a model's output for one example, a picture.

  Raises:
    ValueError: the labels of the data are no pictures.
  """
  if len(streams.label.shape) != 3:
    raise ValueError(
      "task='super_resolution' needs data whose labels are pictures, such as "
      "data.name='pictures'"
    )
  return streams.label.shape


def loss(label_smoothing: float) -> Callable[..., Any]:
  """Returns the training loss (pictures, batch) -> (scalar, metrics).

  It is the mean absolute error of pictures [N, H, W, 3] in [0, 1] (Lim et al.
  2017); labels are uint8 [N, H, W, 3].

  Args:
    label_smoothing: must be 0, because there are no classes.

  Raises:
    ValueError: it is not 0.
  """
  if label_smoothing:
    raise ValueError(
      f'train.label_smoothing={label_smoothing} must be 0: '
      "task='super_resolution' has no classes"
    )

  def absolute_error(outputs: jax.Array, batch: Batch):
    value = jnp.mean(_errors(outputs, batch['label']))
    return value, dict(loss=value)

  return absolute_error


def minus_l1(outputs: jax.Array, batch: Batch) -> jax.Array:
  """Returns minus the mean absolute error [] of pictures in [0, 1]."""
  return -jnp.mean(_errors(outputs, batch['label']))


def mean_psnr(outputs: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean PSNR [] of the luma, in dB."""
  made, label = _compared(outputs, batch)
  return jnp.mean(psnr(luma(made), luma(label)))


QUALITIES = {'psnr': mean_psnr, 'l1': minus_l1}


def labels_of(outputs: jax.Array) -> jax.Array:
  """Returns what a network teaches with its pictures: 0 to 255, unrounded."""
  return outputs * _PEAK


def measure(outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Returns sums over the real examples of a padded batch.

  Args:
    outputs: [N, H, W, 3] pictures of the model in [0, 1].
    batch: `image` float32 [N, H / scale, W / scale, 3], the input, `label`
      uint8 [N, H, W, 3], and `mask` float32 [N], 0 for padding.

  Returns:
    `psnr` and `psnr_rgb` (dB), `ssim` and `ssim_rgb`; `psnr_bicubic`, that of
    the input enlarged; `loss` and `examples`. Each is [].
  """
  mask = batch['example_mask']
  made, label = _compared(outputs, batch)
  enlarged, _ = _compared(bicubic(batch['image'], outputs.shape), batch)
  values = dict(
    psnr=psnr(luma(made), luma(label)),
    ssim=ssim(luma(made), luma(label)),
    psnr_rgb=psnr(made, label),
    ssim_rgb=ssim(made, label),
    psnr_bicubic=psnr(luma(enlarged), luma(label)),
    loss=jnp.mean(_errors(outputs, batch['label']), axis=(1, 2, 3)),
    examples=jnp.ones_like(mask),
  )
  return {name: jnp.sum(mask * value) for name, value in values.items()}


def summarize(sums: Mapping[str, float]) -> dict[str, float]:
  """Returns the means over all pictures of the split, and their number.

  `PSNR` and `SSIM` are those of the luma; `PSNR_bicubic` is the PSNR of bicubic
  enlargement.
  """
  names = {
    'PSNR': 'psnr',
    'SSIM': 'ssim',
    'PSNR_rgb': 'psnr_rgb',
    'SSIM_rgb': 'ssim_rgb',
    'PSNR_bicubic': 'psnr_bicubic',
    'loss': 'loss',
  }
  means = {k: float(sums[name] / sums['examples']) for k, name in names.items()}
  return dict(**means, examples=int(sums['examples']))


def quantized(pictures: jax.Array) -> jax.Array:
  """Returns pictures in [0, 1] as whole numbers 0 .. 255, in float32."""
  return jnp.round(_PEAK * jnp.clip(pictures, 0.0, 1.0))


def bicubic(pictures: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns pictures [N, h, w, 3] enlarged to a shape [N, H, W, 3] (Keys)."""
  return jax.image.resize(pictures, shape, 'cubic')


def luma(pictures: jax.Array) -> jax.Array:
  """Returns Y [N, H, W, 1] of RGB [N, H, W, 3] (BT.601), both for 8 bits."""
  weighted = pictures * _LUMA.reshape(1, 1, 1, 3)
  return _BLACK + jnp.sum(weighted, axis=-1, keepdims=True)


def psnr(pictures: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the peak signal-to-noise ratio [N] in dB, at most 100.

  Args:
    pictures: [N, H, W, C], 0 .. 255.
    labels: [N, H, W, C], the same.
  """
  error = jnp.mean(jnp.square(pictures - labels), axis=(1, 2, 3))
  least = _PEAK**2 * 10 ** (-_HIGHEST / 10)
  return 10 * jnp.log10(_PEAK**2 / jnp.maximum(error, least))


def ssim(pictures: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean structural similarity [N] (Wang et al. 2004).

  Windows lie inside of the picture. It is the mean over channels.

  Args:
    pictures: [N, H, W, C], 0 .. 255; H and W are at least 11.
    labels: [N, H, W, C], the same.
  """
  # Variances are those of the distance from the mean of the picture: squares
  # of the values themselves would lose digits.
  middle = jnp.mean(labels, axis=(1, 2, 3), keepdims=True)
  x, y = pictures - middle, labels - middle
  mean_x, mean_y = _smoothed(x), _smoothed(y)
  var_x = _smoothed(x * x) - mean_x**2
  var_y = _smoothed(y * y) - mean_y**2
  covariance = _smoothed(x * y) - mean_x * mean_y
  mean_x, mean_y = mean_x + middle, mean_y + middle
  similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
  similarity /= (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
  return jnp.mean(similarity, axis=(1, 2, 3))


def _smoothed(x: jax.Array) -> jax.Array:
  """Returns means in Gaussian windows, [N, H - 10, W - 10, C]."""
  offsets = np.arange(_WINDOW) - _WINDOW // 2
  weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
  weights = (weights / weights.sum()).tolist()
  for axis in (1, 2):
    size = x.shape[axis] - _WINDOW + 1
    x = sum(
      w * jax.lax.slice_in_dim(x, i, i + size, axis=axis)
      for i, w in enumerate(weights)
    )
  return x


def _errors(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.abs(outputs - labels.astype(jnp.float32) / _PEAK)


def _compared(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns outputs and labels as 8-bit pictures without their borders."""
  labels = batch['label'].astype(jnp.float32)
  border = labels.shape[1] // batch['image'].shape[1]
  inside = slice(border, -border)
  return quantized(outputs)[:, inside, inside], labels[:, inside, inside]
