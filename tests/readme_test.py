"""The README tells the truth: its example runs, its commands are CI's."""

import pathlib
import re

import jax

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / 'README.md').read_text()


def test_the_example_runs_and_finds_a_format_for_every_layer(capsys):
  (example,) = re.findall(r'```python\n(.*?)```', _README, re.DOTALL)
  # The README's reader has JAX's defaults.
  with jax.numpy_rank_promotion('allow'):
    exec(compile(example, 'README.md', 'exec'), {'__name__': 'readme'})
  found = capsys.readouterr().out
  assert "'hidden': (" in found
  assert "'head': (" in found


def test_every_public_name_has_a_docstring_and_the_example_uses_real_ones():
  import fliqs_jax

  for name in fliqs_jax.__all__:
    assert getattr(fliqs_jax, name).__doc__, name
  for name in re.findall(r'fliqs\.(\w+)', _README):
    assert name in fliqs_jax.__all__, name


def test_ci_finds_the_test_command_in_the_readme():
  lines = [line for line in _README.splitlines() if '-m pytest' in line]
  assert len(lines) == 1
  assert lines[0].startswith('python3 -m venv .venv && ')


def test_the_version_is_the_same_everywhere():
  import fliqs_jax

  version = fliqs_jax.__version__
  assert f'\nversion: {version}\n' in (_ROOT / 'CITATION.cff').read_text()
  released = re.findall(
    r'^## \[(\d.*?)\]', (_ROOT / 'CHANGELOG.md').read_text(), re.M
  )
  assert released[0] == version
