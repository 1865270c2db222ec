"""The launchers: what a dry run shows, what a restart does, and that no secret shows."""
from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

import small_run

LAUNCH = small_run.ROOT / 'launch'
sys.path.insert(0, str(LAUNCH))
import commands   # noqa: E402
import gke   # noqa: E402
import local_processes   # noqa: E402
import slurm   # noqa: E402
import ssh   # noqa: E402
import tpu_pod   # noqa: E402

METHOD = ['search_r1_grpo:embedded', '/shared/run']
ALL = {
    local_processes: ['--processes=2', '--devices=4'],
    ssh: ['--hosts=a,me@b', '--folder=/x/rlsearch'],
    slurm: ['--nodes=2', '--gpus_per_node=2'],
    tpu_pod: ['--name=pod', '--accelerator_type=v5p-16', '--zone=z', '--runtime_version=r', '--setup=make all', '--spot'],
    gke: ['--name=pod', '--image=i:1', '--accelerator=tpu-v5p-slice', '--topology=2x2x2', '--slices=2']}


def said(capsys, module, *arguments):
  """What a launcher prints when it ends well."""
  assert module.main([*ALL[module], '--dry_run', *arguments]) == 0
  return capsys.readouterr().out


def refused(capsys, module, *arguments):
  """The message with which a launcher refuses its arguments."""
  with pytest.raises(SystemExit) as ended:
    module.main([*arguments])
  assert ended.value.code == 2
  return capsys.readouterr().err


def program(folder, name, body):
  """A program that stands in for one that is not here."""
  path = folder / name
  path.write_text(f'#!/bin/bash\n{textwrap.dedent(body)}')
  path.chmod(0o755)
  return path


class TestDryRun:

  @pytest.mark.parametrize('module, hosts', [(local_processes, 2), (ssh, 2), (slurm, 4), (tpu_pod, 2), (gke, 4)])
  def test_prints_the_command_of_every_host_and_starts_nothing(self, module, hosts, capsys, monkeypatch):
    def forbidden(*args, **kwargs):
      raise AssertionError('started something')
    monkeypatch.setattr(subprocess, 'Popen', forbidden)
    monkeypatch.setattr(subprocess, 'run', forbidden)
    text = said(capsys, module, *METHOD, '--', '--config.steps=3')
    lines = [line for line in text.splitlines() if 'rlsearch.train' in line and ('[' in line or '--process_id' in line)]
    assert len(lines) == hosts, text
    for line in lines:
      assert '-m rlsearch.train --config=configs/search_r1_grpo.py:embedded --workdir=/shared/run' in line
      assert '--config.steps=3' in line

  def test_every_process_knows_its_number(self, capsys):
    for module in (local_processes, ssh):
      text = said(capsys, module, *METHOD)
      for i in range(2):
        assert text.count(f'--num_processes=2 --process_id={i}') == 1
    assert '--coordinator=a:8476' in text

  def test_the_cluster_is_asked_elsewhere(self, capsys):
    for module in (slurm, tpu_pod, gke):
      assert '--distributed' in said(capsys, module, *METHOD)

  def test_no_secret_shows(self, capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'very-private-token')
    assert 'export HF_TOKEN=***' in said(capsys, ssh, '--secrets=HF_TOKEN', *METHOD)
    text = said(capsys, tpu_pod, '--secrets=HF_TOKEN=hf', *METHOD)
    assert 'HF_TOKEN="$(gcloud secrets versions access latest --secret hf)"' in text
    job = yaml.safe_load(said(capsys, gke, '--secrets=HF_TOKEN=hf:token', *METHOD))['spec']['replicatedJobs'][0]
    assert job['template']['spec']['template']['spec']['containers'][0]['env'] == [
        {'name': 'HF_TOKEN', 'valueFrom': {'secretKeyRef': {'name': 'hf', 'key': 'token'}}}]
    for module in ALL:
      assert 'very-private' not in said(capsys, module, *METHOD)

  def test_a_secret_on_the_command_line_is_refused_everywhere(self, capsys, monkeypatch):
    monkeypatch.setenv('JUDGE_KEY', 'very-private-key')
    for module in ALL:
      for argument in ('--config.judge.api_key=abc', '--config.x=very-private-key'):
        message = refused(capsys, module, *ALL[module], *METHOD, '--', argument)
        assert 'a secret on the command line' in message and '***' in message
        assert 'abc' not in message and 'very-private' not in message


class TestErrors:

  @pytest.mark.parametrize('module', ALL)
  def test_help(self, module, capsys):
    with pytest.raises(SystemExit) as ended:
      module.main(['--help'])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and '--dry_run' in text and f'launch/{module.__name__}.py' in text

  @pytest.mark.parametrize('module', ALL)
  def test_an_unknown_method_names_the_known_ones(self, module, capsys):
    message = refused(capsys, module, *ALL[module], 'nothing', '/run')
    assert "method 'nothing': no file configs/nothing.py; known: " in message and 'search_r1_grpo' in message

  @pytest.mark.parametrize('module, change, wanted', [
      (local_processes, '--processes=0', "'0': wants a number, 1 or more"),
      (local_processes, '--restarts=-1', 'wants a number, 0 or more'),
      (ssh, '--hosts=a,a', 'wants different host names'), (ssh, '--hosts=a,-oProxyCommand=x', "'-oProxyCommand=x' is none"),
      (ssh, '--secrets=NOT_THERE_TOKEN', 'NOT_THERE_TOKEN is not set'),
      (tpu_pod, '--accelerator_type=v9-8', "'v9-8': wants one of v4, v5p, v5litepod, v6e"),
      (tpu_pod, '--accelerator_type=v5p-22', 'no slice has 22'),
      (tpu_pod, '--reserved', '--spot and --reserved: choose one'), (tpu_pod, '--secrets=HF_TOKEN', 'not the secret'),
      (gke, '--topology=4by4', 'wants sizes such as 4x4'), (gke, '--topology=1x2', '2 chips do not fill hosts of 4'),
      (gke, '--name=My_Job', 'lower-case letters'), (gke, '--xpk', '--xpk wants --cluster'),
      (gke, '--secrets=HF_TOKEN=hf', 'VARIABLE=SECRET:KEY')])
  def test_bad_arguments(self, module, change, wanted, capsys):
    assert wanted in refused(capsys, module, *ALL[module], change, *METHOD)

  def test_trainer_arguments_without_the_dashes(self, capsys):
    assert 'arguments of the trainer come after --' in refused(capsys, local_processes, *METHOD, 'more')


class TestRestartable:

  @pytest.mark.parametrize('codes, wanted', [
      ([0, -9], True), ([-9, 75], True), ([1, -9], True),          # a host was killed, whatever the others make of it
      ([3, 3], True), ([75, 0], True), ([255, 75], True), ([137, 1], True), ([-6, -6], True),
      ([1, 1], False), ([1, -6], False), ([2, 2], False), ([0, 1], False)])
  def test_by_what_ended_it(self, codes, wanted):
    assert commands.restartable(codes) is wanted


class TestSupervise:

  def job(self, *scripts, **kwargs):
    return lambda: [commands.Process(str(i), ('bash', '-c', s), **kwargs) for i, s in enumerate(scripts)]

  def test_all_end_well(self, capsys):
    assert commands.supervise(self.job('echo one', 'echo two'), 3) == 0
    out = capsys.readouterr().out
    assert '[0] one' in out and '[1] two' in out and 'starting the job again' not in out

  def test_starts_all_again_when_one_is_killed(self, tmp_path, capsys):
    victim = f'if [ -e {tmp_path}/once ]; then exit 0; fi; touch {tmp_path}/once; kill -9 $$'
    other = f'echo x >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) = 2 ] || exec sleep 60'
    begun = time.monotonic()
    assert commands.supervise(self.job(other, victim), 3, grace=5.0) == 0
    assert time.monotonic() - begun < 20 and (tmp_path / 'starts').read_text() == 'x\nx\n'
    assert 'exit codes [-15, -9]' in capsys.readouterr().out

  def test_one_that_ignores_the_signal_is_killed(self, capsys):
    stubborn = 'trap "" TERM; while true; do sleep 0.1; done'
    assert commands.supervise(self.job('sleep 0.5; exit 75', stubborn), 0, grace=0.5) == commands.AGAIN
    assert 'exit codes [75, -9]' in capsys.readouterr().out

  def test_after_a_stop_the_others_end_by_themselves(self, capsys):
    """A signal would cut off what they are about; one that does not end is told after the grace."""
    assert commands.supervise(self.job('exit 3', 'sleep 1; exit 3'), 0, grace=5.0) == commands.AGAIN
    assert 'exit codes [3, 3]' in capsys.readouterr().out
    assert commands.supervise(self.job('exit 3', 'exec sleep 30'), 0, grace=0.5) == commands.AGAIN
    assert 'exit codes [3, -15]' in capsys.readouterr().out

  def test_ends_after_so_many_times(self, tmp_path, capsys):
    assert commands.supervise(self.job(f'echo x >> {tmp_path}/starts; exit 75'), 2) == commands.AGAIN
    assert (tmp_path / 'starts').read_text() == 'x\n' * 3 and 'failed 3 times' in capsys.readouterr().out

  def test_an_error_is_not_tried_again(self, tmp_path):
    assert commands.supervise(self.job(f'echo x >> {tmp_path}/starts; exit 1'), 2) == 1
    assert (tmp_path / 'starts').read_text() == 'x\n'

  def test_hides_secrets_that_a_process_says(self, capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'very-private-token')
    assert commands.supervise(self.job('echo "got $HF_TOKEN"'), 0) == 0
    assert '[0] got ***' in capsys.readouterr().out

  @pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
  def test_a_signal_goes_on_to_all_and_ends_the_job(self, sent, tmp_path):
    trap = f'trap "exit 3" TERM; touch {tmp_path}/$0; while true; do sleep 0.05; done'
    code = textwrap.dedent(f'''
        import sys; sys.path.insert(0, {str(LAUNCH)!r})
        import commands
        job = lambda: [commands.Process(str(i), ("bash", "-c", {trap!r}, str(i))) for i in range(2)]
        sys.exit(commands.supervise(job, 3))''')
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not ((tmp_path / '0').exists() and (tmp_path / '1').exists()) and time.monotonic() < deadline:
      time.sleep(0.02)
    process.send_signal(sent)
    code, text = small_run.finish(process, 60)
    assert code == commands.STOPPED and 'starting the job again' not in text, text


class TestSsh:

  def options(self, tmp_path, module, **env):
    fake = program(tmp_path, 'fake-ssh', 'while [ "$1" = -o ]; do shift 2; done; shift; exec "$@"')
    (tmp_path / f'{module}.py').write_text(textwrap.dedent('''
        import os, signal, sys, time
        me = [a for a in sys.argv if a.startswith('--process_id=')][0][-1]
        def term(*_):
          open(f'stopped-{me}', 'w').close()
          sys.exit(3)
        signal.signal(signal.SIGTERM, term)
        time.sleep(0.1 * int(me))
        open(f'started-{me}', 'w').write(os.environ.get('HF_TOKEN', ''))
        if 'quick' in sys.argv[1]: sys.exit(0)
        if me == '1':
          while not os.path.exists('started-0'): time.sleep(0.01)
          sys.exit(75)
        time.sleep(60)
        '''))
    return ['--hosts=a,b', f'--folder={tmp_path}', f'--ssh={fake}', f'--python={sys.executable}', f'--module={module}',
            '--restarts=0']

  def test_runs_a_script_with_the_secrets_on_its_input(self, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', "it's private")
    config = tmp_path / 'quick.py'
    config.write_text('')
    assert ssh.main([*self.options(tmp_path, 'remote'), '--secrets=HF_TOKEN', str(config), '/run']) == 0, capsys.readouterr().out
    assert (tmp_path / 'started-0').read_text() == (tmp_path / 'started-1').read_text() == "it's private"

  def test_the_others_are_asked_to_stop_when_one_fails(self, tmp_path, capsys):
    assert ssh.main([*self.options(tmp_path, 'remote'), *METHOD]) == commands.AGAIN
    assert (tmp_path / 'stopped-0').exists(), capsys.readouterr().out


class TestSlurm:

  def run(self, tmp_path, codes):
    """Runs the batch script where srun ends with these codes; returns its exit code and what was called."""
    (tmp_path / 'codes').write_text('\n'.join(map(str, codes)))
    program(tmp_path, 'srun', f'''
        echo "srun $*" >> {tmp_path}/calls
        code=$(head -1 {tmp_path}/codes)
        sed -i 1d {tmp_path}/codes
        exit $code''')
    program(tmp_path, 'scontrol', f'echo "scontrol $*" >> {tmp_path}/calls')
    parser = commands.parser('')
    options = commands.parse(parser, METHOD)
    vars(options).update(nodes=2, gpus_per_node=0, time='1:00:00', name='n', grace=60, sbatch=['--partition=x'])
    text = slurm.script(options)
    assert '#SBATCH --signal=TERM@60' in text and '#SBATCH --partition=x' in text and '--requeue' in text
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
    done = subprocess.run(['bash', '-c', text], env=env)
    return done.returncode, (tmp_path / 'calls').read_text().splitlines()

  def test_starts_again_after_a_lost_host(self, tmp_path):
    code, calls = self.run(tmp_path, [137, 75, 0])
    assert code == 0 and len(calls) == 3 and '--kill-on-bad-exit=1' in calls[0] and '--distributed' in calls[0]

  def test_not_after_an_error(self, tmp_path):
    code, calls = self.run(tmp_path, [1, 0])
    assert code == 1 and len(calls) == 1

  def test_is_queued_again_when_it_was_stopped(self, tmp_path):
    code, calls = self.run(tmp_path, [3])
    assert code == 3 and calls[1] == 'scontrol requeue 7'

  def test_gives_up(self, tmp_path):
    code, calls = self.run(tmp_path, [75] * 9)
    assert code == commands.AGAIN and len(calls) == 4


class TestTpuPod:

  @pytest.mark.parametrize('kind, hosts', [('v4-8', 1), ('v5p-8', 1), ('v5p-16', 2), ('v5p-128', 16), ('v5litepod-8', 1),
                                           ('v5litepod-16', 4), ('v6e-64', 16), ('v6e-1', 1)])
  def test_num_hosts(self, kind, hosts):
    assert tpu_pod.num_hosts(kind) == hosts

  def test_asks_anew_after_a_preemption_and_trains_on(self, tmp_path, monkeypatch, capsys):
    # A gcloud whose slice becomes active at the second look; the first training is preempted, the second one ends.
    program(tmp_path, 'gcloud', f'''
        cd {tmp_path}
        case "$*" in
          *describe*) [ -e state ] && cat state || {{ echo "ERROR: NOT_FOUND: it was not found" >&2; exit 1; }}; [ "$(cat state)" != PROVISIONING ] || echo ACTIVE > state ;;
          *create*) echo "create $*" >> calls; echo PROVISIONING > state ;;
          *delete*) echo delete >> calls; rm state ;;
          *worker=all*) echo setup >> calls ;;
          *"kill -TERM"*"exec "*|*exec*) echo "train" >> calls
            if [ ! -e lost ]; then sleep 0.5; touch lost; echo SUSPENDED > state; exit 255; fi; sleep 0.3 ;;
          *) echo stop >> calls ;;
        esac''')
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    options = commands.parse(commands.parser(''), ['--restarts=2', *METHOD])
    vars(options).update(name='pod', accelerator_type='v5p-8', zone='z', project='p', runtime_version='r', spot=True,
                         reserved=False, setup='make', folder='rlsearch', python='python', secrets=[])
    assert tpu_pod.train(options, poll=0.05) == 0
    calls, out = [line.split()[0] for line in (tmp_path / 'calls').read_text().splitlines()], capsys.readouterr().out
    assert calls == ['create', 'setup', 'train', 'delete', 'create', 'setup', 'train'], out
    assert 'pod is SUSPENDED; asking anew' in out
    assert '--accelerator-type=v5p-8' in (text := (tmp_path / 'calls').read_text()) and '--spot' in text

  def test_a_leftover_trainer_is_signalled_and_no_other_process(self, tmp_path):
    options = argparse.Namespace(name='pod', module='rlsearch_leftover')
    victim = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', 'rlsearch_leftover'])
    other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    try:
      for process in (other, victim):
        (tmp_path / '.rlsearch-pod.pid').write_text(str(process.pid))
        done = subprocess.run(['bash', '-c', tpu_pod.kill(options, 'TERM')], env={**os.environ, 'HOME': str(tmp_path)})
        assert done.returncode == 0
      assert victim.wait(20) == -signal.SIGTERM and other.poll() is None
    finally:
      victim.kill()
      other.kill()


class TestGke:

  def test_manifest(self, capsys):
    found = yaml.safe_load(said(capsys, gke, *METHOD, '--', '--config.steps=3'))
    job = found['spec']['replicatedJobs'][0]
    spec = job['template']['spec']
    assert found['kind'] == 'JobSet' and found['spec']['failurePolicy']['maxRestarts'] == 3 and job['replicas'] == 2
    assert spec['parallelism'] == spec['completions'] == 2 and spec['backoffLimit'] == 0
    assert spec['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [1, 2]
    pod = spec['template']['spec']
    assert pod['restartPolicy'] == 'Never' and pod['containers'][0]['command'][-1] == '--config.steps=3'

  def test_xpk(self, capsys):
    options = ['--name=pod', '--image=i', '--xpk', '--cluster=c', '--tpu_type=v5p-16', '--dry_run']
    assert gke.main([*options, *METHOD]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[1:4] == ['xpk', 'workload', 'create']
    assert '--restart-on-exit-codes=3,75' in words and '--max-restarts=3' in words
    assert words[-1].startswith('--command=cd /rlsearch && exec python -m rlsearch.train')
