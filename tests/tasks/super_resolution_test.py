"""Super-resolution: loss, PSNR and SSIM, against scikit-image and by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import metrics

from fliqs_jax.data import dataset as dataset_lib
from fliqs_jax.report import number_text
from fliqs_jax.tasks import classification
from fliqs_jax.tasks import super_resolution

SCALE, SIZE = 2, 32
# BT.601 in 8 bits, with 16 for black.
LUMA = np.array([65.738, 129.057, 25.064]) / 256


def _pictures(count=3, seed=0):
  """Returns uint8 [N, 32, 32, 3]: slopes, edges and noise."""
  rng = np.random.default_rng(seed)
  slope = np.linspace(20, 180, SIZE)[:, None, None]
  edges = 50 * (np.arange(SIZE) % 8 < 4)[None, :, None]
  noise = rng.normal(0, 12, (count, SIZE, SIZE, 3))
  return np.clip(slope + edges + noise, 0, 255).astype(np.uint8)


def _batch(labels, mask=None):
  count = len(labels)
  small = jnp.asarray(labels[:, ::SCALE, ::SCALE] / np.float32(255))
  return dict(
    image=small,
    label=jnp.asarray(labels),
    example_mask=jnp.ones(count) if mask is None else jnp.asarray(mask),
  )


def _outputs(labels, seed=1):
  rng = np.random.default_rng(seed)
  noise = rng.normal(0, 0.03, labels.shape)
  return (labels / 255 + noise).astype(np.float32)


def _summary(outputs, batch):
  sums = jax.jit(super_resolution.measure)(jnp.asarray(outputs), batch)
  return super_resolution.summarize(jax.device_get(sums))


def _scikit_image(made, label, **channels):
  return (
    metrics.peak_signal_noise_ratio(label, made, data_range=255),
    metrics.structural_similarity(
      label,
      made,
      data_range=255,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
      **channels,
    ),
  )


def test_metrics_are_those_of_scikit_image():
  labels = _pictures()
  outputs = _outputs(labels)
  summary = _summary(outputs, _batch(labels))
  inside = slice(SCALE, -SCALE)
  made = np.round(255 * np.clip(outputs, 0, 1))[:, inside, inside]
  expected = labels[:, inside, inside].astype(np.float64)
  made = made.astype(np.float64)
  rgb = [_scikit_image(a, b, channel_axis=-1) for a, b in zip(made, expected)]
  grey = [
    _scikit_image(16 + a @ LUMA, 16 + b @ LUMA) for a, b in zip(made, expected)
  ]
  for names, values in (
    (('PSNR_rgb', 'SSIM_rgb'), rgb),
    (('PSNR', 'SSIM'), grey),
  ):
    for name, mean in zip(names, np.mean(values, axis=0)):
      assert summary[name] == pytest.approx(mean, abs=1e-4), name


def test_ssim_is_right_where_contrast_is_small_and_pictures_are_bright():
  rng = np.random.default_rng(0)
  label = np.round(240 + rng.normal(0, 1, (1, SIZE, SIZE, 1)))
  made = label + np.round(rng.normal(0, 1, label.shape))
  _, expected = _scikit_image(made[0, ..., 0], label[0, ..., 0])
  found = super_resolution.ssim(
    jnp.asarray(made, jnp.float32), jnp.asarray(label, jnp.float32)
  )
  assert float(found[0]) == pytest.approx(expected, abs=1e-4)


def test_an_error_of_one_level_everywhere_is_48_dB():
  labels = np.full((1, SIZE, SIZE, 3), 100, np.uint8)
  outputs = (labels + 1) / np.float32(255)
  summary = _summary(outputs, _batch(labels))
  # 10 log10(255^2 / 1); Y changes by 219.859 / 256 levels a level of grey.
  assert summary['PSNR_rgb'] == pytest.approx(48.1308, abs=1e-3)
  of_luma = 48.1308 - 20 * np.log10(219.859 / 256)
  assert summary['PSNR'] == pytest.approx(of_luma, abs=1e-3)
  assert summary['loss'] == pytest.approx(1 / 255, rel=1e-4)


def test_equal_pictures_have_a_finite_psnr():
  labels = _pictures(1)
  summary = _summary(labels / np.float32(255), _batch(labels))
  assert summary['PSNR'] == pytest.approx(100)
  assert summary['SSIM'] == pytest.approx(1)


def test_values_are_clipped_and_rounded_to_eight_bits():
  labels = np.zeros((1, SIZE, SIZE, 3), np.uint8)
  labels[..., 1] = 255
  outputs = labels / np.float32(255)
  outputs = outputs + np.array([-0.2, 0.3, 0.4 / 255], np.float32)
  assert _summary(outputs, _batch(labels))['PSNR'] == pytest.approx(100)


def test_the_border_does_not_count():
  labels = _pictures(1)
  outputs = labels / np.float32(255)
  outputs[:, :SCALE] = outputs[:, -SCALE:] = 0
  outputs[:, :, :SCALE] = outputs[:, :, -SCALE:] = 0
  assert _summary(outputs, _batch(labels))['PSNR'] == pytest.approx(100)
  outputs[:, SCALE] = 0
  assert _summary(outputs, _batch(labels))['PSNR'] < 40


def test_padding_does_not_count():
  labels = _pictures(3)
  outputs = _outputs(labels)
  two = _summary(outputs[:2], _batch(labels[:2]))
  padded = _summary(outputs, _batch(labels, [1.0, 1.0, 0.0]))
  assert padded == pytest.approx(two, rel=1e-6)
  assert padded['examples'] == 2


def test_enlargement_is_measured_beside_the_network():
  labels = _pictures(2)
  batch = _batch(labels)
  enlarged = super_resolution.bicubic(batch['image'], labels.shape)
  summary = _summary(enlarged, batch)
  assert summary['PSNR'] == pytest.approx(summary['PSNR_bicubic'], rel=1e-6)


def test_loss_and_qualities_by_hand():
  labels = np.zeros((2, SIZE, SIZE, 3), np.uint8)
  labels[1] = 51  # 0.2
  outputs = jnp.full(labels.shape, 0.1)
  batch = _batch(labels)
  value, logged = super_resolution.loss(0.0)(outputs, batch)
  assert float(value) == pytest.approx(0.1)
  assert logged['loss'] == value
  assert float(super_resolution.minus_l1(outputs, batch)) == -value
  summary = _summary(outputs, batch)
  quality = super_resolution.mean_psnr(outputs, batch)
  assert float(quality) == pytest.approx(summary['PSNR'], rel=1e-6)


def test_label_smoothing_is_refused():
  with pytest.raises(ValueError, match='label_smoothing=0.1 must be 0'):
    super_resolution.loss(0.1)


def test_a_task_refuses_labels_of_another_kind():
  classes = types.SimpleNamespace(num_classes=10, label=dataset_lib.Spec(()))
  with pytest.raises(ValueError, match='labels are pictures'):
    super_resolution.output_shape(classes)
  pictures = types.SimpleNamespace(
    num_classes=0, label=dataset_lib.Spec((8, 8, 3))
  )
  assert super_resolution.output_shape(pictures) == (8, 8, 3)
  with pytest.raises(ValueError, match='labels are classes'):
    classification.output_shape(pictures)


@pytest.mark.parametrize(
  ('metric', 'value', 'spelled', 'title', 'difference'),
  [
    ('accuracy', 0.971, '97.10%', 'test accuracy, %', 'points'),
    ('PSNR', 33.309, '33.31 dB', 'test PSNR, dB', 'dB'),
  ],
)
def test_a_metric_has_the_unit_of_its_task(
  metric, value, spelled, title, difference
):
  assert number_text.quality(value, metric) == spelled
  assert number_text.title(metric) == title
  assert number_text.points(metric) == difference
  assert number_text.quality(float('nan'), metric) == number_text.UNKNOWN
