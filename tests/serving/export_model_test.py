"""Exports of any model: small files, served without it, bit for bit.

All tests compare bits; layers of every kind, scans and what another process
runs are compiled as users do.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

from flax import core
from flax import nnx
from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import export
from fliqs_jax import serving
from fliqs_jax.numerics import formats
from fliqs_jax.program import searchable as searchable_lib
from fliqs_jax.serving import export_files
from fliqs_jax.space import discovery
from fliqs_jax.space import quant_spec
from tests import helpers
from tests.serving import cases

pytestmark = pytest.mark.slow


def tensors_of(out):
  return export_files.read(out).tensors


TOKENS = np.array([[1, 2, 3, 10], [0, 5, 5, 7]])


class Kinds(nn.Module):
  """Layers of most kinds, and a table that is the head, too."""

  @nn.compact
  def __call__(self, tokens, train):
    how = dict(kernel_init=helpers.by_key)
    embed = nn.Embed(11, 8, embedding_init=helpers.by_key, name='embed')
    x = nn.Conv(8, (3,), name='conv', **how)(embed(tokens))
    x = x + nn.MultiHeadDotProductAttention(2, name='attention', **how)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.ConvTranspose(8, (3,), name='transpose', **how)(x)
    x = nn.Einsum((8, 2, 4), 'btd,dhk->bthk', name='einsum', **how)(x)
    x = nn.DenseGeneral(8, axis=(-2, -1), name='general', **how)(x)
    return embed.attend(x)


@pytest.mark.optimized
def test_every_kind_of_layer_is_served(tmp_path):
  run = cases.Run(
    Kinds(),
    TOKENS,
    names=['INT4', 'INT8', 'BF16'],
    call=dict(train=False),
    spec=fliqs.QuantSpec(('INT4', 'INT8', 'E4M3', 'BF16'), mode='separate'),
    embed=True,
    attention=True,
  )
  integers = ('transpose', 'conv', 'einsum', 'general')
  run.choices = {
    name: np.eye(4)[1] if name.split('/')[0] in integers else choice
    for name, choice in run.choices.items()
  }
  run.variables['arch'] = run.space.expand(run.choices)
  manifest = run.check(tmp_path / 'out')
  assert manifest['program'] == dict(batch='any')
  kinds = {
    path: (entry['arithmetic'], entry['tensor'])
    for path, entry in manifest['layers'].items()
  }
  assert kinds['attention/qk'] == kinds['attention/av'] == ('float32', '')
  for path in kinds:
    if path in integers:
      assert kinds[path] == ('int8', f'params/{path}/weights')
  tensors = tensors_of(tmp_path / 'out')
  # The table of the look-up and of the head is stored once: 88 codes of 4 bits.
  assert kinds['embed'] == ('float32', 'params/embed/weights')
  assert kinds['embed#2'][1] == 'params/embed/weights'
  assert tensors['params/embed/weights'].nbytes == 44
  assert [name for name in tensors if name.startswith('params/embed')] == [
    'params/embed/weights'
  ]
  # The model's own statistics are there, those of the search are not.
  assert {
    '/'.join(name.split('/')[:2])
    for name in tensors
    if name.startswith('variables')
  } == {'variables/params', 'variables/batch_stats'}


def test_thresholds_that_strategies_find_are_served(tmp_path):
  run = cases.Run(
    Kinds(),
    TOKENS,
    names=['INT4:eq', 'INT4:kl', 'INT4:admm'],
    call=dict(train=False),
    spec=fliqs.QuantSpec(
      ('INT4',), strategies=('kl', 'eq', 'admm'), mode='separate'
    ),
    embed=True,
  )
  calibrate = functools.partial(
    run.model.apply, mutable=['quant_stats', 'calibration'], train=False
  )
  calibrate = jax.jit(calibrate, compiler_options=helpers.FAST)
  _, found = calibrate(run.variables, TOKENS)
  assert (found['quant_stats']['general']['weight_ratio'][2] < 1).any()
  run.variables = {**run.variables, **found}
  run.check(tmp_path / 'out')


class Nested(nn.Module):
  """A stack as an iteration of another, and two products of activations."""

  @nn.compact
  def __call__(self, x, _):
    x = cases.stack(cases.Body, 2, name='inner')(x, None)[0]
    with jax.named_scope('attention'):
      scores = nn.softmax(jnp.einsum('nd,md->nm', x, x))
      return jnp.einsum('nm,md->nd', scores, x), None


class Stacks(nn.Module):
  """Stacks of every kind, side by side."""

  @nn.compact
  def __call__(self, x):
    slices = nn.vmap(
      cases.Body, variable_axes={'params': 0}, split_rngs={'params': True}
    )(name='vmap')
    return dict(
      axis1=cases.stack(nn.remat(cases.Body), 2, 1, name='axis1')(x, None)[0],
      vmap=slices(jnp.stack([x, -x]))[0].sum(0),
      nested=cases.stack(Nested, 2, name='nested')(x, None)[0],
    )


def test_each_iteration_of_a_stack_has_its_own_format(tmp_path):
  run = cases.Run(
    Stacks(), cases.X, names=['INT4', 'BF16', 'INT8'], attention=True
  )
  for name in run.choices:
    if name.startswith(('axis1', 'vmap')):
      last = int(name.rpartition('@')[2]) % 2
      run.choices[name] = np.eye(3)[last]
  run.variables['arch'] = run.space.expand(run.choices)
  layers = run.check(tmp_path / 'out')['layers']
  assert set(layers) == set(run.space.assignment(run.choices))
  # A product runs in integers if all of its iterations can.
  integers = {
    path.rpartition('/@')[0]
    for path, entry in layers.items()
    if entry['arithmetic'] == 'int8'
  }
  assert integers == {
    f'{name}/{layer}' for name in ('axis1', 'vmap') for layer in ('up', 'down')
  }
  tensors = tensors_of(tmp_path / 'out')
  for path, entry in layers.items():
    if path.startswith('nested/attention'):  # Neither operand is stored.
      assert (entry['shape'], entry['tensor']) == ([], '')
      continue
    bits = formats.parse(entry['weights']).bits
    stored = tensors[f'params/{path}/weights'].nbytes
    assert stored == np.prod(entry['shape']) * bits // 8
  used = {layers[f'nested/inner/up/@{i}']['weights'] for i in range(4)}
  assert len(used) == 3
  products = {
    f'nested/attention/{name}/@{i}' for name in ('qk', 'av') for i in (0, 1)
  }
  assert products < set(layers)


class Recurrent(nn.Module):
  """A cell with the same weights in every iteration, and a stack."""

  @nn.compact
  def __call__(self, x):
    y = nn.RNN(nn.GRUCell(8), name='rnn')(jnp.stack([x, -x], axis=1))
    return y[:, -1] + cases.stack(cases.Body, 3)(x, None)[0]


@pytest.mark.optimized
@pytest.mark.parametrize(
  ('mode', 'stacks'), [('activations', 'separate'), ('weights', 'shared')]
)
def test_one_side_of_some_layers(mode, stacks, tmp_path):
  spec = fliqs.QuantSpec(mode=mode, exclude=('body/down',))
  run = cases.Run(
    Recurrent(),
    cases.X,
    names=['INT4', 'INT8', 'BF16'],
    spec=spec,
    stacks=stacks,
  )
  entries = run.check(tmp_path / 'out')['layers']
  assert {f'body/up/@{i}' for i in range(3)} <= set(entries)
  assert not any(path.startswith('body/down') for path in entries)
  assert any(path.startswith('GRUCell_0/') for path in entries)
  other = 'weights' if mode == 'activations' else 'activations'
  assert {e[other] for e in entries.values()} == {None}
  names = {entries[f'body/up/@{i}'][mode] for i in range(3)}
  assert len(names) == (1 if stacks == 'shared' else 3)


class Twice(nn.Module):
  """One layer that is called twice, and two blocks alike, which are jitted."""

  @nn.compact
  def __call__(self, x):
    shared = cases.Dense(8, name='shared')
    block = nn.jit(cases.Body)
    x, _ = block(name='a')(shared(x))
    x, _ = block(name='b')(x)
    return shared(x)


def test_weights_that_are_used_twice_are_stored_once(tmp_path):
  run = cases.Run(Twice(), cases.X, names=['INT8', 'INT4'])
  layers = run.check(tmp_path / 'out')['layers']
  assert layers['shared']['tensor'] == layers['shared#2']['tensor']
  assert layers['a/up']['weights'] != layers['a/down']['weights']
  stored = [n for n in tensors_of(tmp_path / 'out') if n.startswith('params/')]
  assert sorted(stored) == [
    f'params/{name}/weights'
    for name in ('a/down', 'a/up', 'b/down', 'b/up', 'shared')
  ]


class Pair(NamedTuple):
  """Named outputs."""

  sums: Any
  best: Any


@struct.dataclass
class Outputs:
  """Outputs of a class that is registered as a node of trees."""

  logits: Any
  parts: Any
  name: str = struct.field(pytree_node=False, default='towers')


class TwoTowers(nn.Module):
  """Two inputs of which one is a tree, options, and a tree of outputs."""

  def setup(self):
    self.embed = nn.Embed(5, 8)
    self.image = nn.Dense(
      8,
      kernel_init=nn.with_partitioning(helpers.by_key, ('in', None)),
      dtype=jnp.bfloat16,
    )
    self.head = cases.Dense(3)

  def encode(self, inputs):
    return self.image(inputs['image']) + self.embed(inputs['token'])

  def __call__(self, inputs, mask, *, scale, mode='both'):
    x = self.encode(inputs) * mask[None] * scale
    pair = Pair(x.sum(-1), jnp.argmax(x, -1))
    outputs = Outputs(self.head(x), dict(pair=pair, all=[x, (x,)]))
    return outputs if mode == 'both' else outputs.logits


INPUTS = dict(image=helpers.random((4, 8)), token=np.array([0, 4, 2, 2]))
MASK = np.arange(8) % 3 > 0


@pytest.fixture(scope='module', name='towers')
def _towers():
  return cases.Run(
    TwoTowers(),
    INPUTS,
    MASK,
    names=['INT8', 'INT4'],
    call=dict(scale=0.5),
    embed=True,
  )


def test_several_inputs_options_and_trees_of_outputs(towers, tmp_path):
  run = towers
  boxed = core.freeze(run.variables)
  manifest = run.export(tmp_path / 'out', **boxed)
  assert manifest['reference']['bit_equal']
  # The mask is of no example, so its axis stays as it is.
  assert manifest['program'] == dict(batch='any')
  served = serving.load(tmp_path / 'out')
  found, expected = served(INPUTS, MASK), run.evaluate(INPUTS, MASK)
  assert isinstance(found, Outputs)
  assert isinstance(found.parts['pair'], Pair)
  helpers.same(found, expected)
  assert export.verify(tmp_path / 'out')['bit_equal']
  # The batch size of the program is open.
  one = {k: x[:1] for k, x in INPUTS.items()}
  np.testing.assert_allclose(
    served(one, MASK).logits, expected.logits[:1], atol=1e-5
  )
  with pytest.raises(ValueError, match='another structure .* got .*image'):
    served(dict(image=INPUTS['image']), MASK)


def test_a_method_of_the_model_is_exported(towers, tmp_path):
  with pytest.raises(ValueError, match='missing are none; surplus are head'):
    export.export_model(
      towers.model,
      towers.variables,
      towers.choices,
      INPUTS,
      method='encode',
      out=tmp_path / 'out',
    )
  assert not (tmp_path / 'out').exists()
  choices = {k: v for k, v in towers.choices.items() if k != 'head'}
  manifest = export.export_model(
    towers.model,
    towers.variables,
    choices,
    INPUTS,
    method='encode',
    out=tmp_path / 'out',
  )
  assert set(manifest['layers']) == {'image', 'embed'}
  assert manifest['reference']['bit_equal']


class Random(nn.Module):
  """A model that draws random numbers when it evaluates."""

  @nn.compact
  def __call__(self, x):
    x = x + jax.random.normal(self.make_rng('noise'), x.shape)
    return cases.Dense(3, name='dense')(x)


def test_keys_are_inputs_of_a_model_that_draws_random_numbers(tmp_path):
  # As many examples as a key has words.
  rngs = dict(noise=jax.random.key(5))
  run = cases.Run(Random(), cases.X, names=['INT8'], rngs=rngs)
  manifest = run.export(tmp_path / 'out')
  assert manifest['reference']['bit_equal']
  assert manifest['program'] == dict(batch='any')
  served = serving.load(tmp_path / 'out')
  other = dict(noise=jax.random.key(6))
  helpers.same(served(cases.X, rngs=other), run.evaluate(cases.X, rngs=other))
  assert np.any(served(cases.X, rngs=other) != served(cases.X, rngs=rngs))
  assert export.verify(tmp_path / 'out')['bit_equal']
  with pytest.raises(ValueError, match='another structure'):
    served(cases.X)


class Network(nn.Module):
  """Two layers of which the second multiplies floats."""

  @nn.compact
  def __call__(self, x, train):
    x = cases.Dense(8, name='first')(x)
    x = cases.Dense(6, name='second')(nn.tanh(x))
    return x if train else nn.tanh(x)


@pytest.fixture(scope='module', name='network')
def _network():
  return cases.Run(
    Network(), cases.X, names=['INT4', 'BF16'], call=dict(train=False)
  )


@pytest.fixture(scope='module', name='exported')
def _exported(network, tmp_path_factory):
  out = tmp_path_factory.mktemp('exports') / 'out'
  network.export(out)
  return out


@pytest.mark.optimized
def test_the_command_line_verifies_an_export_of_any_model(exported, capsys):
  assert export.main(['--verify', str(exported)]) == 0
  assert json.loads(capsys.readouterr().out)['bit_equal']


@pytest.mark.optimized
def test_a_process_with_jax_and_numpy_alone_runs_the_programs(
  exported, network, tmp_path
):
  # The text of docs/serving.md, which users copy.
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'serving.md'
  recipe = page.read_text().partition('```py\nimport json\n')[2]
  recipe = 'import json\n' + recipe.partition('```')[0]
  x = helpers.random((5, 8), seed=2)
  np.save(tmp_path / 'x.npy', x)
  after = textwrap.dedent("""
    import sys
    heavy = {'fliqs_jax', 'flax', 'safetensors'} & set(sys.modules)
    assert not heavy, heavy
    numpy.save('y.npy', outputs[0])
  """)
  script = recipe.replace("'served/b'", repr(str(exported))) + after
  script = script.replace('[images]', "[numpy.load('x.npy')]")
  # Compiled as here: optimized.
  env = os.environ | dict(XLA_FLAGS='')
  command = [sys.executable, '-c', script]
  subprocess.run(command, cwd=tmp_path, check=True, env=env)
  y = np.load(tmp_path / 'y.npy')
  np.testing.assert_array_equal(y, serving.load(exported)(x))
  np.testing.assert_array_equal(y, network.evaluate(x))


@pytest.mark.optimized
def test_a_batch_may_run_in_slices_and_under_jit(exported, network):
  x = helpers.random((5, 8), seed=2)
  expected = network.evaluate(x)
  sliced = serving.load(exported, at_once=2)
  np.testing.assert_allclose(sliced(x), expected, atol=1e-6)
  whole = serving.load(exported)
  np.testing.assert_array_equal(jax.jit(whole)(x), expected)


def test_inputs_of_another_shape_or_type_are_refused(exported):
  served = serving.load(exported)
  takes = r'but the export takes float32\[batch,8\]'
  with pytest.raises(ValueError, match=rf'input 0 is float32\[2, 7\], {takes}'):
    served(np.zeros((2, 7)))
  with pytest.raises(ValueError, match=rf'input 0 is int32\[2, 8\], {takes}'):
    served(np.zeros((2, 8), np.int64))


@pytest.mark.parametrize('at_once', [0, -1, 2.5, '8', True])
def test_a_number_of_slices_that_is_none_is_refused(at_once, exported):
  with pytest.raises(ValueError, match='at_once=.* whole number of at least 1'):
    serving.load(exported, at_once=at_once)


@pytest.mark.parametrize('at_once', [None, 2])
def test_inputs_without_examples_are_refused(at_once, exported):
  served = serving.load(exported, at_once=at_once)
  with pytest.raises(ValueError, match=r'input 0 is float32\[0, 8\]: .* no ex'):
    served(np.zeros((0, 8), np.float32))


@pytest.mark.parametrize('mix', ['composite', 'branched'])
def test_a_model_that_mixed_formats_is_served_at_one_of_each(mix, tmp_path):
  params = dict(w=helpers.random((8, 3)))

  def searched(mix):
    spec = quant_spec.QuantSpec('int_s', mix=mix)
    model = searchable_lib.searchable(
      lambda params, x: dict(y=x @ params['w'], largest=params['w'].max(0)),
      spec,
      params=params,
    )
    return model, discovery.find(model, cases.X)

  model, space = searched(mix)
  choices = space.uniform('INT4')
  at = {**model.init(None, cases.X), 'arch': space.expand(choices)}
  _, changed = model.apply(at, cases.X, mutable=['quant_stats'])
  export.export_model(
    model, at | changed, choices, cases.X, out=tmp_path / 'out'
  )
  sampled, _ = searched('sampled')
  helpers.same(
    serving.load(tmp_path / 'out')(cases.X),
    jax.tree.map(np.asarray, sampled.apply(at | changed, cases.X)),
  )
  # Slices of an output that is of no example cannot be joined.
  with pytest.raises(ValueError, match='output 0, .* has no axis of examples'):
    serving.load(tmp_path / 'out', at_once=1)


class NnxNorm(nnx.Module):
  """A module that is made in its training mode, as NNX's are."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(8, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.dense(x))


def test_a_call_that_trains_is_not_served(tmp_path):
  spec = quant_spec.QuantSpec('int_s')
  model = searchable_lib.searchable(NnxNorm(nnx.Rngs(0)), spec)
  space = discovery.find(model, cases.X)
  choices = space.uniform('INT8')
  at = {**model.init(None, cases.X), 'arch': space.expand(choices)}
  _, changed = model.apply(
    at, cases.X, train=True, mutable=['quant_stats', 'nnx_state']
  )
  with pytest.raises(ValueError, match='changes nnx_state/norm/.*train=False'):
    export.export_model(
      model, at | changed, choices, cases.X, out=tmp_path / 'out'
    )
  export.export_model(
    model, at | changed, choices, cases.X, train=False, out=tmp_path / 'out'
  )
  x = helpers.random((6, 8))
  served = serving.load(tmp_path / 'out')
  np.testing.assert_allclose(served(x)[:2], served(x[:2]), atol=1e-6)


class FixedBatch(nn.Module):
  """A model that needs its batch size as a number."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, kernel_init=helpers.by_key)(x.reshape((len(x), -1)))


def test_a_program_of_a_fixed_batch_size_says_so(tmp_path):
  manifest = cases.Run(FixedBatch(), cases.X, names=['INT8']).check(
    tmp_path / 'out'
  )
  assert manifest['program'] == dict(batch=2)
  with pytest.raises(ValueError, match='of len.x.: write x.shape.0. and'):
    serving.load(tmp_path / 'out')(helpers.random((3, 8)))
  with pytest.raises(ValueError, match='at_once=3.* use at_once=2'):
    serving.load(tmp_path / 'out', at_once=3)
  # Slices of two examples; the third has a slice of its own, filled up.
  served = serving.load(tmp_path / 'out', at_once=2)
  outputs = served(np.concatenate([cases.X, cases.X[:1]]))
  helpers.same(outputs, np.concatenate([served(cases.X), served(cases.X)[:1]]))


def test_wrong_calls_are_refused(network, tmp_path):
  def refused(message, model=network.model, args=(cases.X,), **changed):
    kwargs = dict(train=False, out=tmp_path / 'out') | changed
    choices = kwargs.pop('choices', network.choices)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    with pytest.raises(ValueError, match=message):
      export.export_model(model, network.variables, choices, *args, **kwargs)

  refused('Network is called as .*missing .*train', train=None)
  refused('Network is called as .*missing .*x', args=())
  refused('mutable=.*changes no variables', mutable=['batch_stats'])
  refused(r'input \[1\] is False, a bool: .* by keyword', args=(cases.X, False))
  refused('missing are second; surplus are none', choices={'first': [1, 0, 0]})
  refused('Network was not made by searchable', model=network.module)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').touch()
  refused('full is not empty', out=tmp_path / 'full')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('module', [nn.Dense(3), cases.Scanned()])
def test_activations_that_never_were_quantized_are_refused(module, tmp_path):
  run = cases.Run(module, cases.X, names=['INT8'])
  off = fliqs.set_activation_quantization(run.variables['quant_stats'], False)
  with pytest.raises(ValueError, match='never quantized'):
    run.export(tmp_path / 'out', quant_stats=off)
  fresh = helpers.init(run.model, cases.X)['quant_stats']
  with pytest.raises(ValueError, match='never quantized'):
    run.export(tmp_path / 'out', quant_stats=fresh)
  assert not (tmp_path / 'out').exists()


def test_strategies_that_found_no_threshold_are_refused(tmp_path):
  def untrained(name):
    spec = fliqs.QuantSpec(name)
    return cases.Run(nn.Dense(3), cases.X, names=[name], spec=spec)

  run = untrained('INT4:kl')
  with pytest.raises(ValueError, match='strategies of .* found no thresholds'):
    run.export(tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  untrained('INT4:max_abs').export(tmp_path / 'out')  # It needs no search.


def test_a_branch_that_an_iteration_never_takes_needs_no_scale(tmp_path):
  x = np.float32([[0.5, -1.0], [2.0, 0.25]])
  params = dict(stack=np.float32([[[1, 2], [3, 4]], [[-1, 0], [2, 1]]]))

  def alternate(params, x, first):
    def layer(x, scanned):
      weights, i = scanned
      up, down = lambda x: x @ weights + 1, lambda x: x @ weights - 1
      return jax.lax.cond((i + first) % 2 == 0, up, down, x), None

    return jax.lax.scan(layer, x, (params['stack'], jnp.arange(2)))[0]

  model = fliqs.searchable(alternate, fliqs.QuantSpec('INT8'), params=params)
  space = fliqs.find_decisions(model, x, 0)
  choices = space.only()
  variables = model.init(jax.random.key(0), x, 0)
  variables['arch'] = space.expand(choices)
  _, changed = model.apply(variables, x, 0, mutable=['quant_stats'])
  variables |= changed
  export.export_model(
    model, variables, choices, x, np.int32(0), out=tmp_path / 'out'
  )
  served = serving.load(tmp_path / 'out')
  helpers.same(served(x, np.int32(0)), model.apply(variables, x, np.int32(0)))
  # The other way round each iteration is one that no batch ran.
  assert np.isnan(served(x, np.int32(1))).all()


def test_a_key_among_the_outputs_is_refused(tmp_path):
  key = jax.random.key(0)

  def f(params, inputs):
    return dict(y=inputs['x'] @ params['w'], key=inputs['key'])

  inputs = dict(x=np.eye(2, dtype=np.float32), key=key)
  model = fliqs.searchable(
    f, fliqs.QuantSpec('INT4'), params=dict(w=np.eye(2, dtype=np.float32))
  )
  space = fliqs.find_decisions(model, inputs)
  variables = model.init(key, inputs)
  with pytest.raises(ValueError, match='outputs/key is a typed PRNG key'):
    export.export_model(
      model, variables, space.only(), inputs, out=tmp_path / 'out'
    )


def test_a_model_that_asks_for_shardings_is_refused(tmp_path):
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = jax.sharding.NamedSharding(mesh, jax.P('data'))

  def f(params, x):
    return jax.lax.with_sharding_constraint(x @ params['w'], place)

  x, params = np.eye(2, dtype=np.float32), dict(w=np.eye(2, dtype=np.float32))
  found = fliqs.allocate(
    f, params, [dict(x=x)], 1, spec=fliqs.QuantSpec('INT4')
  )
  with pytest.raises(ValueError, match='for 2 devices, because .*shardings'):
    export.export_model(
      found.model, found.variables, found.choices, x, out=tmp_path / 'out'
    )
  assert not (tmp_path / 'out').exists()


def test_weights_without_a_format_are_served_in_the_type_of_the_program(
  tmp_path,
):
  # The parameters are float32, and the author casts them: so does the search.
  module = nn.Dense(3, dtype=jnp.bfloat16, kernel_init=helpers.by_key)
  spec = fliqs.QuantSpec('INT8', mode='activations')
  cases.Run(module, cases.X, names=['INT8'], spec=spec).check(tmp_path / 'out')


def test_a_haiku_model_is_exported_whose_averages_training_makes(tmp_path):
  haiku = pytest.importorskip('haiku')

  def network(x, is_training):
    x = haiku.BatchNorm(True, True, 0.9)(haiku.Linear(4)(x), is_training)
    return haiku.Linear(2)(x)

  transformed = haiku.transform_with_state(network)
  model = fliqs.searchable(transformed, fliqs.QuantSpec('int8'))
  x = helpers.random((4, 3))
  variables = helpers.init(model, x, is_training=True)
  _, changed = jax.jit(
    lambda v: model.apply(v, x, is_training=True, mutable=list(v)),
    compiler_options=helpers.FAST,
  )(variables)
  variables |= changed
  space = fliqs.find_decisions(model, x, is_training=True)
  out = tmp_path / 'out'
  fliqs.export_model(
    model, variables, space.uniform('INT8'), x, out=out, is_training=False
  )
  new = helpers.random((4, 3), 1)
  expected = jax.jit(lambda v: model.apply(v, new, is_training=False))(
    variables | dict(arch=space.expand(space.uniform('INT8')))
  )
  np.testing.assert_array_equal(serving.load(out)(new), expected)
