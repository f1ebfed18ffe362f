"""A searched model that is exported, and modules of several test files."""

import functools

import flax.linen as nn
import jax

import fliqs_jax as fliqs
from fliqs_jax import export
from fliqs_jax import serving
from tests import helpers

X = helpers.random((2, 8))
Dense = functools.partial(nn.Dense, kernel_init=helpers.by_key)


class Run:
  """A model that was searched, and what is exported of it."""

  def __init__(self, module, *args, names, call=None, rngs=None, **how):
    self.module, self.args, self.call = module, args, call or {}
    self.rngs = rngs
    self.model = fliqs.searchable(module, **how)
    self.space = fliqs.find_decisions(self.model, *args, **self.call)
    self.choices = {
      d.name: d.one_hot(names[i % len(names)])
      for i, d in enumerate(self.space.decisions)
    }
    self._random = {} if rngs is None else dict(rngs=rngs)
    arch = self.space.expand(self.choices)
    variables = helpers.init(self.model, *args, **self.call)
    variables = {**variables, 'arch': arch}
    learn = functools.partial(
      self.model.apply, mutable=['quant_stats'], **self.call
    )
    # Other inputs than the examples.
    seen = jax.tree.map(lambda x: (x * 0.7).astype(x.dtype), args)
    learnt = jax.jit(
      lambda *given: learn(*given, **self._random)[1],
      compiler_options=helpers.FAST,
    )
    self.variables = {**variables, **learnt(variables, *seen)}

  def export(self, out, **changed):
    return export.export_model(
      self.model,
      {**self.variables, **changed},
      self.choices,
      *self.args,
      out=out,
      **self._random,
      **self.call,
    )

  def evaluate(self, *args, **random):
    """Returns the outputs of the search's evaluation."""

    def evaluate(variables, args, random):  # As an export does: compiled once.
      return self.model.apply(variables, *args, **random, **self.call)

    return jax.jit(evaluate)(self.variables, args, random)

  def check(self, out):
    """Exports; checks that what is served has the search's bits."""
    manifest = self.export(out)
    assert manifest['reference']['bit_equal']
    # Not only for the example inputs.
    args = jax.tree.map(lambda x: x[::-1], self.args)
    helpers.same(serving.load(out)(*args), self.evaluate(*args))
    return manifest


def written(out, function, *args):
  """Exports a function of parameters {w: [4, 3]} and inputs, at INT8."""
  params = dict(w=helpers.random((4, 3)))
  spec = fliqs.QuantSpec('int_s')
  model = fliqs.searchable(function, spec, params=params)
  space = fliqs.find_decisions(model, *args)
  choices = space.uniform('INT8')
  at = {**model.init(None, *args), 'arch': space.expand(choices)}
  _, changed = model.apply(at, *args, mutable=['quant_stats'])
  fliqs.export_model(model, at | changed, choices, *args, out=out)
  return out


class Body(nn.Module):
  """One iteration of a stack."""

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.tanh(Dense(12, name='up')(x))
    return x + Dense(8, name='down')(h), None


def stack(body, length, axis=0, name='body'):
  return nn.scan(
    body,
    variable_axes={'params': axis},
    split_rngs={'params': True},
    length=length,
  )(name=name)


class Scanned(nn.Module):
  """A scanned stack."""

  @nn.compact
  def __call__(self, x):
    return stack(Body, 3)(x, None)[0]
