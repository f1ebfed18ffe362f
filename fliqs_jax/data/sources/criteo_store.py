"""Conversion of Criteo's TSV to rows of fixed width, mapped into memory.

The format is that of the Kaggle display advertising challenge, 40 fields with
tabs between them and no header: a label, 0 or 1; 13 integers; 26 categories,
hexadecimal numbers of up to 8 digits. Integers and categories may be empty.

A TSV of 46 million lines, 11 GB, takes minutes to read and has no random
access; as rows it is 7.5 GB, and a batch is one gather.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import typing

import numpy as np

from fliqs_jax.data import build_once
from fliqs_jax.runtime import files

_LOG = logging.getLogger(__name__)

NUM_INTEGERS, NUM_CATEGORIES = 13, 26
_NUM_FIELDS = 1 + NUM_INTEGERS + NUM_CATEGORIES

# The value of a missing integer.
MISSING = -(2**31)

ROW = np.dtype(
  [
    ('integers', '<i4', NUM_INTEGERS),
    ('categories', '<u4', NUM_CATEGORIES),
    # Bit i is set if category i is missing: any number, also zero, is valid.
    ('missing', '<u4'),
    ('label', '<u4'),
  ]
)

_ROWS, _INFO = 'rows.bin', 'info.json'
_VERSION = 2
_HASH = 'sha256'
_BLOCK_BYTES = 1 << 22
_BLOCKS_PER_LINE_OF_LOG = 256  # A GB.
_NAMED = 5  # Malformed lines that an error or a warning names.

# The value of each byte as a digit; 255 for a byte that is no digit.
_DIGITS = np.full(256, 255, np.uint8)
for _characters, _first in (b'0123456789', 0), (b'abcdef', 10), (b'ABCDEF', 10):
  _DIGITS[list(_characters)] = _first + np.arange(len(_characters))


@dataclasses.dataclass(frozen=True)
class Malformed:
  """A malformed line of the TSV.

  Attributes:
    line: number of the line, from 1.
    problem: the predicate of a sentence about the line, such as `has 3 fields`.
  """

  line: int
  problem: str


def open_rows(
  source: pathlib.Path, store: pathlib.Path, max_bad_lines: int
) -> np.ndarray:
  """Returns the well-formed lines of a TSV as [N] of type ROW, not yet read.

  Args:
    source: the TSV; it may be deleted after the conversion.
    store: the converted directory, which is made on first use.
    max_bad_lines: largest number of malformed lines that may be left out.

  Raises:
    ValueError: more lines are malformed, the TSV is missing, or it is not the
      one that was converted.
  """
  if not store.exists():
    _convert(source, store, max_bad_lines)
  info = _read_info(store)
  if (
    info['version'] != _VERSION
    or info['rows'] * ROW.itemsize != (store / _ROWS).stat().st_size
    or not _is_source(source, info)
  ):
    raise ValueError(
      f'{store} was not made from this {source.name}, was made by another '
      'version of this program, or is damaged; delete it, and the next start '
      'makes it again'
    )
  bad = [Malformed(**line) for line in info['malformed']]
  if len(bad) > max_bad_lines:
    raise ValueError(_too_many(source, bad, max_bad_lines))
  if bad:
    _LOG.warning('left out: %s', _describe(source, bad))
  return np.memmap(store / _ROWS, ROW, 'r', shape=(info['rows'],))


def _read_info(store: pathlib.Path) -> dict[str, typing.Any]:
  try:
    info = files.read_json(store / _INFO)
    info['version'], info['source_bytes'], info['rows'], info['malformed']
    return info
  except (ValueError, KeyError, TypeError):
    raise ValueError(
      f'{store / _INFO} is damaged; delete {store}, and the next start makes '
      'it again'
    ) from None


def _is_source(source: pathlib.Path, info: dict[str, typing.Any]) -> bool:
  """Returns whether a TSV, if it still exists, is what was converted."""
  if not source.exists():
    return True
  status = source.stat()
  if status.st_size != info['source_bytes']:
    return False
  if status.st_mtime_ns == info['source_mtime_ns']:
    return True
  # A copy of the same bytes is as good.
  _LOG.info('%s was written after its conversion: comparing it', source)
  with source.open('rb') as file:
    return hashlib.file_digest(file, _HASH).hexdigest() == info['source_hash']


def _too_many(
  source: pathlib.Path, bad: Sequence[Malformed], max_bad_lines: int
) -> str:
  return (
    f'config.data.max_bad_lines={max_bad_lines} is exceeded: '
    f'{_describe(source, bad)}; repair them, or raise this number to leave '
    'them out'
  )


def _describe(source: pathlib.Path, bad: Sequence[Malformed]) -> str:
  named = [f'line {line.line} {line.problem}' for line in bad[:_NAMED]]
  if len(bad) > _NAMED:
    named.append('...')
  noun = 'malformed line' if len(bad) == 1 else 'malformed lines'
  return f'{len(bad)} {noun} in {source}: {"; ".join(named)}'


def _convert(
  source: pathlib.Path, store: pathlib.Path, max_bad_lines: int
) -> None:
  if not source.exists():
    raise ValueError(
      f'{source} does not exist: it must be the labelled file of the Kaggle '
      'display advertising challenge, 40 fields with tabs between them; put '
      'it there'
    )
  with build_once.directory(store) as unfinished:
    if unfinished is None:  # Another process has just made it.
      return
    rows, bad, begun, digest = 0, [], source.stat(), hashlib.new(_HASH)
    with source.open('rb') as lines, (unfinished / _ROWS).open('wb') as out:
      for i, (block, first_line) in enumerate(_blocks(lines, digest)):
        if i % _BLOCKS_PER_LINE_OF_LOG == 0:
          percent = 100 * i * _BLOCK_BYTES // max(begun.st_size, 1)
          _LOG.info('converting %s: %d %%', source, percent)
        parsed, malformed = parse(block, first_line)
        bad += malformed
        if len(bad) > max_bad_lines:
          raise ValueError(_too_many(source, bad, max_bad_lines))
        rows += len(parsed)
        out.write(parsed.tobytes())
      out.flush()
      # Without fsync a power cut could keep the new name but lose the bytes.
      os.fsync(out.fileno())
    if not rows:
      raise ValueError(
        f'{source} holds no line of 40 fields with tabs between them; put '
        "Criteo's labelled file there"
      )
    files.write_json(
      unfinished / _INFO,
      dict(
        version=_VERSION,
        source_bytes=begun.st_size,
        source_mtime_ns=begun.st_mtime_ns,
        source_hash=digest.hexdigest(),
        rows=rows,
        malformed=[dataclasses.asdict(line) for line in bad],
      ),
    )


def _blocks(
  lines: typing.BinaryIO, digest: typing.Any
) -> Iterator[tuple[bytes, int]]:
  """Yields whole lines, megabytes at a time, and the number of the first."""
  rest, line = b'', 1
  while chunk := lines.read(_BLOCK_BYTES):
    digest.update(chunk)
    whole, newline, rest = (rest + chunk).rpartition(b'\n')
    if newline:
      yield whole + newline, line
      line += whole.count(b'\n') + 1
    elif len(rest) > _BLOCK_BYTES:
      raise ValueError(
        f'{lines.name} is no TSV: line {line} does not end within '
        f"{len(rest)} bytes; put Criteo's labelled file there"
      )
  if rest:
    yield rest + b'\n', line


def parse(
  block: bytes, first_line: int = 1
) -> tuple[np.ndarray, list[Malformed]]:
  """Returns the rows of the well-formed lines, and the malformed lines.

  Args:
    block: complete lines, each with its newline.
    first_line: number of the block's first line in the file, from 1.

  Returns:
    [N] rows of type ROW, and a `Malformed` for each other line.
  """
  text = np.frombuffer(block, np.uint8)
  separators = np.flatnonzero((text == ord('\t')) | (text == ord('\n')))
  # [lines] the index in `separators` of each line's newline.
  newlines = np.flatnonzero(text[separators] == ord('\n'))
  num_fields = np.diff(newlines, prepend=-1)
  good = num_fields == _NUM_FIELDS
  ends = separators[np.repeat(good, num_fields)].reshape(-1, _NUM_FIELDS)
  line_starts = np.append(0, separators[newlines[:-1]] + 1)
  starts = np.empty_like(ends)
  starts[:, 0], starts[:, 1:] = line_starts[good], ends[:, :-1] + 1
  lengths = ends - starts

  rows = np.zeros(len(ends), ROW)
  last = 1 + NUM_INTEGERS
  rows['label'] = text[starts[:, 0]] - ord('0')
  valid = (lengths[:, 0] == 1) & (rows['label'] <= 1)
  rows['integers'], sound = _integers(
    text, starts[:, 1:last], lengths[:, 1:last]
  )
  valid &= sound.all(1)
  values, sound = _numbers(text, starts[:, last:], lengths[:, last:], 16, 8)
  valid &= sound.all(1)
  rows['categories'] = values
  absent = (lengths[:, last:] == 0).astype(np.uint32)
  rows['missing'] = absent @ (1 << np.arange(NUM_CATEGORIES, dtype=np.uint32))

  is_bad = ~good
  is_bad[good] = ~valid
  malformed = []
  for i in np.flatnonzero(is_bad):
    line = block[line_starts[i] : separators[newlines[i]]]
    malformed.append(Malformed(first_line + int(i), _problem(line)))
  return rows[valid], malformed


def _numbers(
  text: np.ndarray,
  starts: np.ndarray,
  lengths: np.ndarray,
  base: int,
  most_digits: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns int64 values and bool validity of fields; an empty one is 0."""
  values = np.zeros(starts.shape, np.int64)
  valid = lengths <= most_digits
  for i in range(min(most_digits, lengths.max(initial=0))):
    inside = i < lengths
    digits = _DIGITS[text[np.where(inside, starts + i, 0)]]
    valid &= ~inside | (digits < base)
    values = np.where(inside, values * base + digits, values)
  return values, valid


def _integers(
  text: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns int64 values, MISSING where empty, and bool validity."""
  signed = text[starts] == ord('-')  # An empty field starts at its end.
  values, valid = _numbers(text, starts + signed, lengths - signed, 10, 10)
  valid &= ~signed | (lengths > 1)
  valid &= values < 2**31
  values = np.where(signed, -values, values)
  return np.where(valid & (lengths > 0), values, MISSING), valid


def _problem(line: bytes) -> str:
  """Returns what is wrong with a malformed line."""
  fields = line.split(b'\t')
  if len(fields) != _NUM_FIELDS:
    noun = 'field' if len(fields) == 1 else 'fields'
    return f'has {len(fields)} {noun}, not {_NUM_FIELDS}'
  if fields[0] not in (b'0', b'1'):
    return f'has label {_shown(fields[0])}, not 0 or 1'
  for i, field in enumerate(fields[1 : 1 + NUM_INTEGERS], 1):
    if not re.fullmatch(rb'(-?\d{1,10})?', field) or abs(int(field or 0)) >= (
      2**31
    ):
      return f'has integer I{i} = {_shown(field)}, no number of 32 bits'
  for i, field in enumerate(fields[1 + NUM_INTEGERS :], 1):
    if not re.fullmatch(rb'[\da-fA-F]{0,8}', field):
      return f'has category C{i} = {_shown(field)}, no 8 hexadecimal digits'
  raise AssertionError(f'{line!r} is well formed')


def _shown(field: bytes) -> str:
  text = field if len(field) <= 20 else field[:20] + b'...'
  return repr(text.decode('ascii', 'backslashreplace'))
