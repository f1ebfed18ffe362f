"""The benchmarks run, at sizes at which their numbers say nothing."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import exhaustive
from benchmarks import exhaustive_problem
from benchmarks import gpu_step
from benchmarks import layer_times
from benchmarks import memory
from benchmarks import serving
from benchmarks import step_time
from benchmarks import thresholds
from fliqs_jax import models
from fliqs_jax.space import quant_spec

pytestmark = pytest.mark.slow


_CONFIG = dict(name='resnet_cifar', depth=8, filters=4)


@pytest.fixture(scope='module', name='network')
def _network():
  """A ResNet-8 as {variant: function}, and its layers."""
  return serving.variants(_CONFIG, 8)


def test_every_served_layer_is_in_the_table(network):
  _, rows = network
  # The stem, two convolutions in each of three blocks, two of 1 x 1, the head.
  assert sum(row.count for row in rows) == 10
  stem = rows[0]
  assert (stem.path, stem.inputs) == ('stem', (8, 8, 3))
  # At each place 27 x 4 products; 3 numbers come in and 4 go out.
  assert stem.macs_per_number == pytest.approx(27 * 4 / 7)
  lines = layer_times.table(rows, batch=2, at_once=1, rounds=1)[2:]
  assert sorted(line.split(' | ')[0] for line in lines) == sorted(
    f'| {row.path}' for row in rows
  )
  ratios = [float(line.split(' | ')[6]) for line in lines]
  assert ratios == sorted(ratios)


def test_a_layer_alone_is_the_one_of_the_network(network):
  functions, rows = network
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  (variables,) = functions['fake'].args
  search = models.build(_CONFIG, 10, quant_spec.QuantSpec('INT8'))
  stock = models.construct(_CONFIG, 10, conv=nn.Conv, dense=nn.Dense)
  floats = {k: variables[k] for k in ('params', 'batch_stats')}

  def stem(network, variables):
    """Returns the stem's result; compiles nothing behind it."""

    def apply(variables, x):
      _, kept = network.apply(
        variables, x, train=False, capture_intermediates=True
      )
      return kept['intermediates']['stem']['__call__'][-1]

    return jax.jit(apply)(variables, x)

  np.testing.assert_array_equal(rows[0].plain(x), stem(stock, floats))
  np.testing.assert_array_equal(rows[0].served(x), stem(search, variables))
  np.testing.assert_array_equal(functions['int8'](x), functions['fake'](x))


def test_steps_are_timed_against_the_float_ones():
  # One layer: eight programs are compiled.
  model = models.published('mlp') | dict(hidden=())
  problem = step_time.Problem(model, 8, 8, jnp.bfloat16)
  names = list(gpu_step.STEPS)
  lines = step_time.measure(problem, names, rounds=2, steps=1)
  rows = [line.split(' | ') for line in lines if line.startswith('| ')][1:]
  assert [row[0] for row in rows] == [f'| {name}' for name in names]
  assert rows[names.index('float')][2] == '1.00 (1.00 to 1.00)'
  assert rows[names.index('stock')][1] == '1.00 (1.00 to 1.00)'
  assert lines[-1].startswith('16 / 3: ')


def test_the_accounting_of_memory_is_that_of_the_paper():
  lines = memory.accounting('resnet18', batch=32, options='int_s')
  rows = [line.split(' | ') for line in lines if line.startswith('| ')][1:]
  # Table 6: 11.7 M weights of 2 bytes; gradients of weights and copies; outputs
  # of convolutions, 2.31 M an image (the paper rounds to 2.3), of one byte.
  # Three formats in each of 22 layers; the paper counts 17 of them.
  fliqs, composite, _, branched = [row[1:4] for row in rows]
  assert fliqs == ['23.4', '46.8', '73.9']
  assert composite == branched == ['70.2', '93.5', '221.6']
  assert [row[-1] for row in rows] == ['66 |'] * 4


@pytest.mark.parametrize('options', ['int_s', 'INT4:kl+INT4:admm'])
def test_relaxed_steps_are_measured_against_the_sampled_one(options):
  model = models.published('mlp') | dict(hidden=(4,))
  problem = step_time.Problem(model, 4, 4)
  lines = memory.measured(problem, rounds=2, options=options)
  rows = [line.split(' | ') for line in lines if line.startswith('| ')][1:]
  assert [row[0] for row in rows] == [f'| {name}' for name in memory.ROWS]
  assert rows[0][2:] == ['1.00', '1.00 (1.00 to 1.00) |']


@pytest.mark.parametrize('tiny', [False, True])
def test_a_network_in_bfloat16_is_so_everywhere(tiny):
  problem = gpu_step.problem(8, tiny)
  network = problem.network(nn.Conv, nn.Dense)
  image = jnp.zeros((1, problem.pixels, problem.pixels, 3))

  def trace(key):
    return network.init_with_output(
      key, image, train=False, capture_intermediates=True
    )

  y, variables = jax.eval_shape(trace, jax.random.key(0))
  assert y.dtype == jnp.float32
  results = dict(variables['intermediates'])
  del results['__call__']  # That of the whole network.
  assert {x.dtype for x in jax.tree.leaves(results)} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert {x.dtype for x in jax.tree.leaves(variables['params'])} == {
    jnp.dtype(jnp.float32)
  }


def test_without_an_accelerator_nothing_is_measured(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['gpu_step'])
  gpu_step.main()
  assert capsys.readouterr().out.count('\n') == 1


@pytest.fixture(scope='module', name='tiny_problem')
def _tiny_problem():
  """Two layers of two formats: four assignments, for a few steps."""
  return exhaustive_problem.Problem(steps=8, hidden=(2,), menu=('INT2', 'INT8'))


def test_costs_of_all_assignments_are_multiples_of_int4(tiny_problem):
  # 64 x 2 and 2 x 10 products: the first layer has 128 of 148; INT8 costs 4 and
  # INT2 a fourth of INT4.
  share = 128 / 148
  first, second = np.array([0.25, 0.25, 4, 4]), np.array([0.25, 4, 0.25, 4])
  np.testing.assert_allclose(
    tiny_problem.costs, share * first + (1 - share) * second, rtol=1e-6
  )
  choices = tiny_problem.choices(tiny_problem.assignments)
  np.testing.assert_array_equal(tiny_problem.numbers(choices), np.arange(4))
  assert [tiny_problem.uniform(i) for i in (0, 1)] == [0, 3]


def test_the_best_assignment_of_one_half_is_valued_by_the_other(tiny_problem):
  # Within 1 are INT2 everywhere, .25, and INT8 in the second layer alone,
  # .25 x 128/148 + 4 x 20/148 = .76. Seed 0 prefers the first, which seed 1
  # finds to lose 5; seed 1 the second, of which seed 0 thinks 3.
  table = np.array([[1.0, 3.0, 0.0, 0.0], [5.0, 4.0, 0.0, 0.0]])
  assert exhaustive.best(tiny_problem, table, 1.0) == (5 + 3) / 2
  # What one seed says: the least of both that are within, whatever the other.
  selected = exhaustive.of_one_seed(tiny_problem, table, np.array([1.0, 9.0]))
  np.testing.assert_array_equal(selected.numbers, [[0, 1], [2, 2]])


def test_every_method_selects_within_budget(tiny_problem, tmp_path, capsys):
  result = exhaustive.measure(
    tiny_problem, tmp_path, 2, [1.0], ['two_trainings', 'sensitivity', 'judged']
  )
  for (values,) in result['methods'].values():
    assert values['within'] == 1
    assert np.isfinite(values['served']).all()
  assert result['methods']['two_trainings'][0]['gap'] == [0, 0]
  assert capsys.readouterr().out.count('| 1 | ') == 4
  # The losses are read again: the files are of the first start.
  written = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
  tiny_problem.table(tmp_path, 2)
  assert len(written) == 2
  assert written == [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]


def test_thresholds_of_activations_by_hand():
  # Mean 2, deviation 1, mean square 5.
  found = thresholds.thresholds(np.array([1.0, 3.0]), 2.0)
  expected = dict(deviation=2, rms=2 * 5**0.5, magnitude=3, largest=3)
  assert found == pytest.approx(expected)
  # INT2 at a threshold of 2 has -2, 0 and 2: 3 is 2, and 1, a tie, is 0.
  wrong = thresholds.error(np.array([1.0, 3.0]), 'INT2', 2.0)
  assert wrong == pytest.approx((2 / 10) ** 0.5)
