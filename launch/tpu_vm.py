"""Runs on a Cloud TPU VM slice, which is created and installed.

python -m launch tpu_vm --config=FILE --workdir=gs://BUCKET/DIR \
    --project=P --zone=Z --accelerator=v5litepod-16 [--spot]

`up` does create, install, run and logs, which are also separate actions. JAX
finds coordinator, count and index in the machines' metadata. A process that
saved or crashed is started again on its worker. After the loss of a slice,
`resume` creates it again and continues from the bucket.
"""

import argparse

from launch import common

ACTIONS = (
  'up',
  'create',
  'install',
  'run',
  'logs',
  'status',
  'stop',
  'resume',
  'delete',
)
_RUNTIMES = {  # {generation of the accelerator: Google's software version}.
  'v2': 'tpu-ubuntu2204-base',
  'v3': 'tpu-ubuntu2204-base',
  'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
# Seconds. A process that is started again too early would meet the old
# coordinator: the others notice a crash after about 100 s of missed heartbeats.
_PAUSE = 120
_UV = '"$HOME"/.local/bin/uv'


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this platform."""
  parser.add_argument('--project', default='')
  parser.add_argument('--zone', default='')
  parser.add_argument('--accelerator', default='', help='such as v5litepod-16')
  parser.add_argument('--runtime', default='', help='software version')
  parser.add_argument('--spot', action='store_true', help='cheap, preemptible')
  parser.add_argument(
    '--service_account', default='', help='account that may use the bucket'
  )
  parser.add_argument(
    '--direct',
    action='store_true',
    help='create now or fail, instead of a queued resource',
  )
  parser.add_argument('--worker', default='0', help='worker of the logs')


def script(args: argparse.Namespace, plan: common.Plan) -> str:
  """Returns the commands of an action."""
  common.required(args, 'project', 'zone')
  common.matches(args, 'project', '[a-z][a-z0-9.:-]*[a-z0-9]', 'my-project')
  common.matches(args, 'zone', '[a-z]+-[a-z]+[0-9]+-[a-z]', 'us-central1-a')
  steps = {
    'up': ('create', 'install', 'run', 'logs'),
    'resume': ('gone', 'create', 'install', 'run', 'logs'),
  }.get(args.action, (args.action,))
  if 'create' in steps:
    _check_accelerator(args)
  makers = dict(
    create=_create,
    install=_install,
    run=_run,
    logs=_logs,
    status=_status,
    stop=_stop,
    delete=_delete,
    gone=lambda args, plan: _delete(args, plan) + ' || true',
  )
  return common.script(*(makers[step](args, plan) for step in steps))


def perform(args: argparse.Namespace, plan: common.Plan) -> int:
  """Performs the action; returns the exit status."""
  return common.perform(script(args, plan), 'gcloud', 'git')


def _check_accelerator(args: argparse.Namespace) -> None:
  common.required(args, 'accelerator')
  if args.accelerator.startswith('v5e'):
    raise ValueError(
      f'--accelerator={args.accelerator}: gcloud calls v5e v5litepod; write '
      '--accelerator=v5litepod-CHIPS'
    )
  common.matches(args, 'accelerator', '[a-z0-9]+-[0-9]+', 'v5litepod-16')
  if not args.runtime and args.accelerator.split('-')[0] not in _RUNTIMES:
    raise ValueError(
      f'--accelerator={args.accelerator} is of a generation whose software '
      f'version is not known here ({", ".join(_RUNTIMES)}); give --runtime'
    )


def _gcloud(args, *command: str) -> str:
  where = [f'--project={args.project}', f'--zone={args.zone}']
  return common.quote(['gcloud', 'compute', 'tpus', *command, *where])


def _create(args, plan: common.Plan) -> str:
  name = plan.name
  runtime = args.runtime or _RUNTIMES[args.accelerator.split('-')[0]]
  more = ['--spot'] if args.spot else []
  more += [f'--accelerator-type={args.accelerator}']
  if args.service_account:
    more += [f'--service-account={args.service_account}']
  if args.direct:
    version = f'--version={runtime}'
    return _gcloud(args, 'tpu-vm', 'create', name, version, *more)
  resource = ['queued-resources', 'create', name, f'--node-id={name}']
  create = _gcloud(args, *resource, f'--runtime-version={runtime}', *more)
  describe = _gcloud(
    args, 'queued-resources', 'describe', name, '--format=value(state.state)'
  )
  return f"""\
{create}
while state=$({describe}); [[ $state != ACTIVE ]]; do
  echo "{name}: $state"
  case $state in
    FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
  esac
  sleep 30
done"""


def _ssh(args, name: str, worker: str, command: str) -> str:
  ssh = ['tpu-vm', 'ssh', name, f'--worker={worker}', f'--command={command}']
  return _gcloud(args, *ssh)


def _scp(args, name: str, *files: str) -> str:
  target = common.quote(['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp'])
  where = [f'--project={args.project}', f'--zone={args.zone}', '--worker=all']
  return f'{target} {" ".join(files)} {common.quote([f"{name}:", *where])}'


def _install(args, plan: common.Plan) -> str:
  """Returns the commands that send the commit and install it.

  uv installs a Python that is new enough.
  """
  _, buckets = common.on_bucket(plan)
  mounts = [
    f'mountpoint -q /gcs/{b} || gcsfuse --implicit-dirs '
    f'--rename-dir-limit=200000 {b} /gcs/{b}'
    for b in buckets
  ]
  worker = '\n'.join(
    [
      '#!/usr/bin/env bash',
      'set -euo pipefail',
      'mkdir -p fliqs_jax',
      'tar -xzf fliqs_jax.tar.gz -C fliqs_jax',
      'python3 -m pip install --quiet --user uv',
      f'{_UV} venv --quiet --allow-existing --python=3.11 venv',
      f'{_UV} pip install --quiet --python=venv/bin/python '
      "--editable=fliqs_jax 'jax[tpu]'",
      _GCSFUSE,
      f'sudo mkdir -p {common.quote([f"/gcs/{b}" for b in buckets])}',
      'sudo chown -R "$USER" /gcs',
      *mounts,
    ]
  )
  return f"""\
git diff --quiet HEAD || echo 'uncommitted changes are not sent' >&2
scratch=$(mktemp -d)
git archive --format=tar.gz --output="$scratch/fliqs_jax.tar.gz" HEAD
{common.heredoc('cat > "$scratch/install.sh"', worker)}
{_scp(args, plan.name, '"$scratch"/fliqs_jax.tar.gz', '"$scratch"/install.sh')}
{_ssh(args, plan.name, 'all', 'bash install.sh')}"""


_GCSFUSE = """\
if ! command -v gcsfuse > /dev/null; then
  source /etc/os-release
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt \
gcsfuse-$VERSION_CODENAME main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi"""


def _run(args, plan: common.Plan) -> str:
  """Returns the commands that start the runs, detached from the connection."""
  plan, _ = common.on_bucket(plan)
  lines = [
    '#!/usr/bin/env bash',
    'set -uo pipefail',
    'cd "$HOME/fliqs_jax" || exit',
  ]
  lines += [common.search_function(args.restarts, _PAUSE, ':'), 'failed=0']
  for job in plan.jobs:
    command = job.command('../venv/bin/python')
    lines += [f'search {common.quote([job.workdir, *command])} || failed=$?']
  worker = '\n'.join([*lines, 'exit "$failed"'])
  start = (
    'if kill -0 "$(cat run.pid 2> /dev/null)" 2> /dev/null; '
    'then echo "it runs already; stop it first" >&2; exit 1; fi; '
    'setsid nohup bash run.sh > run.log 2>&1 < /dev/null & echo $! > run.pid'
  )
  return f"""\
scratch=$(mktemp -d)
{common.heredoc('cat > "$scratch/run.sh"', worker)}
{_scp(args, plan.name, '"$scratch"/run.sh')}
{_ssh(args, plan.name, 'all', start)}"""


def _logs(args, plan: common.Plan) -> str:
  return _ssh(args, plan.name, args.worker, 'tail -n 100 -F run.log')


def _status(args, plan: common.Plan) -> str:
  name = plan.name
  if args.direct:
    return _gcloud(args, 'tpu-vm', 'describe', name, '--format=value(state)')
  describe = _gcloud(
    args, 'queued-resources', 'describe', name, '--format=value(state.state)'
  )
  return f'{describe}\n{_ssh(args, name, "all", "tail -n 1 run.log")}'


def _stop(args, plan: common.Plan) -> str:
  """Returns the command that ends the loop and its run, which saves first."""
  kill = 'kill -TERM -- "-$(cat run.pid)"'
  return _ssh(args, plan.name, 'all', kill)


def _delete(args, plan: common.Plan) -> str:
  if args.direct:
    return _gcloud(args, 'tpu-vm', 'delete', plan.name, '--quiet')
  delete = ['queued-resources', 'delete', plan.name, '--force', '--quiet']
  return _gcloud(args, *delete)
