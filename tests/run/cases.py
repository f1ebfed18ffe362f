"""Spaces and a chip's file that tests of budgets share."""

import itertools

import jax
import jax.numpy as jnp

import fliqs_jax as fliqs
from fliqs_jax.space import quant_spec

# Floats are cheap on it, and its traffic is nothing.
FLOATS_CHEAP = 'latency:tpu_v7'

CHIP = """
name: My chip
source: a test
date: 2026-11
confidence: assumed
latency:
  terabytes_per_second: 1000000
  rates:
  - {formats: INT8, teraops: 2}
  - {formats: BF16, teraops: 1}
"""


def opposed():
  """Returns a space where a small network is slow on TPU v7, and a fast large.

  Integers of 4 bits run as BF16 there, floats of 8 bits at twice that speed.
  """
  layer = fliqs.QuantDense(512, spec=quant_spec.QuantSpec(('INT4', 'E4M3')))
  inputs = jax.ShapeDtypeStruct((1, 4096, 512), jnp.float32)
  return fliqs.find_decisions(layer, inputs)


def every(space):
  """Yields every architecture of a space."""
  for index in itertools.product(
    *(range(len(d.labels)) for d in space.decisions)
  ):
    yield space.at(dict(zip((d.name for d in space.decisions), index)))
