r"""Runs on TPU slices of a GKE cluster: one JobSet per run, queued by Kueue.

python -m launch gke --config=FILE --workdir=gs://BUCKET/DIR --image=IMAGE \
    --accelerator=tpu-v5-lite-podslice --topology=4x4 [--queue=QUEUE]

kubectl uses its current context. GKE sets the index and the peers of each pod
of a JobSet in its environment, where JAX finds them. After status 75, and after
the loss of a node, the JobSet restarts and the restart is not counted; after a
crash it is counted. `--xpk` hands the run to xpk instead of writing a manifest.
"""

import argparse
from collections.abc import Sequence
import math
from typing import Any

import yaml

from launch import common

ACTIONS = ('up', 'build', 'logs', 'status', 'resume', 'delete')
_ACCELERATORS = {  # {accelerator: number of dimensions of its topology}.
  'tpu-v4-podslice': 3,
  'tpu-v5-lite-podslice': 2,
  'tpu-v5p-slice': 3,
  'tpu-v6e-slice': 2,
  'tpu7x': 3,
}
_CONTAINER = 'fliqs'
_GRACE = 300  # Seconds from SIGTERM to SIGKILL, enough for a checkpoint.
_LABEL = 'fliqs-launch'


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this platform."""
  parser.add_argument('--image', default='', help='built by the action `build`')
  parser.add_argument(
    '--accelerator', default='', help=', '.join(_ACCELERATORS)
  )
  parser.add_argument('--topology', default='', help='slice, such as 4x4')
  parser.add_argument('--chips_per_host', type=int, default=4)
  parser.add_argument('--slices', type=int, default=1)
  parser.add_argument('--queue', default='', help="Kueue's LocalQueue")
  parser.add_argument('--namespace', default='default')
  parser.add_argument('--spot', action='store_true', help='cheap, preemptible')
  parser.add_argument(
    '--service_account',
    default='default',
    help='Kubernetes service account that may use the bucket',
  )
  parser.add_argument('--xpk', action='store_true', help='submit by xpk')
  parser.add_argument('--cluster', default='', help='for xpk')
  parser.add_argument('--project', default='', help='for xpk')
  parser.add_argument('--zone', default='', help='for xpk')
  parser.add_argument('--tpu_type', default='', help='for xpk: v5litepod-16')
  parser.add_argument('--storage', default='', help='for xpk: storage at /gcs')


def script(args: argparse.Namespace, plan: common.Plan) -> str:
  """Returns the commands of an action."""
  common.matches(args, 'namespace', '[a-z0-9]([a-z0-9-]*[a-z0-9])?', 'my-team')
  kubectl = ['kubectl', f'--namespace={args.namespace}']
  chosen = f'--selector={_LABEL}={plan.name}'
  if args.action == 'build':
    common.required(args, 'image')
    build = [
      'docker',
      'build',
      f'--tag={args.image}',
      '--file=launch/Dockerfile',
    ]
    return common.script(
      "git diff --quiet HEAD || echo 'uncommitted changes are not sent' >&2",
      f'git archive HEAD | {common.quote([*build, "-"])}',
      common.quote(['docker', 'push', args.image]),
    )
  if args.action == 'status':
    return common.script(common.quote([*kubectl, 'get', 'jobsets', chosen]))
  delete = common.quote([*kubectl, 'delete', 'jobsets', '--wait', chosen])
  if args.action == 'delete':
    return common.script(delete)
  if args.action == 'logs':
    logs = [
      *kubectl,
      'logs',
      '--follow',
      '--prefix',
      f'--container={_CONTAINER}',
    ]
    index = 'batch.kubernetes.io/job-completion-index=0'
    logs += ['--max-log-requests=50', f'{chosen},{index}']
    return common.script(common.quote(logs))
  plan, buckets = common.on_bucket(plan)
  if args.xpk:
    return _xpk(args, plan)
  hosts = _check(args, plan)
  manifests = [_manifest(args, plan, job, hosts, buckets) for job in plan.jobs]
  text = yaml.safe_dump_all(manifests, sort_keys=False, width=1000)
  parts = [delete] if args.action == 'resume' else []
  create = common.quote([*kubectl, 'create', '--filename=-'])
  return common.script(*parts, common.heredoc(create, text))


def perform(args: argparse.Namespace, plan: common.Plan) -> int:
  """Performs the action; returns the exit status."""
  tools = ['docker', 'git'] if args.action == 'build' else ['kubectl']
  return common.perform(script(args, plan), *(['xpk'] if args.xpk else tools))


def _check(args: argparse.Namespace, plan: common.Plan) -> int:
  """Checks the flags; returns the number of hosts of a slice."""
  common.required(args, 'image', 'accelerator', 'topology')
  common.positive(slices=args.slices, chips_per_host=args.chips_per_host)
  if args.accelerator not in _ACCELERATORS:
    raise ValueError(
      f'--accelerator={args.accelerator} must be one of '
      f'{", ".join(_ACCELERATORS)}'
    )
  common.matches(args, 'topology', '[0-9]+(x[0-9]+)+', '4x4 or 2x2x4')
  dimensions = _ACCELERATORS[args.accelerator]
  if args.topology.count('x') + 1 != dimensions:
    raise ValueError(
      f'--topology={args.topology} must have {dimensions} dimensions, as '
      f'{args.accelerator} has'
    )
  chips, per_host = _chips(args)
  if not chips or chips % per_host:
    raise ValueError(
      f'--topology={args.topology} has {chips} chips, no multiple of '
      f'--chips_per_host={args.chips_per_host}'
    )
  if len(plan.jobs) > 1 and not args.queue:
    raise ValueError(
      f'{len(plan.jobs)} runs need --queue=QUEUE, a LocalQueue of Kueue: '
      'without it all would start at once (clusters made by xpk have '
      'multislice-queue)'
    )
  return chips // per_host


def _chips(args: argparse.Namespace) -> tuple[int, int]:
  """Returns the number of chips of a slice, and of each host."""
  chips = math.prod(int(side) for side in args.topology.split('x'))
  return chips, min(args.chips_per_host, chips)


def _manifest(
  args,
  plan: common.Plan,
  job: common.Job,
  hosts: int,
  buckets: Sequence[str],
) -> dict[str, Any]:
  """Returns the JobSet of one run."""
  labels = {_LABEL: plan.name}
  queue = {'kueue.x-k8s.io/queue-name': args.queue} if args.queue else {}
  annotations = {
    'fliqs-launch/run': job.name or plan.name,
    # A slice is a node pool, which two jobs must not share.
    'alpha.jobset.sigs.k8s.io/exclusive-topology': (
      'cloud.google.com/gke-nodepool'
    ),
  }
  free = {
    'name': 'saved_or_disrupted',
    'action': 'RestartJobSetAndIgnoreMaxRestarts',
    'onJobFailureReasons': ['PodFailurePolicy'],
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': common.job_name(plan, job),
      'labels': labels | queue,
      'annotations': annotations,
    },
    'spec': {
      'network': {'enableDNSHostnames': True},
      'failurePolicy': {
        'maxRestarts': args.restarts,
        # Old and new pods must never write to the workdir at the same time.
        'restartStrategy': 'BlockingRecreate',
        'rules': [free],
      },
      'ttlSecondsAfterFinished': 7 * 24 * 3600,
      'replicatedJobs': [
        {
          'name': 'slice',
          'replicas': args.slices,
          'template': {'spec': _job(args, job, hosts, buckets, labels)},
        }
      ],
    },
  }


def _job(args, job, hosts, buckets, labels) -> dict[str, Any]:
  """Returns the Job of one slice: a pod on every host, or none."""
  saved = {
    'containerName': _CONTAINER,
    'operator': 'In',
    'values': [common.PREEMPTED],
  }
  disrupted = [{'type': 'DisruptionTarget', 'status': 'True'}]
  return {
    'parallelism': hosts,
    'completions': hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,
    'podFailurePolicy': {
      # Both rules give the reason that the JobSet's rule needs.
      'rules': [
        {'action': 'FailJob', 'onExitCodes': saved},
        {'action': 'FailJob', 'onPodConditions': disrupted},
      ]
    },
    'template': {
      'metadata': {
        'labels': labels,
        'annotations': {'gke-gcsfuse/volumes': 'true'},
      },
      'spec': _pod(args, job, buckets),
    },
  }


def _pod(args, job, buckets) -> dict[str, Any]:
  selector = {
    'cloud.google.com/gke-tpu-accelerator': args.accelerator,
    'cloud.google.com/gke-tpu-topology': args.topology,
  }
  if args.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  chips = {'google.com/tpu': _chips(args)[1]}
  mounts = [
    {'name': f'bucket-{i}', 'mountPath': f'/gcs/{bucket}'}
    for i, bucket in enumerate(buckets)
  ]
  volumes = [
    {
      'name': f'bucket-{i}',
      'csi': {
        'driver': 'gcsfuse.csi.storage.gke.io',
        'volumeAttributes': {
          'bucketName': bucket,
          # A complete checkpoint is a directory that is renamed.
          'mountOptions': 'implicit-dirs,rename-dir-limit=200000',
        },
      },
    }
    for i, bucket in enumerate(buckets)
  ]
  container = {
    'name': _CONTAINER,
    'image': args.image,
    'command': job.command(),
    # Ports of libtpu, of the connections between slices, of JAX's coordinator.
    'ports': [{'containerPort': port} for port in (8471, 8080, 8482)],
    # Two copies, because YAML would write an alias for one mapping.
    'resources': {'requests': dict(chips), 'limits': dict(chips)},
    'volumeMounts': mounts,
  }
  return {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': _GRACE,
    'serviceAccountName': args.service_account,
    'nodeSelector': selector,
    'containers': [container],
    'volumes': volumes,
  }


def _xpk(args, plan: common.Plan) -> str:
  common.required(
    args, 'image', 'cluster', 'project', 'zone', 'tpu_type', 'storage'
  )
  common.positive(slices=args.slices)
  commands = [
    [
      'xpk',
      'workload',
      'create',
      f'--workload={common.job_name(plan, job)}',
      f'--cluster={args.cluster}',
      f'--project={args.project}',
      f'--zone={args.zone}',
      f'--tpu-type={args.tpu_type}',
      f'--num-slices={args.slices}',
      f'--docker-image={args.image}',
      f'--storage={args.storage}',
      f'--max-restarts={args.restarts}',
      f'--restart-on-exit-codes={common.PREEMPTED}',
      f'--termination-grace-period-seconds={_GRACE}',
      f'--command={common.quote(job.command())}',
    ]
    for job in plan.jobs
  ]
  return common.script(*map(common.quote, commands))
