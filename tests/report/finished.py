"""What a finished run leaves, made up: for the tests of its report."""

import json
import pathlib

from fliqs_jax.numerics import formats
from fliqs_jax.report import report

MENU = ('INT4', 'INT8', 'BF16')
FOUND = {  # Path: format of weights, of activations.
  'stem': ('INT8', 'INT8'),
  'stage0/block0/conv0': ('INT4', 'INT4'),
  'stage0/block0/conv1': ('INT4', 'INT4'),
  'stage0/block0/shortcut': ('INT8', 'INT8'),
  'head': (None, None),
}


def _model(accuracy, cost):
  return {
    'accuracy': accuracy,
    'loss': 0.1,
    'cost': cost,
    'cost_target': 0.9,
    'unit': 'GBOPs',
    'gbops': cost,
    'size_bits': 8000,
    'average_bits': 4.5,
    'examples': 360,
  }


def _bits(name):
  return formats.parse(name).bits if name else 16


def files(found=None, menu=MENU, mode='tied'):
  """Returns the contents of a run's files; every layer has 1e9 MACs."""
  found = found or FOUND
  arch = {
    'schema': 1,
    'versions': {'fliqs_jax': '0.1.0', 'jax': '0.10', 'flax': '0.12'},
    'config_hash': 'abc',
    'mode': mode,
    'sizes': {},
    'cost': {'kind': 'bops', 'value': 0.8, 'target': 0.9, 'unit': 'GBOPs'},
    'layers': {
      path: {'weights': w, 'activations': a} for path, (w, a) in found.items()
    },
  }
  layers = [
    {
      'path': path,
      'kind': 'conv',
      'macs': 10**9,
      'params': 100,
      'weights': w,
      'activations': a,
      'gbops': _bits(w) * _bits(a),
      'cost': _bits(w) * _bits(a),
    }
    for path, (w, a) in found.items()
  ]
  decisions = {}
  sides = ('weights', 'activations') if mode == 'separate' else ('',)
  for path, names in found.items():
    for side, name in zip(sides, names):
      if name:
        decisions[f'{path}/{side}' if side else path] = {
          'kind': 'format',
          'options': list(menu),
          'layers': [path],
          'probabilities': [float(choice == name) for choice in menu],
        }
  policy = {name: d['probabilities'] for name, d in decisions.items()}
  curves = {'quality': -1, 'reward': -0.4, 'cost': 1.8, 'entropy': 9.8}
  return {
    'config.json': {
      'seed': 0,
      'model': {'name': 'resnet_cifar'},
      'data': {'name': 'digits'},
      'quant': {'act_start': 0.15},
      'search': {'start': 0.25, 'freeze': 0.95},
      'train': {'steps': 60},
    },
    'arch.json': arch,
    'result.json': {
      'metric': 'accuracy',
      'found': _model(0.9722, 0.8),
      'references': {'INT4': _model(0.9, 0.5), 'INT8': _model(0.95, 2.0)},
      'layers': layers,
      'decisions': decisions,
      'warnings': [],
      'steps': 60,
      'compilations': 1,
      'wall_seconds': 61.2,
      'compile_seconds': 9.1,
      'seed': 0,
    },
    'history.jsonl': [
      {'step': step, 'loss': 2.0, 'policy': policy, **curves}
      for step in (20, 40, 60)
    ],
  }


def sized_files():
  """Returns the same of a run that also found channels and a kernel.

  An inverted bottleneck: the expanded channels are six times those that come
  in, of 8, 16 or 32; 16 or 32 go out; the kernel is 3x3 or 5x5.
  """
  found = {
    'stem': ('INT8', 'INT8'),
    'block/expand': ('INT4', 'INT4'),
    'block/middle': ('INT8', 'INT8'),
    'block/project': ('INT4', 'INT4'),
    'head': (None, None),
  }
  contents = files(found)
  result = contents['result.json']
  decided = {  # Kind, options, probabilities, leaves' layers.
    'block/kernel': ('kernel', [3, 5], [0.3, 0.7], ['block/middle']),
    'first/channels': (
      'channels',
      [8, 16, 32],
      [0.02, 0.96, 0.02],
      # Norms follow a decision too; they are no row of the table.
      ['block/expand', 'block/expand_norm', 'block/middle', 'block/project'],
    ),
    'last/channels': ('channels', [16, 32], [0.01, 0.99], ['block/project']),
  }
  for name, (kind, options, probabilities, layers) in decided.items():
    result['decisions'][name] = {
      'kind': kind,
      'options': options,
      'probabilities': probabilities,
      'layers': layers,
    }
    for row in contents['history.jsonl']:
      row['policy'][name] = probabilities
    best = probabilities.index(max(probabilities))
    contents['arch.json']['sizes'][name] = options[best]
  first, last, kernel = 'first/channels', 'last/channels', 'block/kernel'
  sizes = {
    'block/expand': {
      'input_channels': (16, first),
      'output_channels': (96, first),
    },
    'block/middle': {'output_channels': (96, first), 'kernel': (5, kernel)},
    'block/project': {
      'input_channels': (96, first),
      'output_channels': (32, last),
    },
  }
  kinds = {
    'block/expand': 'pointwise',
    'block/middle': 'depthwise',
    'block/project': 'pointwise',
  }
  for row in result['layers']:
    own = sizes.get(row['path'], {})
    row |= {what: count for what, (count, _) in own.items()}
    row['kind'] = kinds.get(row['path'], row['kind'])
    if own:
      row['decided'] = {what: name for what, (_, name) in own.items()}
  return contents


def write(directory, files):
  """Writes a run's files; returns the directory as text."""
  for name, content in files.items():
    rows = content if name == 'history.jsonl' else [content]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (directory / name).write_text(text)
  return str(directory)


def page(directory, files):
  """Writes a run's files and its report; returns the page."""
  path = report.write_report(write(directory, files))
  return pathlib.Path(path).read_text(encoding='utf-8')
