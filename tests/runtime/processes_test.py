"""Real processes that are one run: they agree, stop together, end together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from fliqs_jax.run import experiment as experiment_lib
from fliqs_jax.run import train
from fliqs_jax.runtime import checkpoint
from fliqs_jax.runtime import processes
from tests import helpers
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_STEPS = 40  # Each of them waits for the other processes.
_LOGGED = list(range(5, _STEPS + 1, 5))


def _port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class _Run:
  """Processes of `fliqs_jax.main` with the same workdir."""

  def __init__(
    self, workdir, *flags, count=2, devices=2, steps=_STEPS, each=()
  ):
    port = _port()
    self.logs, self.children = [], []
    logs = pathlib.Path(tempfile.mkdtemp(dir=workdir.parents[2]))
    for i in range(count):
      log = logs / f'{i}.log'
      own = dict(
        FLIQS_COORDINATOR=f'127.0.0.1:{port}',
        FLIQS_NUM_PROCESSES=str(count),
        FLIQS_PROCESS_ID=str(i),
        JAX_NUM_CPU_DEVICES=str(devices),
        JAX_PLATFORMS='cpu',
      )
      command = [
        *(sys.executable, '-m', 'fliqs_jax.main'),
        f'--config=tests/tiny.py:steps={steps}',
        f'--workdir={workdir}',
        *flags,
        *(each[i] if each else ()),
      ]
      with log.open('w') as file:
        self.children.append(
          subprocess.Popen(
            command, cwd=_ROOT, stderr=file, env={**os.environ, **own}
          )
        )
      self.logs.append(log)

  def text(self, i):
    return self.logs[i].read_text()

  def wait_for(self, moment):
    deadline = time.monotonic() + 240
    while moment not in self.text(0):
      assert time.monotonic() < deadline, self.text(0)
      assert self.children[0].poll() is None, self.text(0)
      time.sleep(0.01)

  def wait(self):
    return [child.wait(timeout=240) for child in self.children]


def _history(workdir):
  lines = (workdir / 'history.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of two processes with two devices each, from start to end."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  run = _Run(workdir)
  assert run.wait() == [0, 0], run.text(0) + run.text(1)
  return workdir, run


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """One that was asked to stop: a SIGTERM to its second process alone."""
  workdir = tmp_path_factory.mktemp('runs') / 'stopped'
  run = _Run(workdir)
  run.wait_for(f'step 15/{_STEPS}')
  run.children[1].send_signal(signal.SIGTERM)
  assert run.wait() == [75, 75], run.text(0) + run.text(1)
  return workdir, run


@pytest.mark.slow
def test_the_first_process_writes_and_all_log_with_their_index(whole):
  workdir, run = whole
  assert (workdir / 'report.html').exists()
  rows = _history(workdir)
  assert [row['step'] for row in rows] == _LOGGED
  for i in (0, 1):
    assert f'[{i}/2] step {_STEPS}/{_STEPS}' in run.text(i)
    heartbeat = json.loads((workdir / 'heartbeat' / f'{i}.json').read_text())
    assert heartbeat['step'] == _STEPS
    assert abs(heartbeat['time'] - time.time()) < 600
  assert 'report.html' in run.text(0)
  assert 'report.html' not in run.text(1)


@pytest.mark.slow
def test_the_processes_are_one_run_on_any_number_of_devices(whole, tmp_path):
  one, two = tmp_path, whole[0]
  train.train_and_evaluate(tiny.get_config(f'steps={_STEPS}'), one)
  assert (one / 'arch.json').read_bytes() == (two / 'arch.json').read_bytes()
  # Later a value at the edge of two steps of a grid falls to the other one.
  for a, b in zip(_history(one)[:4], _history(two)[:4], strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)
    # Of the same architectures; others differ by a hundredth and more.
    np.testing.assert_allclose(a['sampled_cost'], b['sampled_cost'], rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step(stopped):
  workdir, run = stopped
  steps = set()
  for i in (0, 1):
    said = run.text(i)
    assert 'the same command resumes the run' in said
    steps.add(said.partition('saved at step ')[2].split()[0])
  assert len(steps) == 1
  assert (workdir / 'checkpoints' / steps.pop()).is_dir()
  assert not (workdir / 'result.json').exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_bit_identical(stopped, whole, tmp_path):
  workdir = tmp_path / 'whole'  # Paths are in no file that is compared.
  shutil.copytree(stopped[0], workdir)
  # Both must see that the newest cannot be used, and take the one before.
  older, newest = sorted(map(int, os.listdir(workdir / 'checkpoints')))[-2:]
  for file in (workdir / 'checkpoints' / str(newest)).rglob('*'):
    if file.is_file() and file.parent.name == 'd':
      file.write_bytes(file.read_bytes()[:-7])
  run = _Run(workdir)
  assert run.wait() == [0, 0], run.text(0) + run.text(1)
  for i in (0, 1):
    assert f'checkpoint of step {newest} in' in run.text(i)
    assert f'resumed at step {older}' in run.text(i)
  assert helpers.facts(workdir) == helpers.facts(whole[0])


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_processes(
  stopped, whole, tmp_path
):
  workdir = tmp_path / 'stopped'
  shutil.copytree(stopped[0], workdir)
  newest = max(map(int, os.listdir(workdir / 'checkpoints')))
  run = _Run(workdir, count=1, devices=8)
  assert run.wait() == [0], run.text(0)
  assert f'resumed at step {newest}' in run.text(0)
  assert [row['step'] for row in _history(workdir)] == _LOGGED
  ours, theirs = ((w / 'arch.json').read_bytes() for w in (workdir, whole[0]))
  assert ours == theirs


@pytest.mark.slow
def test_what_many_devices_saved_is_read_by_one(stopped):
  config = tiny.get_config(f'steps={_STEPS}')
  shapes = jax.eval_shape(experiment_lib.build(config).initial_state)
  with checkpoint.Checkpoints(stopped[0] / 'checkpoints') as checkpoints:
    restored = checkpoints.restore_latest(shapes)
  assert restored.step == int(restored.state.step)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
  run = _Run(tmp_path / 'killed', '--dead_after=5', steps=20000)
  run.wait_for('step 10/')
  run.children[1].kill()
  killed = time.monotonic()
  status, _ = run.wait()
  # Not one that means: finished, do not start again, or saved.
  assert status not in (0, 2, 75)
  assert time.monotonic() - killed < 60
  assert 'another task died' in run.text(0) or 'is gone' in run.text(0)


@pytest.mark.slow
def test_the_launcher_starts_all_again_when_one_is_killed(whole, tmp_path):
  workdir = tmp_path / 'whole'
  with (tmp_path / 'log').open('w') as log:
    launcher = subprocess.Popen(
      [
        *(sys.executable, '-m', 'launch', 'local', '--processes=2'),
        *('--cpu_devices=2', f'--config=tests/tiny.py:steps={_STEPS}'),
        *(f'--workdir={workdir}', '--grace=5'),
      ],
      cwd=_ROOT,
      stderr=log,
    )
  heartbeat = workdir / 'heartbeat' / '1.json'
  deadline = time.monotonic() + 240
  while (
    not heartbeat.exists() or json.loads(heartbeat.read_text())['step'] < 15
  ):
    assert time.monotonic() < deadline, (tmp_path / 'log').read_text()
    time.sleep(0.01)
  os.kill(json.loads(heartbeat.read_text())['pid'], signal.SIGKILL)
  assert launcher.wait(timeout=240) == 0, (tmp_path / 'log').read_text()
  assert '1 of 3 restarts; starting again' in (tmp_path / 'log').read_text()
  assert helpers.facts(workdir) == helpers.facts(whole[0])


@pytest.mark.slow
def test_processes_find_each_other_through_a_cluster(tmp_path):
  """SLURM's variables, as srun sets them."""
  own = 'from fliqs_jax.runtime import processes as p; p.join(60, 60); '
  own += 'print(p.texts(f"{p.index()} of {p.count()}"))'
  # JAX takes the coordinator's port from the number of the job.
  job = str(_port())
  children = [
    subprocess.Popen(
      [sys.executable, '-c', own],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      text=True,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'SLURM_JOB_ID': job,
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_STEP_NUM_NODES': '1',
        'SLURM_NTASKS': '2',
        'SLURM_PROCID': str(i),
        'SLURM_LOCALID': str(i),
      },
    )
    for i in range(2)
  ]
  for child in children:
    assert "['0 of 2', '1 of 2']" in child.communicate(timeout=120)[0]


@pytest.mark.slow
def test_processes_of_different_configs_are_refused_by_name(tmp_path):
  run = _Run(
    tmp_path / 'run', each=(('--config.seed=1',), ('--config.seed=2',))
  )
  assert run.wait() == [2, 2]
  for i in (0, 1):
    assert 'process 1 was started with another config' in run.text(i)
    assert 'config.seed: 1 -> 2' in run.text(i)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all_with_its_words(tmp_path):
  (tmp_path / 'file').touch()
  run = _Run(tmp_path / 'file' / 'below')  # Only the first makes the workdir.
  assert run.wait() == [2, 2]
  assert 'cannot be used' in run.text(0)
  assert 'process 0: --workdir=' in run.text(1)


@pytest.mark.slow
def test_a_wrong_coordinator_address_is_named(tmp_path):
  run = _Run(tmp_path / 'run', '--join_timeout=3', count=2)
  run.children[0].kill()  # Nobody answers the second.
  assert run.wait()[1] == 1
  assert 'did not meet at 127.0.0.1:' in run.text(1)
  assert 'within 3 s' in run.text(1)


@pytest.mark.parametrize(
  'told',
  [
    ('', '2', '0'),
    ('host', '2', '0'),
    ('host:1', '2', '2'),
    ('host:1', 'two', '0'),
    ('host:1', '', '0'),
  ],
)
def test_an_environment_that_cannot_be_is_refused(monkeypatch, told):
  names = ('FLIQS_COORDINATOR', 'FLIQS_NUM_PROCESSES', 'FLIQS_PROCESS_ID')
  for name, value in zip(names, told):
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match='they must be HOST:PORT'):
    processes.join(1, 1)


@pytest.mark.parametrize(('meet_after', 'ended'), [(0.0, []), (0.4, [1])])
def test_the_timer_ends_a_process_that_waits_and_no_other(
  monkeypatch, meet_after, ended
):
  names = ('FLIQS_COORDINATOR', 'FLIQS_NUM_PROCESSES', 'FLIQS_PROCESS_ID')
  for name, value in zip(names, ('host:1', '2', '1')):
    monkeypatch.setenv(name, value)
  given, exits = [], []

  def initialize(**how):
    given.append(how)
    time.sleep(meet_after)

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(os, '_exit', exits.append)
  processes.join(0.2, 7)
  time.sleep(0.3)
  assert exits == ended
  assert given == [
    dict(
      coordinator_address='host:1',
      num_processes=2,
      process_id=1,
      cluster_detection_method='deactivate',
      initialization_timeout=60.2,
      heartbeat_timeout_seconds=7,
    )
  ]


@pytest.mark.parametrize(
  ('variables', 'asks'),
  [
    ({}, False),
    (dict(SLURM_NTASKS='1'), False),
    (dict(SLURM_NTASKS='2'), True),
    (dict(OMPI_COMM_WORLD_SIZE='2'), True),
    (dict(SLURM_NTASKS='2', FLIQS_NUM_PROCESSES='1'), False),
    (dict(TPU_WORKER_HOSTNAMES=''), True),
    (dict(TPU_SKIP_MDS_QUERY=None), True),  # A machine with TPU chips.
  ],
)
def test_a_cluster_is_asked_for_the_others_if_there_is_one(
  monkeypatch, variables, asks
):
  for name in list(os.environ):
    if name.startswith(('FLIQS_', 'SLURM_', 'OMPI_', 'TPU_')):
      monkeypatch.delenv(name)
  for name, value in (dict(TPU_SKIP_MDS_QUERY='1') | variables).items():
    if value is not None:
      monkeypatch.setenv(name, value)
  asked = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **how: asked.append(how)
  )
  processes.join(5, 7)
  assert (
    asked
    == [dict(initialization_timeout=65, heartbeat_timeout_seconds=7)] * asks
  )


_STOPS = """
import hashlib, logging, sys, time
from fliqs_jax.runtime import processes
logging.basicConfig(level=logging.INFO, format='%(message)s')
stop = processes.Stop()
if sys.argv[1] == 'compiles':  # Native code, which no handler of Python ends.
  print('ready', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
with processes.stepping():
  assert not stop()
  print('ready', flush=True)
  while not stop():
    time.sleep(0.01)
  assert stop()  # All runs of this process end, one after another.
time.sleep(0.5)  # It saves.
sys.exit(7)
"""


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  ('what', 'status', 'line'),
  [('steps', 7, ''), ('compiles', 75, 'asked to stop: the same command goes')],
)
def test_a_signal_is_answered_after_a_step_or_at_once(what, how, status, line):
  with subprocess.Popen(
    [sys.executable, '-c', _STOPS, what],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(how)
    began = time.monotonic()
    _, log = process.communicate()
  assert process.returncode == status
  assert time.monotonic() - began < 5
  assert log.count('\n') == (1 if line else 0)
  assert log.startswith(line)


def test_a_second_interrupt_does_not_wait_for_a_step():
  waits = _STOPS.replace('while not stop()', 'while True')
  with subprocess.Popen(
    [sys.executable, '-c', waits, 'steps'], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # Signals that are pending together are one.
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
  assert process.returncode == 75
