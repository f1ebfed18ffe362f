"""Table, picture and verdicts of an analysis, and the files with them."""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import html
import io
import os
import pathlib
from typing import Any, NamedTuple

from matplotlib import figure as figure_lib

from fliqs_jax.report import figures
from fliqs_jax.report import number_text
from fliqs_jax.report import page
from fliqs_jax.runtime import files
from fliqs_jax.sweep import page as sweep_page


class Column(NamedTuple):
  """A column of the table.

  Attributes:
    key: key of a row's value.
    title: head of the column.
    form: format of a number; empty for a text.
    error: key of what follows a plus-minus sign; empty for nothing.
    scale: factor of the numbers.
  """

  key: str
  title: str
  form: str = ''
  error: str = ''
  scale: float = 1


@dataclasses.dataclass(frozen=True)
class Finding:
  """What an analysis found.

  Attributes:
    title: title of the page.
    text: paragraphs: what is measured and how, and the choices made.
    columns: columns of the table.
    rows: {key: number or text} of each row; a key that is missing, or None,
      gives an empty cell. The CSV file holds all keys.
    verdicts: sentences that compare with the expected figures.
    draw: `() -> figure`.
    caption: what the figure shows.
  """

  title: str
  text: Sequence[str]
  columns: Sequence[Column]
  rows: Sequence[Mapping[str, Any]]
  verdicts: Sequence[str]
  draw: Callable[[], figure_lib.Figure]
  caption: str

  def cells(self) -> list[list[str]]:
    """Returns the cells of the table; the first row is the head."""
    return [
      [column.title for column in self.columns],
      *([_cell(row, c) for c in self.columns] for row in self.rows),
    ]

  def markdown(self) -> str:
    """Returns the table and the verdicts."""
    head, *rows = self.cells()
    lines = [f'- {verdict}' for verdict in self.verdicts]
    return '\n'.join([number_text.markdown(head, rows), '', *lines])


def _cell(row: Mapping[str, Any], column: Column) -> str:
  value, error = row.get(column.key), row.get(column.error)
  if value is None or not column.form:
    return '' if value is None else str(value)
  text = f'{column.scale * value:{column.form}}'
  if error is None:
    return text
  return f'{text} ± {column.scale * error:{column.form.lstrip("+")}}'


def write(finding: Finding, name: str, out: str | os.PathLike[str]) -> str:
  """Writes NAME.csv, NAME.png and NAME.html to the directory `out`.

  Args:
    finding: what to write.
    name: name of the analysis.
    out: path of the directory, which is made.

  Returns:
    The path of the page.
  """
  directory = pathlib.Path(out)
  directory.mkdir(parents=True, exist_ok=True)
  files.write_bytes(directory / f'{name}.csv', _csv(finding.rows).encode())
  image = figures.pngs(finding.draw)
  files.write_bytes(directory / f'{name}.png', image[0])
  path = directory / f'{name}.html'
  files.write_bytes(path, _render(finding, image).encode())
  return str(path)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
  text = io.StringIO()
  keys = dict.fromkeys(key for row in rows for key in row)
  writer = csv.DictWriter(text, list(keys), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _render(finding: Finding, image: tuple[bytes, bytes]) -> str:
  left = [i for i, column in enumerate(finding.columns) if not column.form]
  verdicts = ''.join(f'<li>{html.escape(v)}</li>' for v in finding.verdicts)
  body = [
    f'<h1>{html.escape(finding.title)}</h1>',
    *(f'<p class="soft">{html.escape(text)}</p>' for text in finding.text),
    page.figure(image, finding.caption),
    '<h2>Beside the expected figures</h2>',
    f'<ul>{verdicts}</ul>',
    sweep_page.cell_table(finding.cells(), left),
  ]
  return page.document(finding.title, body)
