#!/usr/bin/env python3
"""TPU slices on Kubernetes: a JobSet manifest on standard output, or the same job through XPK.

  launch/gke.py --name=mine --image=REPO/rlsearch:1 --accelerator=tpu-v5p-slice --topology=4x4x4 \\
      --secrets=HF_TOKEN=hf:token search_r1_grpo gs://bucket/runs/pod -- --config.steps=100 | kubectl apply -f -
  launch/gke.py --xpk --cluster=mine --tpu_type=v5p-128 --name=mine --image=REPO/rlsearch:1 \\
      search_r1_grpo gs://bucket/runs/pod

--secrets=VARIABLE=SECRET:KEY refers to a Kubernetes secret.  The job starts again up to --restarts times when a host is
lost, and not after an error that would come again.
"""
from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys

import yaml

import commands

# Node label -> chips of a host in slices over several hosts.
ACCELERATORS = {'tpu-v4-podslice': 4, 'tpu-v5p-slice': 4, 'tpu-v5-lite-podslice': 4, 'tpu-v6e-slice': 4}
PORT = 8476


def num_hosts(options) -> int:
  """Returns the hosts of a slice: chips of its topology over those of a host.

  Raises:
    ValueError: a topology that is none, or that does not fill hosts.
  """
  if not re.fullmatch(r'\d+(x\d+){1,2}', options.topology):
    raise ValueError(f'--topology={options.topology}: wants sizes such as 4x4 or 4x4x4')
  chips, each = math.prod(map(int, options.topology.split('x'))), ACCELERATORS[options.accelerator]
  if chips % each or not chips:
    raise ValueError(f'--topology={options.topology}: {chips} chips do not fill hosts of {each}')
  return chips // each


def manifest(options) -> dict:
  """Returns the JobSet: one child job a slice, one pod a host.

  Exit codes 1 and 2 (rlsearch.job.run) fail the set; anything else starts it again from its last checkpoint.
  """
  hosts = num_hosts(options)
  chips = ACCELERATORS[options.accelerator]
  container = {
      'name': 'train', 'image': options.image, 'workingDir': options.folder,
      'command': commands.trainer(options, options.python, ['--distributed']),
      'ports': [{'containerPort': PORT}],
      'env': [{'name': name, 'valueFrom': {'secretKeyRef': {'name': secret, 'key': key}}}
              for name, secret, key in options.secrets],
      'resources': {'requests': {'google.com/tpu': chips}, 'limits': {'google.com/tpu': chips}}}
  pod = {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': options.grace,
         'nodeSelector': {'cloud.google.com/gke-tpu-accelerator': options.accelerator,
                          'cloud.google.com/gke-tpu-topology': options.topology},
         'containers': [container]}
  codes = {'containerName': 'train', 'operator': 'In', 'values': list(commands.FINAL)}
  final = {'action': 'FailJob', 'onExitCodes': codes}
  job = {'parallelism': hosts, 'completions': hosts, 'completionMode': 'Indexed', 'backoffLimit': 0,
         'podFailurePolicy': {'rules': [final]}, 'template': {'spec': pod}}
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
      'metadata': {'name': options.name, 'annotations': {
          'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
      'spec': {'failurePolicy': {'maxRestarts': options.restarts,
                                 'rules': [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
               'replicatedJobs': [{'name': 'slice', 'replicas': options.slices, 'template': {'spec': job}}]}}


def xpk(options) -> list[str]:
  """Returns XPK's command.  Its own exit codes for a restart are 42 and 127 to 255; ours are added."""
  train = shlex.join(commands.trainer(options, options.python, ['--distributed']))
  place = {'--zone': options.zone, '--project': options.project}
  return ['xpk', 'workload', 'create', f'--cluster={options.cluster}', f'--workload={options.name}',
          f'--tpu-type={options.tpu_type}', f'--num-slices={options.slices}', f'--docker-image={options.image}',
          f'--max-restarts={options.restarts}', f'--restart-on-exit-codes={commands.STOPPED},{commands.AGAIN}',
          f'--termination-grace-period-seconds={options.grace}', *(f'{k}={v}' for k, v in place.items() if v),
          f'--command=cd {shlex.quote(options.folder)} && exec {train}']


def secret(text: str) -> tuple[str, str, str]:
  """Returns (variable, secret, key).  Raises argparse.ArgumentTypeError for anything else."""
  match = re.fullmatch(r'([A-Za-z_]\w*)=([a-z0-9.-]+):([\w.-]+)', text)
  if not match:
    raise commands.argparse.ArgumentTypeError('wants VARIABLE=SECRET:KEY of a Kubernetes secret, not the secret')
  return match.groups()


def main(argv: list[str]) -> int:
  """Prints the manifest, or runs XPK; returns the exit code."""
  parser = commands.parser(__doc__)
  parser.add_argument('--name', required=True, help='of the job: lower-case letters, digits and -')
  parser.add_argument('--image', required=True, help='container image with the checkout in --folder')
  parser.add_argument('--accelerator', choices=sorted(ACCELERATORS), help='label gke-tpu-accelerator of the nodes')
  parser.add_argument('--topology', default='', help='of a slice, such as 4x4x4')
  parser.add_argument('--slices', type=commands.some, default=1, help='how many (default: %(default)s)')
  parser.add_argument('--secrets', type=secret, action='append', default=[], metavar='VARIABLE=SECRET:KEY',
                      help='of Kubernetes; may come again')
  parser.add_argument('--folder', default='/rlsearch', help='of the checkout in the image (default: %(default)s)')
  parser.add_argument('--python', default='python', help='in the image (default: %(default)s)')
  parser.add_argument('--grace', type=commands.some, default=120, help='seconds to save (default: %(default)s)')
  parser.add_argument('--xpk', action='store_true', help='submit through XPK, not kubectl')
  parser.add_argument('--cluster', default='', help='with --xpk')
  parser.add_argument('--tpu_type', default='', help='with --xpk, such as v5p-128')
  parser.add_argument('--zone', default='', help='with --xpk')
  parser.add_argument('--project', default='', help='with --xpk')
  options = commands.parse(parser, argv)
  if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', options.name):
    parser.error(f'--name={options.name}: wants up to 40 lower-case letters, digits and -, from a letter on')
  if options.xpk:
    if not options.cluster or not options.tpu_type:
      parser.error('--xpk wants --cluster and --tpu_type')
    if options.secrets:
      parser.error('--xpk cannot refer to Kubernetes secrets; use the manifest')
    if options.dry_run:
      print(commands.shown(commands.Process('here', tuple(xpk(options)))))
      return 0
    try:
      return subprocess.run(xpk(options)).returncode
    except FileNotFoundError:
      parser.error('xpk: not found; pip install xpk')
  if not options.accelerator:
    parser.error('--accelerator and --topology are needed, or --xpk')
  try:
    found = manifest(options)
  except ValueError as error:
    parser.error(str(error))
  print(yaml.safe_dump(found, sort_keys=False), end='')
  if options.dry_run:                                    # a manifest is one already; what each host runs, as comments
    for job in range(options.slices):
      for i in range(num_hosts(options)):
        command = found['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]['command']
        print('# ' + commands.shown(commands.Process(f'slice {job} host {i}', tuple(command))))
  return 0


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
