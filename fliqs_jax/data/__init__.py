"""Batches for train, valid and test; importing this reads no data library."""

from fliqs_jax.data.dataset import Dataset
from fliqs_jax.data.streams import Streams
from fliqs_jax.data.streams import make_streams

__all__ = ['Dataset', 'Streams', 'make_streams']
