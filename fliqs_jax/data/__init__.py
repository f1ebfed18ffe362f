"""Batches for train, valid and test; importing this reads no data library."""

from fliqs_jax.data.dataset import Arrays
from fliqs_jax.data.dataset import Dataset
from fliqs_jax.data.dataset import Spec
from fliqs_jax.data.dataset import model_inputs
from fliqs_jax.data.streams import Streams
from fliqs_jax.data.streams import make_streams
from fliqs_jax.data.streams import unread_streams

__all__ = [
  'Arrays',
  'Dataset',
  'Spec',
  'Streams',
  'make_streams',
  'model_inputs',
  'unread_streams',
]
