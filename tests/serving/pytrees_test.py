"""Trees of inputs and outputs: served by name, and built again as they were."""

import collections
import dataclasses
import json
import re
import shutil
import sys
from typing import Any, NamedTuple

from flax import struct
import jax
import numpy as np
import pytest

from fliqs_jax import export
from fliqs_jax import serving
from fliqs_jax.serving import export_files
from fliqs_jax.serving import pytrees
from tests import helpers
from tests.serving import cases


class Batch(NamedTuple):
  """Inputs that a dict would have in another order."""

  query: Any
  key: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled:
  """A static field, as of the output of a quantized model."""

  values: Any
  scale: float = dataclasses.field(metadata=dict(static=True), default=1.0)


@struct.dataclass
class Named:
  """The same with flax."""

  values: Any
  name: str = struct.field(pytree_node=False, default='none')


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Doubled:
  """Parts that are not the arguments."""

  values: Any

  def __post_init__(self):
    self.values = 2 * self.values

  def tree_flatten_with_keys(self):
    return [(jax.tree_util.GetAttrKey('values'), self.values)], None

  @classmethod
  def tree_unflatten(cls, _, children):
    doubled = object.__new__(cls)
    (doubled.values,) = children
    return doubled


@struct.dataclass
class Strict:
  """A class that needs another one inside."""

  inner: Any

  def __post_init__(self):
    if isinstance(self.inner, dict):
      raise ValueError('inner is a dict')


QUERY, KEY = np.full((2, 4), 3, np.float32), np.ones((2, 4), np.float32)
# As text, '10' is sorted before '2'.
NUMBERED = {i: np.full((2, 1), 10 * i, np.float32) for i in range(12)}


@pytest.fixture(scope='module', name='exported')
def _exported(tmp_path_factory):
  def towers(params, batch, numbered):
    return dict(
      scores=batch.query @ params['w'],
      apart=batch.query - batch.key,
      all=[
        Scaled(batch.query),
        Scaled(batch.query, 255.0),
        Named(batch.query, 'none'),
        Named(batch.query, 'other'),
        Doubled(batch.query),
      ],
      outer=[
        Strict(Scaled(batch.query)),
        Strict(Scaled(batch.query, 255.0)),
        Batch(Scaled(batch.query, 255.0), None),
      ],
      numbered={i: x + i for i, x in numbered.items()},
    )

  out = tmp_path_factory.mktemp('exports') / 'out'
  return cases.written(out, towers, Batch(QUERY, KEY), NUMBERED)


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
  np.testing.assert_array_equal(
    served(batch, NUMBERED)['apart'], np.full((2, 4), 2)
  )
  # The second call of a structure is not checked again.
  np.testing.assert_array_equal(
    served(batch, NUMBERED)['apart'], np.full((2, 4), 2)
  )


def test_slices_are_of_inputs_in_the_order_of_the_export(exported):
  served = serving.load(exported, at_once=1)
  apart = served(dict(query=QUERY, key=KEY), NUMBERED)['apart']
  np.testing.assert_array_equal(apart, np.full((2, 4), 2))


def test_an_export_is_verified_where_a_class_is_not_known(
  exported, monkeypatch
):
  monkeypatch.delattr(sys.modules[__name__], 'Batch')
  assert export.verify(exported)['bit_equal']


def numbered_by(served, numbered):
  return served(Batch(QUERY, KEY), numbered)['numbered']


@pytest.mark.parametrize('name', [int, str])
def test_a_dict_keeps_its_numbers(exported, name):
  found = numbered_by(
    serving.load(exported), {name(i): x for i, x in NUMBERED.items()}
  )
  expected = {i: np.full((2, 1), 11 * i) for i in range(12)}
  assert list(found) == list(expected)
  for i in expected:
    np.testing.assert_array_equal(found[i], expected[i])


def test_an_export_whose_manifest_has_numbers_as_text_is_read(
  exported, tmp_path
):
  out = shutil.copytree(exported, tmp_path / 'out')
  manifest = export_files.read_manifest(out)
  numbered = manifest['outputs']['children'][2]
  given = manifest['inputs']['children'][0]['children'][1]
  for node in numbered, given:
    node['keys'] = [str(i) for i in node['keys']]
  manifest['checksum'] = export_files.checksum(manifest)
  (out / 'manifest.json').write_text(json.dumps(manifest))
  assert export.verify(out)['bit_equal']
  found = numbered_by(serving.load(out), NUMBERED)
  assert sorted(found, key=int) == [str(i) for i in range(12)]
  np.testing.assert_array_equal(found['10'], np.full((2, 1), 110))


@pytest.mark.parametrize('key', [2.5, (0, 1), None, b'x'])
def test_keys_that_a_manifest_cannot_hold_are_refused(key, tmp_path):
  def outputs(params, x):
    return {key: x @ params['w']}

  def inputs(params, named):
    return named[key] @ params['w']

  for function, x in ((outputs, QUERY), (inputs, {key: QUERY})):
    with pytest.raises(
      ValueError, match=f'key {re.escape(repr(key))}, .* str or int'
    ):
      cases.written(tmp_path / 'out', function, x)
  assert not (tmp_path / 'out').exists()


def test_parts_of_the_same_name_are_refused():
  parts = collections.OrderedDict({'0': QUERY, 0: KEY})
  with pytest.raises(
    ValueError, match='of a OrderedDict .*: its parts are 0, 0'
  ):
    pytrees.describe(parts)


def test_a_class_that_its_parts_alone_do_not_make_is_a_dict_of_them(exported):
  outputs = serving.load(exported)(Batch(QUERY, KEY), NUMBERED)
  helpers.same(
    outputs['all'],
    [
      Scaled(QUERY),
      dict(values=QUERY),  # The class has a scale of 1.
      Named(QUERY),
      dict(values=QUERY),
      dict(values=2 * QUERY),  # The class would double it again.
    ],
  )


def test_a_class_is_built_again_around_parts_that_are_dicts(exported):
  outputs = serving.load(exported)(Batch(QUERY, KEY), NUMBERED)
  helpers.same(
    outputs['outer'],
    [
      Strict(Scaled(QUERY)),
      dict(inner=dict(values=QUERY)),
      Batch(dict(values=QUERY), None),
    ],
  )


def test_static_fields_of_inputs_do_not_count(tmp_path):
  def scaled(params, x):
    return dict(y=x.values @ params['w'], values=x.values * x.scale)

  out = cases.written(tmp_path / 'out', scaled, Scaled(QUERY, 2.0))
  assert export.verify(out)['bit_equal']
  served = serving.load(out)
  for x in (Scaled(QUERY, 2.0), Scaled(QUERY), dict(values=QUERY)):
    np.testing.assert_array_equal(served(x)['values'], np.full((2, 4), 6))
