"""The versions of the packages that decide about a run's numbers."""

import importlib.metadata


def versions() -> dict[str, str]:
  """Returns the versions that decide about numbers."""
  packages = ('fliqs_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
  return {name: importlib.metadata.version(name) for name in packages}
