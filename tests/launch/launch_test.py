"""Launching: what would be run is sound, and what runs lives and dies well."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fliqs_jax.sweep import __main__ as sweep_command
from fliqs_jax.sweep import sweep_file
from launch import __main__ as launch
from launch import common
from launch import local

# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)
_ROOT = pathlib.Path(__file__).parents[2]
_RUN = ['--config=configs/digits.py:space=int_l', '--workdir=gs://bucket/a']
_SWEEP = ['--sweep=configs/sweeps/digits.yaml', '--out=gs://bucket/s']
_TPU = ['--project=my-p', '--zone=us-central1-a', '--accelerator=v6e-16']
_GKE = [
  '--image=eu.gcr.io/p/fliqs:1',
  '--accelerator=tpu-v5-lite-podslice',
  '--topology=4x4',
  '--queue=multislice-queue',
]
_XPK = ['--xpk', '--cluster=c', '--project=p', '--zone=us-central1-a']
_XPK += ['--tpu_type=v5litepod-16', '--storage=s', '--image=i']
_DISK = ['--config=configs/digits.py', '--workdir=/scratch/a run']
_DISK_SWEEP = ['--sweep=configs/sweeps/digits.yaml', '--out=/scratch/s']
_GPU = ['--gpus_per_node=8', '--nodes=2', '--setup=module load cuda']

_SCRIPTS = [
  ['local', *_DISK, '--processes=2', '--cpu_devices=2'],
  ['local', *_DISK_SWEEP],
  *(['tpu_vm', a, *_RUN, *_TPU] for a in ('up', 'resume', 'run', 'install')),
  *(
    ['tpu_vm', a, '--name=n', *_TPU]
    for a in ('create', 'logs', 'status', 'stop', 'delete')
  ),
  ['tpu_vm', 'up', *_SWEEP, *_TPU, '--spot', '--direct', '--restarts=0'],
  ['gke', *_RUN, *_GKE],
  ['gke', 'resume', *_SWEEP, *_GKE, '--spot'],
  ['gke', *_SWEEP, *_XPK],
  ['gke', 'build', '--image=i'],
  *(['gke', a, '--name=n'] for a in ('logs', 'status', 'delete')),
  ['slurm', *_DISK, *_GPU],
  ['slurm', *_DISK_SWEEP, *_GPU, '--partition=gpu', '--account=a'],
  ['slurm', 'logs', *_DISK_SWEEP],
  *(['slurm', a, '--name=n'] for a in ('status', 'delete')),
]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(_ROOT)


def _dry(capsys, *argv):
  """Returns the script that would be run."""
  assert launch.main([*argv, '--dry_run']) == 0
  return capsys.readouterr().out


def _inner(script):
  """Returns the scripts and manifests inside a script."""
  return re.findall("<<'END_OF_FILE'\n(.*?)\nEND_OF_FILE\n", script, re.S)


def _shellcheck():
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  return str(beside) if beside.exists() else shutil.which('shellcheck')


@pytest.mark.parametrize('argv', _SCRIPTS, ids=lambda argv: ' '.join(argv[:2]))
def test_every_script_is_sound_shell(capsys, tmp_path, argv):
  script = _dry(capsys, *argv)
  shells = [script, *(s for s in _inner(script) if s.startswith('#!'))]
  for i, text in enumerate(shells):
    (tmp_path / f'{i}.sh').write_text(text)
  paths = sorted(map(str, tmp_path.iterdir()))
  for path in paths:
    subprocess.run(['bash', '-n', path], check=True)
  if not (tool := _shellcheck()):
    pytest.skip('shellcheck comes with the extra `test`')
  # /etc/os-release is another machine's.
  lint = [tool, '--severity=warning', '--exclude=SC1091', *paths]
  done = subprocess.run(lint, capture_output=True, text=True)
  assert not done.returncode, done.stdout


def test_a_dry_run_of_one_search_is_this(capsys):
  assert _dry(capsys, 'gke', *_SWEEP, *_XPK).splitlines()[2] == (
    'xpk workload create --workload=digits-seed-0-space-int-s-target-12fcf1'
    ' --cluster=c --project=p --zone=us-central1-a --tpu-type=v5litepod-16'
    ' --num-slices=1 --docker-image=i --storage=s --max-restarts=3'
    ' --restart-on-exit-codes=75 --termination-grace-period-seconds=300'
    " '--command=python -m fliqs_jax.main"
    ' --config=configs/digits.py:seed=0,space=int_s,target=1.25'
    " --workdir=/gcs/bucket/s/seed=0,space=int_s,target=1.25'"
  )


def test_buckets_are_mounted_wherever_they_stand(capsys):
  data = '--config.data.data_dir=gs://images/tfds'
  script = _dry(capsys, 'tpu_vm', *_RUN, *_TPU, data)
  assert '--config.data.data_dir=/gcs/images/tfds' in script
  assert '--workdir=/gcs/bucket/a' in script
  for bucket in ('bucket', 'images'):
    assert f'200000 {bucket} /gcs/{bucket}\n' in script
  assert 'gs://' not in script


def test_a_slash_at_the_end_of_a_directory_changes_nothing(capsys):
  for run in (_RUN, _SWEEP):
    *rest, directory = run
    slashed = [*rest, f'{directory}//']
    assert _dry(capsys, 'tpu_vm', *slashed, *_TPU) == _dry(
      capsys, 'tpu_vm', *run, *_TPU
    )


def test_a_workdir_may_be_at_home(capsys, monkeypatch):
  monkeypatch.setenv('HOME', '/h')
  config = '--config=configs/digits.py'
  data = '--config.data.data_dir=~/d'
  script = _dry(capsys, 'local', config, '--workdir=~/a/', data)
  assert '--workdir=/h/a ' in script
  assert "'--config.data.data_dir=~/d'" in script  # That of who reads it.


def test_a_slice_is_queued_installed_and_run_in_this_order(capsys):
  script = _dry(capsys, 'tpu_vm', 'resume', *_RUN, *_TPU, '--spot')
  calls = re.findall('gcloud compute tpus ([a-z-]+ [a-z]+)', script)
  assert calls == [
    'queued-resources delete',
    'queued-resources create',
    'queued-resources describe',
    'tpu-vm scp',
    'tpu-vm ssh',
    'tpu-vm scp',
    'tpu-vm ssh',
    'tpu-vm ssh',
  ]
  assert script.count('--project=my-p --zone=us-central1-a') == len(calls)
  assert '--runtime-version=v2-alpha-tpuv6e --spot' in script


def _manifests(script):
  (text,) = _inner(script)
  return list(yaml.safe_load_all(text))


def test_a_jobset_has_what_jobset_and_kueue_ask_for(capsys):
  (jobset,) = _manifests(_dry(capsys, 'gke', *_RUN, *_GKE, '--restarts=5'))
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert jobset['kind'] == 'JobSet'
  labels = jobset['metadata']['labels']
  assert labels['kueue.x-k8s.io/queue-name'] == 'multislice-queue'
  assert set(jobset['spec']) == {
    'network',
    'failurePolicy',
    'ttlSecondsAfterFinished',
    'replicatedJobs',
  }
  policy = jobset['spec']['failurePolicy']
  assert policy['maxRestarts'] == 5
  assert policy['restartStrategy'] == 'BlockingRecreate'
  (rule,) = policy['rules']
  # Of JobSet's API: the name's pattern, the actions, the Job's reason.
  assert re.fullmatch('[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
  assert rule['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  # 16 chips, 4 to a host.
  assert job['parallelism'] == job['completions'] == 4
  assert job['completionMode'] == 'Indexed'
  assert job['backoffLimit'] == 0
  saved, disrupted = job['podFailurePolicy']['rules']
  assert saved['action'] == disrupted['action'] == 'FailJob'
  assert saved['onExitCodes'] == {
    'containerName': 'fliqs',
    'operator': 'In',
    'values': [75],
  }
  # JobSet's schema asks for `status`, though Kubernetes has a default.
  assert disrupted['onPodConditions'] == [
    {'type': 'DisruptionTarget', 'status': 'True'}
  ]


def test_a_pod_has_its_chips_command_and_bucket(capsys):
  (jobset,) = _manifests(_dry(capsys, 'gke', *_RUN, *_GKE, '--spot'))
  (replicated,) = jobset['spec']['replicatedJobs']
  template = replicated['template']['spec']['template']
  pod = template['spec']
  assert pod['restartPolicy'] == 'Never'  # podFailurePolicy asks for it.
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
    'cloud.google.com/gke-spot': 'true',
  }
  (container,) = pod['containers']
  assert container['name'] == 'fliqs'
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert container['resources']['requests'] == {'google.com/tpu': 4}
  assert container['command'] == [
    'python',
    '-m',
    'fliqs_jax.main',
    '--config=configs/digits.py:space=int_l',
    '--workdir=/gcs/bucket/a',
  ]
  (volume,) = pod['volumes']
  (mount,) = container['volumeMounts']
  assert mount == {'name': volume['name'], 'mountPath': '/gcs/bucket'}
  assert volume['csi']['volumeAttributes']['bucketName'] == 'bucket'
  assert template['metadata']['annotations']['gke-gcsfuse/volumes'] == 'true'


@pytest.mark.parametrize(
  ('topology', 'chips', 'hosts', 'limit'),
  [('2x2', 4, 1, 4), ('1x1', 4, 1, 1), ('2x4', 8, 1, 8), ('8x8', 4, 16, 4)],
)
def test_hosts_follow_from_the_topology(capsys, topology, chips, hosts, limit):
  more = [f'--topology={topology}', f'--chips_per_host={chips}']
  (jobset,) = _manifests(_dry(capsys, 'gke', *_RUN, *_GKE, *more))
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = job['template']['spec']['containers']
  assert job['parallelism'] == hosts
  assert container['resources']['limits']['google.com/tpu'] == limit


def test_the_runs_of_a_sweep_have_names_of_their_own(capsys):
  manifests = _manifests(_dry(capsys, 'gke', *_SWEEP, *_GKE))
  names = [jobset['metadata']['name'] for jobset in manifests]
  assert len(set(names)) == len(manifests) == 27
  for name in names:
    assert re.fullmatch('[a-z]([a-z0-9-]*[a-z0-9])?', name)
    # A pod's name must fit into 63: -slice-, replica, index and 5 letters.
    assert len(name + '-slice-0-255-abcde') <= 63


def test_a_slurm_sweep_is_an_array_of_what_is_not_finished(capsys, tmp_path):
  done = tmp_path / 'seed=0,space=int_s,target=1.25'
  done.mkdir()
  (done / 'result.json').write_text('{}')
  sweep = [_SWEEP[0], f'--out={tmp_path}']
  (batch,) = _inner(_dry(capsys, 'slurm', *sweep, *_GPU, '--at_once=4'))
  assert '#SBATCH --array=0-25%4\n' in batch
  assert len(re.findall(r'^  \d+\) search', batch, re.M)) == 26
  assert 'target=1.25 srun' in batch
  assert f'{done} ' not in batch
  # JAX wants a process for each GPU; each sees all GPUs of its node.
  assert '--ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n' in batch


@pytest.mark.parametrize('is_sweep', [False, True])
def test_a_workdir_of_another_run_is_refused(capsys, tmp_path, is_sweep):
  file, workdir = tmp_path / 'one.yaml', tmp_path / 'runs' / 'run'
  workdir.mkdir(parents=True)
  declared = 'config: tests/tiny.py\narguments: {steps: %d}'

  def launched(steps, action):
    file.write_text(declared % steps)
    flags = [f'--config=tests/tiny.py:steps={steps}', f'--workdir={workdir}']
    if is_sweep:
      flags = [f'--sweep={file}', f'--out={workdir.parent}']
    return launch.main(['slurm', action, *flags, '--dry_run', *_GPU])

  file.write_text(declared % 60)
  (run,) = sweep_file.read(file).runs
  (workdir / 'config.json').write_text(json.dumps(sweep_file.config(run)))
  (workdir / 'result.json').write_text('{"metric": "loss", "found": {}}')
  if is_sweep:
    assert launched(60, 'up') == common.MISTAKE
    assert 'the run run there is damaged: ' in capsys.readouterr().err
  found = dict(loss=1.0, cost=2.0, unit='GBOPs')
  result = dict(metric='loss', found=found, warnings=[])
  (workdir / 'result.json').write_text(json.dumps(result))
  assert launched(60, 'up') == 0
  assert 'every run is finished' in capsys.readouterr().out
  assert launched(90, 'up') == common.MISTAKE
  captured = capsys.readouterr()
  assert 'train.steps: 60 -> 90' in captured.err
  assert captured.err.count('\n') == 1
  assert not captured.out
  assert launched(90, 'logs') == 0  # It starts nothing.


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], 'a platform, local, slurm, tpu_vm, gke, not nothing'),
    (['tpu'], "not 'tpu'"),
    (['local', 'down'], "argument action: invalid choice: 'down'"),
    (['local', *_DISK, '--proceses=2'], "unknown argument '--proceses=2'"),
    (['local', *_DISK, '--config.train.steps'], 'with an equals sign'),
    (['local', *_DISK, '--config.train.stepps=2'], 'no such key: '),
    (['local', *_DISK, '--config.train.steps=0'], 'train.steps=0 must be'),
    (['local', '--config=no.py', '--workdir=a'], "no config file 'no.py'"),
    (['local', '--config=configs/digits.py:x', '--workdir=a'], "argument 'x'"),
    (['local', '--config=configs/digits.py'], '--workdir=DIR'),
    (['local'], 'give --config=FILE and --workdir=DIR, or --sweep=FILE'),
    (['local', *_DISK, *_DISK_SWEEP], '--config or --sweep, not both'),
    (['local', *_DISK, '--processes=0'], '--processes=0 must be at least 1'),
    (['local', *_DISK, '--processes=x'], "--processes: invalid int value: 'x'"),
    (['local', *_DISK, '--restarts=-1'], '--restarts=-1 must be at least 0'),
    (['local', *_DISK, '--grace=nan'], '--grace=nan must be a finite number'),
    (['local', *_DISK, '--grace=-1'], '--grace=-1.0 must be a finite number'),
    (['local', *_RUN], 'gs://bucket/a is in a bucket'),
    (['local', *_DISK, '--config=configs/digits.py:space=INT9'], "'INT9'"),
    (
      ['slurm', *_DISK, *_GPU, '--config=configs/digits.py:steps=4'],
      'no search step among train.steps=4',
    ),
    (
      ['gke', *_RUN, *_GKE, "--config.quant.exclude=('no*',)"],
      "'no*' matches no",
    ),
    (
      ['tpu_vm', 'create', *_RUN, *_TPU, '--config.cost.target=99'],
      'cost.target=99.0 x INT4',
    ),
    (['local', '--sweep=no.yaml'], 'sweep no.yaml: [Errno 2]'),
    (['tpu_vm', *_RUN], 'missing: --project, --zone'),
    (['tpu_vm', *_RUN, *_TPU[:2]], 'missing: --accelerator'),
    (['tpu_vm', *_RUN, *_TPU, '--zone=mars'], '--zone=mars must be like us-'),
    (['tpu_vm', *_RUN, *_TPU[:2], '--accelerator=v5e-16'], 'v5e v5litepod'),
    (['tpu_vm', *_RUN, *_TPU[:2], '--accelerator=v9-16'], 'give --runtime'),
    (['tpu_vm', *_DISK, *_TPU], '/scratch/a run must be in a bucket'),
    (['tpu_vm', *_RUN, *_TPU, '--name=My_Run'], '--name=My_Run must be of a-z'),
    (['tpu_vm', *_RUN, *_TPU, f'--name={41 * "a"}'], 'has over 40 characters'),
    (['tpu_vm', 'delete', *_TPU], 'delete needs --name'),
    (['gke', *_RUN], 'missing: --image, --accelerator, --topology'),
    (['gke', *_DISK, *_GKE], 'must be in a bucket'),
    (['gke', *_RUN, *_GKE, '--accelerator=v5e'], 'must be one of tpu-v4-'),
    (['gke', *_RUN, *_GKE, '--topology=16'], '--topology=16 must be like 4x4'),
    (['gke', *_RUN, *_GKE, '--topology=2x2x4'], 'must have 2 dimensions'),
    (['gke', *_RUN, *_GKE, '--topology=3x3'], '9 chips, no multiple'),
    (['gke', *_SWEEP, *_GKE[:-1]], '27 runs need --queue=QUEUE'),
    (['gke', *_RUN, '--xpk', '--image=i'], 'missing: --cluster, --project'),
    (['slurm', *_DISK], 'missing: --gpus_per_node'),
    (['slurm', *_DISK, *_GPU, '--time=1h'], '--time=1h must be like minutes'),
    (['slurm', *_RUN, *_GPU], 'gs://bucket/a is in a bucket'),
  ],
)
def test_a_mistake_is_one_line_and_status_two(capsys, argv, message):
  # No dry run: what is refused must be so before anything is done.
  assert launch.main(argv) == common.MISTAKE
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count('\n') == 1
  assert not captured.out


def test_a_run_of_a_sweep_that_cannot_work_is_named(capsys, tmp_path):
  file = tmp_path / 'two.yaml'
  file.write_text(
    'config: tests/tiny.py\narguments: {seed: [0, 1], target: [1.5, 0.9]}'
  )
  assert launch.main(['local', f'--sweep={file}']) == common.MISTAKE
  captured = capsys.readouterr()
  # The cheapest network is INT4 everywhere, of which 0.9 is less.
  assert "run 'seed=0,target=0.9': cost.target=0.9 x INT4" in captured.err
  assert 'cannot be reached' in captured.err
  assert captured.err.count('\n') == 1


@pytest.mark.parametrize(
  ('flags', 'status'),
  [
    (['--config.data.data_dir=gs://images/tfds'], 0),
    (['--config.data.data_dir=/nowhere', '--config.cost.target=99'], 2),
    (['--config.quant.arch=gs://bucket/arch.json'], 0),
    (['--config.quant.arch=nowhere/arch.json'], 2),
    (['--config.quant.arch=~/nowhere/arch.json'], 0),
    (['--config.cost.kind=latency:/nowhere/mine.yaml'], 0),
    (['--config.cost.kind=latency:mine.yaml'], 2),
    (["--config.cost.caps=('latency:/nowhere/mine.yaml=1',)"], 0),
  ],
)
def test_files_of_another_machine_need_not_be_here(capsys, flags, status):
  argv = [
    'local',
    '--config=configs/fashion_mnist.py:space=int_l',
    '--workdir=/scratch/a',
    *flags,
  ]
  assert launch.main([*argv, '--dry_run']) == status
  captured = capsys.readouterr()
  assert bool(captured.out) == (not status)
  assert captured.err.count('\n') == bool(status)


def test_a_tool_that_is_not_there_is_named(capsys, monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  assert launch.main(['slurm', *_DISK, *_GPU]) == common.MISTAKE
  assert 'sbatch is not installed here' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('statuses', 'restarts', 'status', 'calls'),
  [
    ((0,), 0, 0, 1),
    ((75, 75, 0), 0, 0, 3),  # A resume is no restart.
    ((1, 1, 0), 2, 0, 3),
    ((1, 1, 0), 1, 1, 2),
    ((2, 0), 5, 2, 1),  # A mistake stays one.
  ],
)
def test_the_shell_perseveres(tmp_path, statuses, restarts, status, calls):
  plan = ' '.join(map(str, statuses))
  script = f"""{common.search_function(restarts, 0, ':')}
statuses=({plan}) calls=0
main() {{ calls=$((calls + 1)); return "${{statuses[calls - 1]}}"; }}
search {tmp_path} main || status=$?
echo "${{status:-0}} $calls"
"""
  done = subprocess.run(['bash', '-c', script], capture_output=True, text=True)
  assert done.stdout.split() == [str(status), str(calls)]


def test_the_shell_skips_a_finished_run(tmp_path):
  (tmp_path / 'result.json').write_text('{}')
  script = f'{common.search_function(0, 0, ":")}\nsearch {tmp_path} false'
  subprocess.run(['bash', '-c', script], check=True)


class _Nobody:
  """Nobody asks to stop."""

  signal = 0


def _local(code, processes=2, restarts=0, grace=20.0):
  return local.run(
    [sys.executable, '-S', '-c', code],
    processes=processes,
    restarts=restarts,
    grace=grace,
    environment={},
    asked=_Nobody(),
  )


def _alive(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except FileNotFoundError:
    return False
  return state.split()[0] != 'Z'


def _pids(directory, count):
  """Waits for `count` files with a pid each."""
  for _ in range(2400):
    files = list(directory.glob('*.pid'))
    texts = [file.read_text() for file in files]
    if len(files) == count and all(texts):
      return [int(text) for text in texts]
    time.sleep(0.05)
  raise AssertionError(f'no {count} processes in two minutes')


# Writes its pid to DIR/INDEX.pid; `me` is its index.
_HELLO = """
import os, signal, sys, time
me = os.environ['FLIQS_PROCESS_ID']
with open(f'{dir}/{{me}}.pid', 'w') as file: file.write(str(os.getpid()))
def others():
  while len(os.listdir('{dir}')) < 2: time.sleep(0.02)
"""


def test_every_process_learns_its_place(tmp_path):
  code = f"""
import json, os
keep = {{k: v for k, v in os.environ.items() if k.startswith('FLIQS_')}}
path = '{tmp_path}/' + keep['FLIQS_PROCESS_ID']
with open(path, 'w') as file: json.dump(keep, file)
"""
  assert _local(code, processes=3) == 0
  places = [json.loads((tmp_path / str(i)).read_text()) for i in range(3)]
  assert [p['FLIQS_PROCESS_ID'] for p in places] == ['0', '1', '2']
  assert {p['FLIQS_NUM_PROCESSES'] for p in places} == {'3'}
  (coordinator,) = {p['FLIQS_COORDINATOR'] for p in places}
  assert re.fullmatch(r'127\.0\.0\.1:\d+', coordinator)


@pytest.mark.parametrize('ignores', [False, True])
def test_a_dying_process_takes_the_others_down(tmp_path, capfd, ignores):
  code = (
    _HELLO.format(dir=tmp_path)
    + f"""
if {ignores}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
others()
if me == '1': os.kill(os.getpid(), signal.SIGKILL)
time.sleep(3600)
"""
  )
  # 128 + 9: the signal is told as a shell does.
  assert _local(code, grace=0.5 if ignores else 20) == 137
  assert not any(map(_alive, _pids(tmp_path, 2)))
  assert 'process 1 ended with status 137' in capfd.readouterr().err


def _counting(directory, *statuses):
  """Process 0 ends with these statuses, attempt by attempt; 1 waits for it."""
  return f"""
import os, signal, sys, time
me, statuses = os.environ['FLIQS_PROCESS_ID'], {statuses}
attempt = len(os.listdir('{directory}'))
if me == '0':
  open(f'{directory}/{{attempt}}', 'w').close()
  sys.exit(statuses[attempt])
"""


@pytest.mark.parametrize(
  ('statuses', 'restarts', 'status'),
  [
    ((75, 75, 0), 0, 0),
    ((1, 0), 1, 0),
    ((1, 3, 0), 1, 3),
    ((2, 0), 9, 2),
  ],
)
def test_what_is_started_again(
  tmp_path, monkeypatch, statuses, restarts, status
):
  monkeypatch.setattr(local, '_PAUSE', 0.0)
  assert _local(_counting(tmp_path, *statuses), 2, restarts) == status
  # Who is not started again leaves statuses over.
  used = statuses.index(status) + 1
  assert len(list(tmp_path.iterdir())) == used


def test_lines_carry_the_index_of_their_process(tmp_path, capfd):
  code = 'import os; print("I am", os.environ["FLIQS_PROCESS_ID"])'
  assert _local(code) == 0
  lines = capfd.readouterr().err.splitlines()
  assert sorted(lines) == ['[0] I am 0', '[1] I am 1']


def _launcher(code):
  """Starts a launcher of two processes of its own, which can be killed."""
  program = f"""
import sys
from launch import local
with local._Asked() as asked:
  sys.exit(local.run([sys.executable, '-S', '-c', {code!r}], processes=2,
    restarts=5, grace=20, environment={{}}, asked=asked))
"""
  return subprocess.Popen([sys.executable, '-c', program], cwd=_ROOT)


def test_a_launcher_that_is_asked_to_stop_lets_its_processes_save(tmp_path):
  code = _HELLO.format(dir=tmp_path).replace(
    'with open',
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nwith open',
  )
  launcher = _launcher(code + 'time.sleep(3600)')
  pids = _pids(tmp_path, 2)
  launcher.send_signal(signal.SIGTERM)
  # Not started again: it was this launcher that should stop.
  assert launcher.wait() == common.PREEMPTED
  assert not any(map(_alive, pids))


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the Linux kernel')
def test_a_killed_launcher_leaves_no_orphans(tmp_path):
  launcher = _launcher(_HELLO.format(dir=tmp_path) + 'time.sleep(3600)')
  pids = _pids(tmp_path, 2)
  launcher.kill()
  launcher.wait()
  for _ in range(2400):
    if not any(map(_alive, pids)):
      return
    time.sleep(0.05)
  raise AssertionError('orphans')


@pytest.mark.slow
def test_a_sweep_runs_here_and_what_is_finished_is_not_run_again(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  file, out = tmp_path / 'one.yaml', tmp_path / 'runs'
  file.write_text(
    'config: tests/tiny.py\narguments: {steps: 10, space: [INT4]}'
  )
  command = ['local', f'--sweep={file}', f'--out={out}']
  assert launch.main(command) == 0
  assert 'step 10/10' in capfd.readouterr().err
  assert launch.main(command) == 0
  again = capfd.readouterr().err
  assert 'finished before' in again
  assert 'step' not in again
  assert sweep_command.main([str(file), f'--out={out}']) == 0
  assert '| INT4 | 1 |' in capfd.readouterr().out
  for name in ('sweep.html', 'pareto.png', 'sweep.json'):
    assert (out / name).stat().st_size > 0


# What would be commands if a value became shell.
_HOSTILE = (
  'it\'s "$(touch owned)" `touch owned` $HOME; touch owned #',
  'x\nEND_OF_FILE\ntouch owned\nEND_OF_FILE_\ntouch owned',
)


def _program(folder, name, text):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)


def _received(text, folder):
  """Runs a script among imitations of its tools; returns a flag's value."""
  subprocess.run(
    ['bash', '-c', text],
    cwd=folder,
    env=dict(PATH=f'{folder}:/usr/bin:/bin', HOME=str(folder), USER='me'),
    check=True,
    capture_output=True,
  )
  assert not list(folder.rglob('owned'))
  flags = (folder / 'flags').read_text().split('\0')
  (value,) = [f for f in flags if f.startswith('--config.data.data_dir=')]
  return value.partition('=')[2]


@pytest.mark.parametrize('value', _HOSTILE)
def test_a_value_cannot_become_shell_on_slurm(capsys, tmp_path, value):
  script = _dry(
    capsys, 'slurm', *_DISK, *_GPU, f'--config.data.data_dir={value}'
  )
  script = script.replace('/scratch', str(tmp_path))
  script = re.sub('#SBATCH --chdir=.*|module load cuda', '', script)
  # The batch script is what sbatch reads; srun runs the command.
  _program(tmp_path, 'sbatch', 'bash')
  _program(tmp_path, 'srun', f'printf \'%s\\0\' "$@" > {tmp_path}/flags')
  assert _received(script, tmp_path) == value


@pytest.mark.parametrize('value', _HOSTILE)
def test_a_value_cannot_become_shell_on_a_tpu_vm(capsys, tmp_path, value):
  more = f'--config.data.data_dir={value}'
  script = _dry(capsys, 'tpu_vm', 'run', *_RUN, *_TPU, more)
  # scp sends run.sh, which starts the command on the worker.
  _program(tmp_path, 'gcloud', f'cp -f "${{@:5:1}}" {tmp_path}/run.sh || true')
  python = f'printf \'%s\\0\' "$@" > {tmp_path}/flags'
  _program(tmp_path, 'venv/bin/python', python)
  (tmp_path / 'fliqs_jax').mkdir()
  assert _received(script + f'bash {tmp_path}/run.sh\n', tmp_path) == value


@pytest.mark.parametrize('bucket', ['b;touch owned', '$(touch owned)', 'B', ''])
def test_a_bucket_cannot_become_shell(capsys, bucket):
  more = f'--config.data.data_dir=gs://{bucket}/data'
  for platform in (['tpu_vm', *_RUN, *_TPU], ['gke', *_RUN, *_GKE]):
    assert launch.main([*platform, more, '--dry_run']) == 2
    out, line = capsys.readouterr()
    assert (out, line.count('\n')) == ('', 1)
    assert 'names no bucket' in line


def test_a_directory_cannot_become_shell(capsys):
  argv = ['slurm', *_GPU, '--config=configs/digits.py', '--dry_run']
  assert launch.main([*argv, '--workdir=/scratch/a\ntouch owned']) == 2
  assert 'must be one line of text' in capsys.readouterr().err
