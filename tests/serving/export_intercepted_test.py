"""Models that were not written for this: small files, served bit for bit."""

import functools
import json

from flax import core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax as fliqs
from fliqs_jax import export
from fliqs_jax.layers import quant_layers
from fliqs_jax.numerics import formats
from fliqs_jax.serving import export_files
from fliqs_jax.serving import loader
from fliqs_jax.serving import stablehlo
from tests import helpers
from tests.intercept import foreign_models

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

X = helpers.random((2, 8))


class Run:
  """A model that was searched, and what is exported of it."""

  def __init__(self, module, *args, names, call=None, **how):
    self.module, self.args, self.call = module, args, call or {}
    self.model = fliqs.searchable(module, **how)
    self.space = fliqs.find_decisions(self.model, *args, **self.call)
    self.choices = {
      d.name: d.one_hot(names[i % len(names)])
      for i, d in enumerate(self.space.decisions)
    }
    arch = self.space.expand(self.choices)
    variables = helpers.init(self.model, *args, **self.call)
    variables = {**variables, 'arch': arch}
    learn = jax.jit(
      functools.partial(self.model.apply, mutable=['quant_stats'], **self.call)
    )
    # Other inputs than those that will be told about.
    seen = jax.tree.map(lambda x: (x * 0.7).astype(x.dtype), args)
    self.variables = {**variables, **learn(variables, *seen)[1]}

  def export(self, out, **changed):
    variables = {**self.variables, **changed}
    return export.export_model(
      self.model, variables, self.choices, *self.args, out=out, **self.call
    )

  def evaluate(self, *args):
    """Returns the outputs of the search's evaluation."""
    apply = functools.partial(self.model.apply, **self.call)
    return jax.jit(apply)(self.variables, *args)

  def check(self, out):
    """Exports; checks that every way of serving gives the search's bits."""
    manifest = self.export(out)
    assert manifest['reference']['bit_equal']
    served = loader.load(out, model=self.module)
    # Not only for the example inputs.
    args = jax.tree.map(lambda x: x[::-1], self.args)
    np.testing.assert_array_equal(served(*args), self.evaluate(*args))
    found = export.verify(out)
    assert found['through'] == 'model.stablehlo'
    assert found['max_difference'] <= 1e-5 * found['largest_output']
    return manifest


class EveryFormat(nn.Module):
  """A convolution and a dense layer for each format."""

  number: int

  @nn.compact
  def __call__(self, x):
    def small(*args):
      return helpers.by_key(*args) / 3

    for i in range(self.number):
      x = nn.Conv(4, (3,), kernel_init=small, name=f'conv{i}')(x)
      x = nn.tanh(nn.Dense(4, kernel_init=small, name=f'dense{i}')(x))
    return x


def test_every_format_of_every_space_is_stored_in_its_bits(tmp_path):
  menu = formats.menu(
    tuple(dict.fromkeys([*sum(formats.SPACES.values(), ()), 'INT2', 'INT3']))
  )
  names = [f.name for f in menu for _ in ('conv', 'dense')]
  run = Run(
    EveryFormat(len(menu)),
    helpers.random((2, 6, 4)),
    names=names,
    spec=fliqs.QuantSpec(menu),
  )
  manifest = run.check(tmp_path / 'out')
  tensors = export_files.read(tmp_path / 'out').tensors
  for i, one in enumerate(menu):
    for layer, weights in ((f'conv{i}', 3 * 4 * 4), (f'dense{i}', 4 * 4)):
      entry = manifest['layers'][layer]
      assert (entry['weights'], entry['activations']) == (one.name, one.name)
      assert (entry['arithmetic'] == 'int8') == one.is_integer
      stored = tensors[f'params/{layer}/kernel'].nbytes
      assert stored == -(-weights * one.bits // 8)


def test_every_kind_of_layer_is_served(tmp_path):
  run = Run(
    foreign_models.Zoo(),
    foreign_models.TOKENS,
    names=['INT4', 'INT8', 'E4M3', 'BF16'],
    call=dict(train=False),
    spec=fliqs.QuantSpec(('INT4', 'INT8', 'E4M3', 'BF16'), mode='separate'),
    embed=True,
    attention=True,
  )
  run.choices |= {
    f'{layer}/{side}': np.eye(4)[1]
    for layer in ('local', 'transpose', 'conv', 'einsum', 'general')
    for side in ('weights', 'activations')
  }
  run.variables['arch'] = run.space.expand(run.choices)
  manifest = run.check(tmp_path / 'out')
  assert manifest['call'] == dict(train=False)
  assert manifest['program'] == dict(batch='any')
  kinds = {
    path: (entry['arithmetic'], entry['variable'])
    for path, entry in manifest['layers'].items()
  }
  assert kinds['embed'] == ('float32', 'embedding')
  assert kinds['attention/qk'] == kinds['attention/av'] == ('float32', '')
  assert kinds['local'] == kinds['transpose'] == ('float32', 'kernel')
  for layer in ('conv', 'einsum', 'general'):
    assert kinds[layer] == ('int8', 'kernel')
  # One batch's statistics of the model's own are there, ours are not.
  tensors = export_files.read(tmp_path / 'out').tensors
  assert {name.partition('/')[0] for name in tensors} == {
    'params',
    'batch_stats',
    'scales',
  }


@pytest.mark.parametrize(
  ('stack', 'names', 'arithmetic'),
  [
    (foreign_models.Stack(), ['INT4', 'BF16', 'INT8'], 'float32'),
    (foreign_models.Stack(axis=1, remat=True), ['INT4', 'INT8'], 'int8'),
    (foreign_models.Stack(transform='vmap'), ['INT8', 'INT4'], 'int8'),
    (foreign_models.Nested(), ['INT4', 'INT4', 'INT8', 'BF16'], 'float32'),
  ],
  ids=['scan', 'integers_along_axis_1', 'vmap', 'scans_of_scans'],
)
def test_each_step_of_a_stack_has_its_own_format(
  stack, names, arithmetic, tmp_path
):
  run = Run(stack, X, names=names)
  manifest = run.check(tmp_path / 'out')
  entries = manifest['layers']
  assert set(entries) == set(run.space.assignment(run.choices))
  assert {e['arithmetic'] for e in entries.values()} == {arithmetic}
  tensors = export_files.read(tmp_path / 'out').tensors
  for path, entry in entries.items():
    bits = formats.parse(entry['weights']).bits
    assert tensors[f'params/{path}/kernel'].nbytes == 8 * 12 * bits // 8
    assert f'params/{path.partition("/@")[0]}/kernel' not in tensors


class Transformer(nn.Module):
  """Scanned blocks with attention."""

  @nn.compact
  def __call__(self, x):
    def block(module, x, _):
      x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x)
      return nn.ConvTranspose(8, (3,), name='up')(x), None

    stack = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=2,
    )
    return stack(self, x, None)[0]


@pytest.mark.parametrize('stacks', ['separate', 'shared'])
def test_products_of_attention_in_a_stack(stacks, tmp_path):
  run = Run(
    Transformer(),
    helpers.random((2, 4, 8)),
    names=['INT4', 'BF16', 'INT8'],
    attention=True,
    stacks=stacks,
  )
  layers_of = run.check(tmp_path / 'out')['layers']
  found = {layers_of[f'attention/qk/@{i}']['weights'] for i in (0, 1)}
  assert len(found) == (2 if stacks == 'separate' else 1)


@pytest.mark.parametrize('mode', ['activations', 'weights'])
def test_one_side_of_some_layers_of_a_stack(mode, tmp_path):
  spec = fliqs.QuantSpec(mode=mode, exclude=('body/down',))
  run = Run(foreign_models.Stack(), X, names=['INT4'], spec=spec)
  entries = run.check(tmp_path / 'out')['layers']
  assert set(entries) == {f'body/up/@{i}' for i in range(foreign_models.LENGTH)}
  other = 'weights' if mode == 'activations' else 'activations'
  assert {(e[mode], e[other]) for e in entries.values()} == {('INT4', None)}


def test_a_recurrent_layer_is_served_from_low_bit_weights(tmp_path):
  run = Run(
    foreign_models.Recurrent(),
    helpers.random((2, 5, 8)),
    names=['INT4', 'BF16', 'INT8'],
    spec=fliqs.QuantSpec(mode='weights'),
  )
  entries = run.check(tmp_path / 'out')['layers'].values()
  assert {e['activations'] for e in entries} == {None}


@pytest.mark.parametrize('transform', ['jit', 'remat'])
@pytest.mark.parametrize('names', [['INT8', 'INT4'], ['INT8']])
def test_equal_modules_keep_their_own_formats(transform, names, tmp_path):
  # One layer is called twice; two blocks are equal to `nn.jit`.
  run = Run(foreign_models.Twins(transform), X, names=names)
  run.check(tmp_path / 'out')


def test_a_program_that_jit_keeps_is_not_used_for_another_export(tmp_path):
  for i, name in enumerate(('INT4', 'INT8', 'INT4')):
    Run(foreign_models.Early(), X, names=[name]).check(tmp_path / str(i))
    # Once more, when all has been traced.
    loader.load(tmp_path / str(i), model=foreign_models.Early())


class TwoTowers(nn.Module):
  """Two inputs of which one is a tree, options, and a dict of outputs."""

  boxed: bool = False

  def setup(self):
    init = helpers.by_key
    if self.boxed:
      init = nn.with_partitioning(helpers.by_key, ('in', None))
    self.embed = nn.Embed(5, 8)
    self.image = nn.Dense(8, kernel_init=init, dtype=jnp.bfloat16)
    self.head = nn.Dense(3, kernel_init=helpers.by_key)

  def encode(self, inputs):
    return self.image(inputs['image']) + self.embed(inputs['token'])

  def __call__(self, inputs, mask, *, scale, mode='both'):
    x = self.encode(inputs) * mask[None] * scale
    outputs = dict(logits=self.head(x), features=(x, jnp.argmax(x, -1)))
    return outputs if mode == 'both' else outputs['logits']


INPUTS = dict(image=helpers.random((4, 8)), token=np.array([0, 4, 2, 2]))
MASK = np.arange(8) % 3 > 0


def towers(**kwargs):
  return Run(
    TwoTowers(**kwargs),
    INPUTS,
    MASK,
    names=['INT8', 'INT4'],
    call=dict(scale=0.5),
    embed=True,
  )


def test_several_inputs_options_and_trees_of_outputs(tmp_path):
  run = towers(boxed=True)
  run.variables = core.freeze(run.variables)
  manifest = run.export(tmp_path / 'out')
  assert manifest['reference']['bit_equal']
  # The mask is of no example, so its axis stays as it is.
  assert manifest['program'] == dict(batch='any')
  served = loader.load(tmp_path / 'out', model=run.module)
  found, expected = served(INPUTS, MASK), run.evaluate(INPUTS, MASK)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  for model in (None, run.module):
    assert export.verify(tmp_path / 'out', model)['bit_equal']
  # The batch size of the program is open.
  program = stablehlo.deserialize(
    (tmp_path / 'out' / stablehlo.NAME).read_bytes()
  )
  tensors = export_files.read(tmp_path / 'out').tensors
  one = {k: jnp.asarray(x[:1]) for k, x in INPUTS.items()}
  np.testing.assert_allclose(
    program.call(tensors, one, MASK)['logits'],
    expected['logits'][:1],
    atol=1e-5,
  )


def test_a_method_of_the_model_is_exported(tmp_path):
  run = Run(TwoTowers(), INPUTS, names=['INT4'], call=dict(method='encode'))
  manifest = run.check(tmp_path / 'out')
  assert set(manifest['layers']) == {'image'}


class FixedBatch(nn.Module):
  """It wants its batch size as a number."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, kernel_init=helpers.by_key)(x.reshape((len(x), -1)))


def test_a_program_of_a_fixed_batch_size_says_so(tmp_path):
  manifest = Run(FixedBatch(), X, names=['INT8']).check(tmp_path / 'out')
  assert manifest['program'] == dict(batch=2)


class Parts(nn.Module):
  """Two layers, to be replaced by others."""

  features: int = 8
  first: type[nn.Module] = nn.Dense
  depth: int = 2

  @nn.compact
  def __call__(self, x, train):
    for i in range(self.depth):
      layer = self.first if i == 0 else nn.Dense
      x = layer(self.features, name=f'layer{i}')(x)
    return x if train else nn.tanh(x)


class OwnDense(nn.Module):
  """A layer with the parameters of `nn.Dense`, which is none of linen's."""

  features: int

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', helpers.by_key, (x.shape[-1], self.features))
    bias = self.param('bias', helpers.by_key, (self.features,))
    return x @ kernel + jnp.expand_dims(bias, 0)


@pytest.fixture(scope='module')
def parts():
  return Run(Parts(), X, names=['INT4', 'INT8'], call=dict(train=False))


@pytest.fixture(scope='module')
def exported(parts, tmp_path_factory):
  out = tmp_path_factory.mktemp('exports') / 'out'
  parts.export(out)
  return out


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (None, r'holds tests\..*\.Parts, .*as model=.*model.stablehlo'),
    (Parts(features=7), r'layer0/bias is \[7\], but in .* \[8\]'),
    (Parts(depth=3), r'layer2/bias is \[8\], but .* is missing'),
    (Parts(depth=1), r'layer1/bias is missing, but'),
    (Parts(first=OwnDense), 'no linen layer at layer0, .* low-bit'),
    (Parts(first=quant_layers.QuantDense), 'layer0 is a QuantDense'),
    (FixedBatch(), 'FixedBatch is called as .*train'),
    (fliqs.searchable(Parts()), 'model=Searchable must be an unbound linen'),
  ],
)
def test_another_model_is_not_served(exported, model, message):
  with pytest.raises(ValueError, match=message):
    loader.load(exported, model=model)


def test_the_command_line_verifies_through_the_program(exported, capsys):
  assert export.main(['--verify', str(exported)]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['through'] == 'model.stablehlo'
  assert found['max_difference'] < 1e-6


def test_outputs_of_another_model_are_noticed(exported):
  class Other(Parts):
    @nn.compact
    def __call__(self, x, train):
      return -super().__call__(x, train)

  with pytest.raises(ValueError, match='differ from the reference outputs by'):
    export.verify(exported, Other())


def test_larger_batches_may_run_in_slices(exported, parts):
  served = loader.load(exported, at_once=2, model=parts.module)
  x = helpers.random((5, 8), seed=2)
  np.testing.assert_array_equal(served(x), parts.evaluate(x))


def test_wrong_calls_are_refused(parts, tmp_path):
  def refused(message, model=parts.model, args=(X,), **changed):
    kwargs = dict(train=False, out=tmp_path / 'out') | changed
    choices = kwargs.pop('choices', parts.choices)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    with pytest.raises(ValueError, match=message):
      export.export_model(model, parts.variables, choices, *args, **kwargs)

  refused('Parts is called as .*missing .*train.*export_model', train=None)
  refused('Parts is called as', args=())
  refused(r'train=array.* cannot be stored in manifest', train=np.array(True))
  refused(r'train=\(1,\) cannot be stored in manifest', train=(1,))
  refused('mutable=.*changes no variables', mutable=['batch_stats'])
  refused('missing are layer1; surplus are none', choices={'layer0': [1, 0, 0]})
  refused('Parts was not made by searchable', model=parts.module)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').touch()
  refused('full is not empty', out=tmp_path / 'full')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('stack', [nn.Dense(3), foreign_models.Stack()])
def test_activations_that_never_were_quantized_are_refused(stack, tmp_path):
  run = Run(stack, X, names=['INT8'])
  off = fliqs.set_activation_quantization(run.variables['quant_stats'], False)
  with pytest.raises(ValueError, match='never quantized'):
    run.export(tmp_path / 'out', quant_stats=off)
  fresh = helpers.init(run.model, X)['quant_stats']
  with pytest.raises(ValueError, match='never quantized'):
    run.export(tmp_path / 'out', quant_stats=fresh)


class Tied(nn.Module):
  """Its table is also read without a call of the layer."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(5, 8, embedding_init=helpers.by_key)
    return embed(tokens) @ embed.embedding.T


def test_a_model_that_cannot_be_served_is_refused(tmp_path):
  run = Run(Tied(), np.array([[0, 4]]), names=['INT4'], embed=True)
  with pytest.raises(ValueError, match='reads the weights of a layer without'):
    run.export(tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_layer_that_the_call_does_not_reach_is_refused(tmp_path):
  run = towers()
  with pytest.raises(ValueError, match='missing are none; surplus are head'):
    export.export_model(
      run.model,
      run.variables,
      run.choices,
      INPUTS,
      method='encode',
      out=tmp_path / 'out',
    )


def test_a_kill_while_writing_leaves_no_export(parts, tmp_path, monkeypatch):
  def killed(path, value):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(export_files.files, 'write_json', killed)
    with pytest.raises(KeyboardInterrupt):
      parts.export(tmp_path / 'out')
  with pytest.raises(ValueError, match='is no export'):
    loader.load(tmp_path / 'out', model=parts.module)
