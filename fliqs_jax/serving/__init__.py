"""Exports: packed weights, which are written, checked, loaded and served."""

from fliqs_jax.serving.loader import Served
from fliqs_jax.serving.loader import load

__all__ = ['Served', 'load']
