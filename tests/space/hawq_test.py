"""Allocations that HAWQ-V3 published, from its sensitivities and costs.

hawq_v3.csv has the numbers of the notebook ILP.ipynb of the repository
Zhen-Dong/HAWQ (Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML
2021): traces of the Hessian per weight, squared errors of the weights at INT8
and INT4, and milliseconds on a T4. The first and the last layer are not in it.
The formats of ResNet-18 are those of the same repository's bit_config.py.
"""

import csv
import pathlib

import numpy as np
import pytest

from fliqs_jax.space import integer_program

_TABLE = pathlib.Path(__file__).with_name('hawq_v3.csv')


def _problem(network, kind):
  """Returns {decision: [2]} scores, the cost as `Terms`, and the layers' ties.

  Option 0 is INT4, option 1 is INT8. The projection of a shortcut is tied to
  the first layer of its block, so both are one decision.
  """
  rows = [
    {name: float(x) for name, x in row.items() if name != 'network'}
    for row in csv.DictReader(_TABLE.read_text().splitlines())
    if row['network'] == network
  ]
  scores, costs = {}, {}
  for row in rows:
    name = f'layer{row["tied_to"]:.0f}'
    by_bits = {
      # MiB of the weights.
      'size': [row['weights'] * bits / 8 / 2**20 for bits in (4, 8)],
      # The notebook divides float32's by 8^2 and 4^2: MACs b^2 / 32^2.
      'bops': [row['macs'] * bits**2 / 32**2 / 1e6 for bits in (4, 8)],
      'latency': [row['ms_4'], row['ms_8']],
    }
    score = row['trace'] * np.asarray([row['square_4'], row['square_8']])
    scores[name] = scores.get(name, 0) + score
    costs[name,] = costs.get((name,), 0) + np.asarray(by_bits[kind])
  ties = [f'layer{row["tied_to"]:.0f}' for row in rows]
  return scores, integer_program.Terms(0.0, costs), ties


@pytest.mark.parametrize(
  ('network', 'kind', 'bits', 'cost', 'sensitivity'),
  [
    ('resnet18', 'size', '8888888888888884844', 7.2656, 0.074506),
    ('resnet18', 'bops', '8884888848884444444', 65.0281, 0.215689),
    ('resnet18', 'latency', '8888848848884484844', 4.2201, 0.202674),
    ('resnet50', 'size', None, None, 0.031024),
    ('resnet50', 'bops', None, None, 0.056440),
    ('resnet50', 'latency', None, None, 0.054861),
  ],
)
def test_budgets_midway_from_int4_to_int8(
  network, kind, bits, cost, sensitivity
):
  scores, terms, ties = _problem(network, kind)
  ends = [terms.cost(dict.fromkeys(scores, k)) for k in (0, 1)]
  limit = integer_program.Limit(terms, sum(ends) / 2)
  chosen = integer_program.Program(dict.fromkeys(scores, 2), [limit]).solved(
    scores
  )
  total = sum(scores[name][k] for name, k in chosen.items())
  assert round(total, 6) == sensitivity
  assert terms.cost(chosen) <= limit.target * (1 + 1e-9)
  if bits is not None:
    assert ''.join('48'[chosen[name]] for name in ties) == bits
    assert round(terms.cost(chosen), 4) == cost
