"""Mixed images and labels agree, are the published mixtures, follow a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.tasks import augment

_KEY = jax.random.key(0)


def _batch(count=6, size=8, num_classes=6):
  """Image i is i everywhere and has label i."""
  numbers = jnp.arange(count, dtype=jnp.float32)
  image = jnp.broadcast_to(numbers[:, None, None, None], (count, size, size, 3))
  return dict(image=image, label=jnp.arange(count) % num_classes)


def _many(mix, count):
  """Returns the batches of `count` keys, stacked."""
  return jax.jit(jax.vmap(mix, in_axes=(0, None)))(
    jax.random.split(_KEY, count), _batch()
  )


def _shares(mixed):
  """Returns lambda of each batch, from its labels; checks that they agree."""
  labels = np.asarray(mixed['label'])  # [M, 6, 6]
  shares = labels[:, 0, 0]
  # Row i has lambda of class i and the rest of class i + 1.
  own = np.eye(6)[None]
  other = np.roll(own, 1, axis=2)
  expected = shares[:, None, None] * own + (1 - shares)[:, None, None] * other
  np.testing.assert_allclose(labels, expected, atol=1e-6)
  return shares


def test_mixup_blends_images_as_labels():
  mixed = _many(augment.mixing(6, mixup=0.8, cutmix=0.0), 20)
  shares = _shares(mixed)
  # lambda i + (1 - lambda) (i + 1) = i + 1 - lambda, from the first image.
  expected = np.broadcast_to(1 - shares[:, None, None, None], (20, 8, 8, 3))
  np.testing.assert_allclose(mixed['image'][:, 0], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('concentration', [0.8, 1.0])
def test_mixup_shares_follow_the_beta_distribution(concentration):
  mix = augment.mixing(6, mixup=concentration, cutmix=0.0)
  shares = _shares(_many(mix, 2000))
  # Mean 1/2 and variance 1 / (4 (2 a + 1)).
  variance = 1 / (4 * (2 * concentration + 1))
  assert abs(shares.mean() - 0.5) < 5 * np.sqrt(variance / 2000)
  # The variance's own deviation is below sqrt(E (x - 1/2)^4 / 2000) < 0.0029.
  assert abs(shares.var() - variance) < 5 * 0.0029


def test_cutmix_pastes_one_rectangle_and_counts_its_area():
  mixed = _many(augment.mixing(6, mixup=0.0, cutmix=1.0), 500)
  shares = _shares(mixed)
  # The first image is 0, its neighbour 1.
  pasted = np.asarray(mixed['image'][:, 0, :, :, 0])
  assert set(np.unique(pasted)) == {0, 1}
  np.testing.assert_allclose(pasted.mean((1, 2)), 1 - shares, atol=1e-6)
  rows, columns = pasted.any(2).sum(1), pasted.any(1).sum(1)
  np.testing.assert_array_equal(rows * columns, pasted.sum((1, 2)))
  # Every pixel is pasted at times, and kept at times.
  assert pasted.mean(0).min() > 0
  assert pasted.mean(0).max() < 1


def test_each_batch_is_mixed_by_one_of_both():
  mixed = _many(augment.mixing(6, mixup=0.8, cutmix=1.0), 400)
  shares = _shares(mixed)
  first = np.asarray(mixed['image'][:, 0])
  flat = np.ptp(first, axis=(1, 2, 3)) < 1e-6
  fraction = np.abs(first[:, 0, 0, 0] - np.round(first[:, 0, 0, 0])) > 1e-6
  blended = flat & fraction
  # 200 with a deviation of 10; the others paste.
  assert abs(blended.sum() - 200) < 50
  assert np.all(np.isin(first[~blended], (0, 1)))
  np.testing.assert_allclose(first.mean((1, 2, 3)), 1 - shares, atol=1e-6)


def test_a_key_decides_everything_and_other_entries_stay():
  mix = augment.mixing(6, mixup=0.8, cutmix=1.0)
  batch = _batch() | dict(extra=jnp.arange(3))
  one, same, other = (
    mix(_KEY, batch),
    mix(_KEY, batch),
    mix(jax.random.key(1), batch),
  )
  for key in one:
    np.testing.assert_array_equal(one[key], same[key])
  assert np.any(one['label'] != other['label'])
  np.testing.assert_array_equal(one['extra'], batch['extra'])
  assert one['label'].dtype == jnp.float32
  assert one['image'].dtype == batch['image'].dtype


def test_nothing_in_it_is_slow_to_compile():
  mix = augment.mixing(6, mixup=0.8, cutmix=1.0)
  program = jax.make_jaxpr(mix)(_KEY, _batch())
  # A rejection loop in it would cost seconds of compilation.
  assert 'while' not in str(program)


@pytest.mark.parametrize(
  ('mixup', 'cutmix'), [(0.0, 0.0), (-0.1, 1.0), (1.0, -1.0)]
)
def test_what_cannot_work_is_refused(mixup, cutmix):
  with pytest.raises(ValueError, match=f'mixup={mixup} and cutmix={cutmix}'):
    augment.mixing(10, mixup, cutmix)
