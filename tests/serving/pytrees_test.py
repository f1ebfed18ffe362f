"""Trees of inputs and outputs: served by name, and built again as they were."""

import collections
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import export
from fliqs_jax import serving
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.space import discovery
from tests import helpers


class Batch(NamedTuple):
  """Inputs that a dict would have in another order."""

  query: Any
  key: Any


QUERY, KEY = np.full((2, 4), 3, np.float32), np.ones((2, 4), np.float32)


def written(out, function, *args):
  """Exports a function of parameters and inputs."""
  params = dict(w=helpers.random((4, 3)))
  spec = fliqs.QuantSpec('int_s')
  model = searchable_lib.searchable(function, spec, params=params)
  space = discovery.find(model, *args)
  choices = space.uniform('INT8')
  at = {**model.init(None, *args), 'arch': space.expand(choices)}
  _, changed = model.apply(at, *args, mutable=['quant_stats'])
  fliqs.export_model(model, at | changed, choices, *args, out=out)
  return out


@pytest.fixture(scope='module', name='exported')
def _exported(tmp_path_factory):
  def towers(params, batch):
    return dict(scores=batch.query @ params['w'], apart=batch.query - batch.key)

  out = tmp_path_factory.mktemp('exports') / 'out'
  return written(out, towers, Batch(QUERY, KEY))


@pytest.mark.parametrize(
  'batch',
  [
    Batch(QUERY, KEY),
    dict(query=QUERY, key=KEY),
    collections.OrderedDict(key=KEY, query=QUERY),
    collections.OrderedDict(query=QUERY, key=KEY),
  ],
)
def test_inputs_are_those_of_their_names_in_any_class(exported, batch):
  served = serving.load(exported)
  np.testing.assert_array_equal(served(batch)['apart'], np.full((2, 4), 2))
  # The second call of a structure is not checked again.
  np.testing.assert_array_equal(served(batch)['apart'], np.full((2, 4), 2))


def test_slices_are_of_inputs_in_the_order_of_the_export(exported):
  served = serving.load(exported, at_once=1)
  apart = served(dict(query=QUERY, key=KEY))['apart']
  np.testing.assert_array_equal(apart, np.full((2, 4), 2))


def test_an_export_is_verified_where_a_class_is_not_known(
  exported, monkeypatch
):
  monkeypatch.delattr(sys.modules[__name__], 'Batch')
  assert export.verify(exported)['bit_equal']
