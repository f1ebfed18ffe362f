"""README and docs are true: examples run, links and names exist."""

import pathlib
import re

import jax
import pytest

import fliqs_jax

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / 'README.md').read_text()
_PAGES = sorted(
  [
    *_ROOT.glob('*.md'),
    *_ROOT.glob('docs/*.md'),
    *_ROOT.glob('launch/*.md'),
  ]
)


def _run(page, capsys):
  """Returns the names of the last example of a page, and what each printed."""
  examples = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  printed = []
  for example in examples:
    # A reader has JAX's defaults.
    with jax.numpy_rank_promotion('allow'):
      values = {'__name__': 'page'}
      exec(compile(example, page.name, 'exec'), values)
    printed.append(capsys.readouterr().out)
  return values, printed


def test_the_readmes_example_ends_with_a_served_model(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  values, (printed,) = _run(_ROOT / 'README.md', capsys)
  assert "'hidden': (" in printed
  assert "'head': (" in printed
  assert values['outputs'].shape == (256, 1)
  assert (tmp_path / 'served/net/manifest.json').exists()


def test_the_examples_of_own_models_search_every_product(capsys):
  pytest.importorskip('equinox')
  _, printed = _run(_ROOT / 'docs/own_model.md', capsys)
  tables, allocated, layers = printed
  # One line for each product of the NNX and of the Equinox model.
  assert re.findall(r'^(\S+) +dense', tables, re.MULTILINE) == [
    *('hidden', 'head'),
    *('layers/0', 'layers/1'),
  ]
  assert tables.count('100.0% of') == 2
  cost, target = map(float, allocated.split()[-2:])
  assert 0.9 * target < cost <= target
  assert layers == "['hidden', 'head']\n"


def test_every_public_name_has_a_docstring_and_pages_use_real_ones():
  for name in fliqs_jax.__all__:
    assert getattr(fliqs_jax, name).__doc__, name
  for page in _PAGES:
    for name in re.findall(r'\bfliqs\.(\w+)', page.read_text()):
      assert name in fliqs_jax.__all__, f'{page.name}: {name}'


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.stem)
def test_links_to_files_and_headings_lead_somewhere(page):
  for link in re.findall(r'\]\((?!http)(.*?)\)', page.read_text()):
    name, _, anchor = link.partition('#')
    target = page.parent / name
    assert target.exists(), link
    headings = re.findall(r'^#+ (.*)', target.read_text(), re.MULTILINE)
    anchors = ['', *(re.sub(r'[^\w]+', '-', h.lower()) for h in headings)]
    assert anchor in anchors, link


def test_ci_finds_the_test_command_in_the_readme():
  lines = [line for line in _README.splitlines() if '-m pytest' in line]
  assert len(lines) == 1
  assert lines[0].startswith('python3 -m venv .venv && ')


def test_the_version_is_the_same_everywhere():
  version = fliqs_jax.__version__
  assert f'\nversion: {version}\n' in (_ROOT / 'CITATION.cff').read_text()
  changes = (_ROOT / 'CHANGELOG.md').read_text()
  assert re.findall(r'^## \[(\d.*?)\]', changes, re.MULTILINE)[0] == version
