"""Lines of a command: its log, and its end in one line and an exit status."""

from collections.abc import Callable, Sequence
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
import traceback
from typing import Any

from absl import flags
from absl import logging as absl_logging

from fliqs_jax.runtime import files

# To start the same command again would change nothing; what a signal stopped
# goes on; what crashed may work the next time.
MISTAKE, STOPPED, CRASHED = 2, 75, 1

# A path at home, behind a flag that is no key of the config, or alone.
_AT_HOME = re.compile(r'\A((?:--\w+=)?)(~.*)', re.DOTALL)
_PERMISSION = 'choose a place that can be read and written'
# What the same command cannot mend by itself, and what a user does about it.
_REMEDIES = {
  errno.ENOSPC: 'free some space and start the same command again',
  errno.EDQUOT: 'free some of your quota and start the same command again',
  errno.EFBIG: 'allow larger files and start the same command again',
  errno.EROFS: _PERMISSION,
  errno.EACCES: _PERMISSION,
  errno.EPERM: _PERMISSION,
  errno.ENOENT: 'check the path',
  errno.ENOTDIR: 'check the path',
  errno.EISDIR: 'check the path',
  errno.EEXIST: 'check the path',
  errno.ENAMETOOLONG: 'choose a shorter path',
}


def line(error: BaseException) -> str:
  """Returns an error in one line, with the remedy if the system reported it."""
  text = ' '.join(str(error).split()) or type(error).__name__
  remedy = _remedy(error)
  return f'{text.rstrip(".")}; {remedy}' if remedy else text


def loaded(config: Any) -> Any:
  """Returns what a config file gave.

  Raises:
    OSError: the file could not be read.
    ValueError: it is no config.
  """
  if not hasattr(config, 'to_dict'):
    raise ValueError(
      f'get_config returned a {type(config).__name__}; it must return an '
      'ml_collections.ConfigDict'
    )
  return config


def no_config(error: BaseException, where: str = '--config') -> str:
  """Returns in one line why a config file and its flags give no config.

  Loading a file as Python raises any error. `str` would quote the text of a
  KeyError, which has quotes of its own.

  Args:
    error: what was raised.
    where: the flags.
  """
  said: Any = error
  while isinstance(said, (AttributeError, KeyError)) and said.args:
    said = said.args[0]
  lines = (str(said).strip() or repr(error)).splitlines()
  text = ' '.join(' '.join(lines).split())
  if isinstance(error, flags.Error):
    # It may hold a whole traceback, whose last line says why.
    last = lines[-1].removeprefix('ValueError: ')
    return f'{where} cannot be loaded: {last}' if len(lines) > 1 else text
  frames = traceback.extract_tb(error.__traceback__)
  is_of_file = any(f.name in ('get_config', '<module>') for f in frames)
  if isinstance(error, (AttributeError, KeyError)) and not is_of_file:
    if "no attribute 'get_config'" in text:
      return f'{where} cannot be loaded: it has no function get_config(arg)'
    return f'{where}: no such key: {text}'
  name = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
  return f'{where} cannot be loaded: {name}{text}'


def status(error: BaseException) -> int:
  """Returns `MISTAKE` where the same command would fail again."""
  lasts = isinstance(error, (ValueError, FileNotFoundError)) or _remedy(error)
  return MISTAKE if lasts else CRASHED


def _remedy(error: BaseException) -> str:
  if isinstance(error, OSError):
    return _REMEDIES.get(error.errno or 0, '')
  if isinstance(error, ValueError):
    return ''
  # TensorStore reports errors of the system in words.
  found = (r for n, r in _REMEDIES.items() if os.strerror(n) in str(error))
  return next(found, '')


def at_home(arguments: Sequence[str]) -> list[str]:
  """Returns the arguments of a command with the user's home for `~`.

  A shell leaves it behind an equals sign, `--out=~/runs`. Keys of the config
  stay as they are: who reads a file may have another home.

  Raises:
    ValueError: the user has no home directory, or there is no such user.
  """

  def whole(match: re.Match[str]) -> str:
    return f'{match[1]}{files.at_home(match[2])}'

  return [_AT_HOME.sub(whole, argument) for argument in arguments]


def reported(
  main: Callable[[Sequence[str]], int],
) -> Callable[[Sequence[str]], int]:
  """Lets a command end with a line and a status where it raises an error.

  Args:
    main: `arguments -> status`. Its ValueErrors are mistakes of a user.
  """

  @functools.wraps(main)
  def wrapped(argv: Sequence[str]) -> int:
    try:
      return main(at_home(argv))
    except (ValueError, OSError) as error:
      print(line(error), file=sys.stderr)
      return status(error)

  return wrapped


def log(place: str = '') -> logging.Logger:
  """Lets this project's lines through, and returns its logger.

  Only these: libraries log a hundred lines for each checkpoint.

  Args:
    place: a text at the beginning of each line, behind the time.
  """
  absl_logging.set_verbosity(absl_logging.ERROR)
  logger = logging.getLogger('fliqs_jax')
  logger.setLevel(logging.INFO)
  logger.propagate = False
  if not logger.handlers:
    logger.addHandler(logging.StreamHandler())
  form = ' '.join(filter(None, ('%(asctime)s', place, '%(message)s')))
  logger.handlers[0].setFormatter(logging.Formatter(form, '%H:%M:%S'))
  return logger


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Runs a command that keeps nothing for a next start, and ends the process.

  Ctrl-C ends it at once and silently. Files are replaced as a whole, so none is
  left half.
  """
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A terminal that knows ASCII only still shows the rest.
    sys.stdout.reconfigure(errors='backslashreplace')
  sys.exit(main(sys.argv[1:]))
