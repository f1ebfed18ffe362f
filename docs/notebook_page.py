"""Turns the notebook into a page when mkdocs builds the site."""

import json
import pathlib

from mkdocs.structure import files as files_lib

_NOTEBOOK = pathlib.Path(__file__).parents[1] / 'examples/own_model.ipynb'


def on_files(files, config):
  """Adds the page; mkdocs calls this after it has collected the other files."""
  cells = json.loads(_NOTEBOOK.read_text())['cells']
  text = '\n\n'.join(block for cell in cells for block in _blocks(cell))
  page = files_lib.File.generated(config, 'notebook.md', content=text)
  files.append(page)
  return files


def _blocks(cell):
  """Yields a cell's text, or its code and its output."""
  source = ''.join(cell['source'])
  if cell['cell_type'] == 'markdown':
    yield source
    return
  yield f'```python\n{source}\n```'
  for output in cell['outputs']:
    text = ''.join(output.get('text') or output['data']['text/plain'])
    yield f'```text\n{text.rstrip()}\n```'
