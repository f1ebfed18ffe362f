"""Versions of the packages that influence a run's numbers."""

import importlib.metadata


def versions() -> dict[str, str]:
  """Returns the version of each of these packages, by name."""
  packages = ('fliqs_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
  return {name: importlib.metadata.version(name) for name in packages}
