"""Asking a finished run: the same answers as its evaluation, shown as they come, and errors of one line."""
from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

from etils import epath
import jax
import numpy as np
import pytest

import fakes
import small_run
from rlsearch import checkpoint, engines, evaluate, method as method_lib, parallel
from rlsearch.ask import __main__ as verb, agent as agent_lib, episode as episode_lib
from rlsearch.ask.agent import Agent, Policy
from rlsearch.ask.episode import Draw
from rlsearch.checkpoint import Run
from rlsearch.data import tokenizer as tokenizer_lib
from rlsearch.models import model as models
from rlsearch.types import EMPTY, FAILED_SERVICE, TIMEOUT, Outcome, Passage, TrainState

COLD, RL = small_run.COLD, small_run.RL
SEARCH = '<think> who? </think><search> a film </search>'
ANSWER = '<think> so </think><answer> Paris </answer>'


@pytest.fixture(scope='module')
def whole():
  return epath.Path(small_run.whole())


@pytest.fixture(scope='module')
def agent(whole):
  return agent_lib.load(whole)


@pytest.fixture
def copy(whole, tmp_path):
  return epath.Path(shutil.copytree(whole, tmp_path / 'run'))


def change(workdir, edit):
  """Edits the config of every stage of a run."""
  path = workdir / 'config.json'
  config = json.loads(path.read_text())
  for stage in config['stages'].values():
    edit(stage)
  path.write_text(json.dumps(config))


def scripted(*said, outcome=None, events=None, **lengths) -> Agent:
  """An agent that says this, one turn after the other."""
  said, events = iter(said), [] if events is None else events
  def answers(call):
    events.append(f'call {call.args["queries"]}')
    return outcome or fakes.found('some text')
  config = {'data': {'source': {'name': 'files'}}, 'retriever': {'name': 'bm25'}}
  return Agent(config, Policy(RL, 4, epath.Path('x'), True, ''), None, fakes.render(**lengths),
               fakes.engine(lambda r: events.append('turn') or next(said)), fakes.tools(answers), lambda text: ())


def shown(agent, question=fakes.question()):
  """The lines that are shown for a question, and its episode."""
  lines = []
  episode = episode_lib.answer(agent, question, Draw(), 0, lines.append)
  return '\n'.join(lines), episode


class TestSameAsEvaluation:

  def test_sampled_as_the_run_recorded_it(self, agent, whole):
    recorded = json.loads((whole / RL / 'episodes-4.json').read_text())
    assert recorded['mode'] == 'sampled' and len(recorded['episodes']) == 3
    draw = Draw(1.0, agent.config['seed'] + (1 << 30))                  # the keys of that evaluation
    for i, wanted in enumerate(recorded['episodes']):
      question = agent.env.splits['test'][i]
      episode = episode_lib.answer(agent, question, draw, i, lambda text: None)
      found = episode_lib.as_json(agent, episode, draw)
      assert (found['question'], found['ended']) == (wanted['question'], wanted['ended'])
      assert len(found['turns']) == len(wanted['turns'])
      for ours, theirs in zip(found['turns'], wanted['turns']):
        assert {k: ours[k] for k in ('text', 'action', 'outcome', 'passages')} == {
            k: theirs[k] for k in ('text', 'action', 'outcome', 'passages')}
        assert [t[:2] for t in ours['tokens']] == [t[:2] for t in theirs['tokens']]
        np.testing.assert_allclose([t[2] for t in ours['tokens']], [t[2] for t in theirs['tokens']], atol=2e-3)

  def test_greedy_gives_the_ids_of_an_evaluation(self, agent):
    mesh = parallel.make_mesh({'data': -1}, jax.local_devices())
    model = models.get(agent.config['model'], agent.render.tok.vocab_size)
    params = agent_lib.load_params(agent.policy, model, parallel.make_mesh({}, jax.local_devices()[:1]))
    engine = method_lib.resolve('engine', engines, agent.config['engine'], model, agent.render.tok,
                                agent.render.protocol.stops, mesh)
    engine.set_params(parallel.to_replicated(params, mesh), 4)
    run = evaluate.make_evaluate(agent.env.splits, agent.render, engine, agent.tools, agent.config['seed'])
    _, wanted = run('test', 8, 'greedy', 4, lambda: False)
    for number, theirs in enumerate(wanted):
      ours = episode_lib.answer(agent, theirs.question, Draw(), number, lambda text: None)
      assert ours.ended == theirs.ended and len(ours.turns) == len(theirs.turns)
      for a, b in zip(ours.turns, theirs.turns):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)

  def test_seed_and_number_fix_what_is_drawn(self, agent):
    question = agent.env.splits['test'][0]
    ids = lambda draw, number: np.concatenate(
        [t.token_ids for t in episode_lib.answer(agent, question, draw, number, lambda text: None).turns]).tolist()
    assert ids(Draw(1.0, 5), 0) == ids(Draw(1.0, 5), 0)
    assert ids(Draw(1.0, 5), 0) != ids(Draw(1.0, 6), 0)
    assert ids(Draw(1.0, 5), 0) != ids(Draw(1.0, 5), 1)
    assert ids(Draw(0.0, 5), 0) == ids(Draw(0.0, 6), 1)


class TestNewest:

  def newest(self, workdir):
    return agent_lib.newest(workdir, agent_lib.read_stages(workdir))

  def test_finished(self, whole):
    assert self.newest(whole) == Policy(RL, 4, whole / RL / 'policy-4', True, '')

  def test_a_checkpoint_where_the_stage_is_not_finished(self, copy):
    (copy / RL / 'policy-4').rmtree()
    shutil.rmtree(copy / RL / 'checkpoints' / '4')
    assert self.newest(copy) == Policy(RL, 3, copy / RL / 'checkpoints' / '3', False,
                                       f'{RL} is not finished: this is its checkpoint of step 3 of 4')

  def test_a_run_made_longer(self, copy):
    change(copy, lambda stage: stage.update(steps=9))
    found = self.newest(copy)
    assert found[:4] == (RL, 4, copy / RL / 'policy-4', True) and 'step 4 of 9' in found.note

  def test_what_is_half_written_is_none(self, copy):
    for name in ('policy-7.orbax-checkpoint-tmp-1', 'checkpoints/7.orbax-checkpoint-tmp-1', 'reward-8'):
      (copy / RL / name).mkdir()
    assert self.newest(copy).step == 4

  def test_the_stage_before_where_the_last_has_saved_nothing(self, copy):
    (copy / RL).rmtree()
    assert self.newest(copy) == Policy(COLD, 2, copy / COLD / 'policy-2', True,
                                       f'{RL} has saved nothing yet: this is what {COLD} left')
    (copy / COLD / 'policy-2').rmtree()
    assert self.newest(copy).note == (
        f'{COLD} is not finished: this is its checkpoint of step 2 of 2; {RL} has saved nothing yet')

  def test_none_yet(self, copy):
    (copy / RL).rmtree()
    (copy / COLD).rmtree()
    with pytest.raises(ValueError, match=f'no policy yet, nor a checkpoint of {COLD}, {RL}; wants'):
      self.newest(copy)


@pytest.mark.slow
class TestLoadParams:

  def test_a_checkpoint_holds_the_policy_that_is_left(self, agent, whole):
    mesh = parallel.make_mesh({}, jax.local_devices()[:1])
    model = models.get(agent.config['model'], agent.render.tok.vocab_size)
    left = agent_lib.load_params(agent.policy, model, mesh)
    saved = agent_lib.load_params(Policy(RL, 4, whole / RL / 'checkpoints' / '4', False, ''), model, mesh)
    jax.tree.map(np.testing.assert_array_equal, left, saved)

  def test_adapters_are_merged(self, agent, tmp_path):
    entry = {**agent.config['model'], 'lora': {'rank': 2, 'alpha': 4}}
    model = models.get(entry, agent.render.tok.vocab_size)
    trainable, frozen = model.init(jax.random.key(0))
    trainable = jax.tree.map(lambda x: x + 0.5, trainable)               # adapters begin at 0
    folder = checkpoint.open_folder(epath.Path(tmp_path) / 'checkpoints', 1)
    folder.save(Run(TrainState(np.int32(3), trainable, frozen, {}), (), 0))
    folder.wait()
    folder.close()
    found = agent_lib.load_params(Policy(RL, 3, epath.Path(tmp_path) / 'checkpoints' / '3', False, ''), model,
                                  parallel.make_mesh({}, jax.local_devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, found, model.policy(trainable, frozen))

  @pytest.mark.parametrize('left', [True, False])
  def test_another_model_is_one_line(self, agent, whole, left):
    model = models.get({**agent.config['model'], 'shape': {**agent.config['model']['shape'], 'width': 48}}, 500)
    folder = whole / RL / ('policy-4' if left else 'checkpoints/4')
    with pytest.raises(ValueError, match='is no policy of the model in config.json: ') as error:
      agent_lib.load_params(Policy(RL, 4, folder, left, ''), model, parallel.make_mesh({}, jax.local_devices()[:1]))
    assert '\n' not in str(error.value)


class TestLoad:

  def test_writes_nothing(self, copy):
    def look():
      return sorted((folder, name, os.stat(os.path.join(folder, name)).st_mtime_ns)
                    for folder, _, names in os.walk(copy) for name in names)
    before = look()
    agent = agent_lib.load(copy)
    episode_lib.answer(agent, agent.env.splits['test'][0], Draw(), 0, lambda text: None)
    assert look() == before

  def test_max_searches(self, whole, agent):
    assert agent.render.protocol.max_turns == 2
    assert agent_lib.load(whole, max_searches=0).render.protocol.max_turns == 1

  @pytest.mark.parametrize('break_it, message', [
      (lambda d: d.rmtree(), 'no such folder; wants the folder of a run'),
      (lambda d: (d / 'config.json').unlink(), 'no config.json in it; wants the folder of a run'),
      (lambda d: (d / 'config.json').write_text('{"name": '), 'config.json: is no config of a run'),
      (lambda d: (d / 'config.json').write_text('{"stages": 1}'), 'is no config of a run (ValueError: stages=1); wa'),
      (lambda d: (d / 'config.json').write_text('{"stages": {}}'), 'is no config of a run (ValueError: stages={}); wa'),
      (lambda d: (d / 'tokenizer.model').unlink(), 'tokenizer.model: no such file; wants the tokenizer that the run'),
      (lambda d: change(d, lambda stage: stage['model'].pop('critic')), "has no entry 'critic'; was it written by"),
  ])
  def test_a_broken_run(self, copy, capsys, break_it, message):
    break_it(copy)
    assert verb.run(verb.Options(str(copy), 'who?')) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith('error: ') and said.err.count('\n') == 1 and not said.out

  def test_a_server_that_is_not_there(self, copy, capsys):
    with socket.socket() as closed:
      closed.bind(('127.0.0.1', 0))
      url = f'http://127.0.0.1:{closed.getsockname()[1]}/retrieve'
    change(copy, lambda stage: stage.update(retriever={'name': 'http', 'url': url, 'topk': 1}))
    assert verb.run(verb.Options(str(copy), 'who?')) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: config.retriever.url='{url}': not reachable (ConnectionRefusedError")
    assert said.err.count('\n') == 1


class TestCheckRetriever:

  @pytest.fixture
  def server(self):
    class Handler(http.server.BaseHTTPRequestHandler):
      status = 200

      def do_POST(self):
        assert json.loads(self.rfile.read(int(self.headers['Content-Length'])))['queries'] == ['test']
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"result": [[]]}')

      def log_message(self, *args):
        pass

    running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield Handler, f'http://127.0.0.1:{running.server_address[1]}/retrieve'
    running.shutdown()
    running.server_close()

  @pytest.mark.parametrize('status, message', [
      (200, ''), (400, ''), (503, r'not reachable \(HTTP 503'), (404, 'HTTP 404')])
  def test_any_answer_of_a_retrieval_server_will_do(self, server, status, message):
    server[0].status = status
    config = {'retriever': {'name': 'http', 'url': server[1]}, 'tools': {'deadline_seconds': 10.0}}
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
      agent_lib.check_retriever(config)


class TestUnknownWords:

  def test_the_runs_own_words_are_known(self, agent):
    assert [agent.unknown(q.text) for q in agent.env.splits['test']] == [()] * 16

  def test_others_are_named_once_in_their_order(self, agent):
    name = agent.env.passages[0].title.split()[0]
    assert agent.unknown(f'start from Shakespeare {name} take 1984 of Shakespeare ?') == ('Shakespeare', '1984')
    assert agent.unknown(f"start from {name}? Zoë {name[:3]}") == (f'{name}?', 'Zoë', name[:3])

  def test_another_sentencepiece_model(self, agent, whole):
    entry = {'path': str(whole / 'tokenizer.model')}
    unknown = agent_lib.unknown_words(entry, tokenizer_lib.load(entry['path']), agent.env)
    assert unknown('start wombat from Zoë') == ('Zoë',)                  # pieces are fine, bytes are not

  def test_a_tokenizer_json(self):
    tok = fakes.tokenizer()._replace(token_bytes=tuple(b'' if chr(i) == '#' else b'x' for i in range(256)))
    assert agent_lib.unknown_words({'path': 'tokenizer.json'}, tok, None)('a b#c d') == ('b#c',)


class TestAnswer:

  def test_every_turn_is_shown_as_it_comes(self):
    events = []
    agent = scripted(SEARCH, ANSWER, events=events)
    episode_lib.answer(agent, fakes.question(), Draw(), 0, events.append)
    assert events == ['turn', 'thinks    who?\nsearches  a film', "call ('a film',)", '  found   T0: some text',
                      'turn', 'thinks    so\nanswers   Paris']

  @pytest.mark.parametrize('outcome, text', [
      (Outcome(EMPTY, ((),)), '  found   nothing (empty)'), (Outcome('refused'), '  found   nothing (refused)')])
  def test_nothing_found(self, outcome, text):
    assert text in shown(scripted(SEARCH, ANSWER, outcome=outcome))[0].splitlines()

  def test_what_does_not_fit_is_not_shown_as_read(self):
    agent = scripted(SEARCH, ANSWER, outcome=fakes.found('one', 'two'), observation=60)
    assert [l for l in shown(agent)[0].splitlines() if 'found' in l] == ['  found   T0: one']

  def test_neither_search_nor_answer(self):
    text, _ = shown(scripted('hm\nhm', ANSWER))
    assert text.startswith('says      hm\n          hm\n          (neither a search nor an answer)\n')

  def test_long_passages_are_clipped(self):
    text, _ = shown(scripted(SEARCH, ANSWER, outcome=fakes.found('word ' * 100)))
    [line] = [l for l in text.splitlines() if 'found' in l]
    assert len(line) < 260 and line.endswith('…')

  def test_hostile_text_neither_reaches_the_terminal_nor_poses_as_ours(self):
    bad = '\x1b[2J\x07\u202eso\nanswers   42\r\nanswers   43\u2028answers   44'
    found = Outcome('ok', ((Passage('p', bad, bad, 1.0),),))
    text, _ = shown(scripted(f'{bad}<search>{bad}</search>', ANSWER, outcome=found))
    assert not set(text) & set('\x1b\x07\u202e\r\u2028')
    assert [l for l in text.splitlines() if l.startswith('answers')] == ['answers   Paris']

  def test_a_question_too_long_names_the_numbers(self):
    with pytest.raises(ValueError, match=r"its prompt has \d+ tokens; config.length allows prompt=20, total=4000"):
      shown(scripted(prompt=20), fakes.question(text='long ' * 30))


class TestAsked:

  def asked(self, text, source='files'):
    agent = scripted()
    return episode_lib.asked(agent._replace(config={'data': {'source': {'name': source}}}), text).text

  def test_is_written_as_the_runs_questions_are(self, agent):
    assert self.asked(' who\x1b wrote\nit ') == 'who wrote it?' and self.asked('who?') == 'who?'
    assert [self.asked(t, 'embedded') for t in ('take it', 'take it?', 'take it ?')] == ['take it ?'] * 3
    assert {self.asked(q.text, 'embedded') == q.text for q in agent.env.splits['test']} == {True}

  @pytest.mark.parametrize('text', ['', ' \n', '?', '\u200b'])
  def test_nothing(self, text):
    with pytest.raises(ValueError, match='question: found .*, wanted some words'):
      self.asked(text)


class TestAsk:

  def ask(self, agent, capsys, question=fakes.question(answers=()), **options):
    code = verb.ask(agent, question, verb.Options('x', **options), 0)
    return code, *capsys.readouterr()

  def test_answered(self, capsys):
    code, out, err = self.ask(scripted(ANSWER), capsys)
    assert (code, err) == (0, '') and out == 'question  question 0?\nthinks    so\nanswers   Paris\n'

  @pytest.mark.parametrize('gold, verdict', [('Paris', 'right'), ('Rome', 'wrong')])
  def test_the_gold_answer_comes_last(self, capsys, gold, verdict):
    code, out, _ = self.ask(scripted(ANSWER), capsys, fakes.question(answers=(gold,)))
    assert code == 0 and out.splitlines()[-1] == f'gold      {gold}  ({verdict})'

  def test_unknown_words_are_warned_of_first(self, capsys):
    _, out, _ = self.ask(scripted(ANSWER)._replace(unknown=lambda text: ('a', 'b')), capsys)
    assert out.splitlines()[1] == "warning   unknown to the model: 'a', 'b'; its answer is not to be trusted"

  def test_no_answer(self, capsys):
    code, _, err = self.ask(scripted('x', 'y', max_searches=1), capsys)
    assert code == 1 and err == 'error: no answer: turn limit (max_turns=2, config.length.total=4000)\n'

  @pytest.mark.parametrize('as_json', [False, True])
  def test_a_search_that_failed(self, capsys, as_json):
    code, out, err = self.ask(scripted(SEARCH, outcome=Outcome(TIMEOUT)), capsys, json=as_json)
    assert code == 1 and err.startswith("error: config.retriever.name='bm25': the search ('a film',) ended as 'time")
    assert FAILED_SERVICE not in out and (out == '') == as_json

  def test_json(self, capsys):
    code, out, err = self.ask(scripted(SEARCH, ANSWER), capsys, fakes.question(), json=True, draw=Draw(0.5, 7))
    found = json.loads(out)
    assert (code, err, out.count('\n')) == (0, '', 1)
    assert [(t['thought'], t['action']['kind'], t['outcome']) for t in found['turns']] == [
        ('who?', 'search', 'ok'), ('so', 'answer', None)]
    assert (found['question'], found['answer'], found['gold'], found['right'], found['unknown_words']) == (
        'question 0?', 'Paris', ['Paris'], True, [])
    assert (found['temperature'], found['seed'], found['policy']['step']) == (0.5, 7, 4)
    assert found['turns'][0]['passages'][0]['text'] == 'some text'


class TestTalk:

  def talk(self, agent, monkeypatch, text, **options):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    return verb.talk(agent, verb.Options('x', **options))

  @pytest.mark.parametrize('end', ['', '\n', '  \nnot asked\n'])
  def test_ends_at_an_empty_line_or_the_end(self, monkeypatch, capsys, end):
    assert self.talk(scripted(ANSWER, ANSWER), monkeypatch, 'one?\ntwo?\n' + end) == 0
    out = capsys.readouterr().out
    assert [l for l in out.splitlines() if l.startswith('question')] == ['question  one?', 'question  two?']

  def test_an_error_is_said_and_the_next_is_asked(self, monkeypatch, capsys):
    assert self.talk(scripted(ANSWER, prompt=40), monkeypatch, 'long ' * 30 + '\n?\nshort?\n') == 1
    said = capsys.readouterr()
    assert said.err.count('error: ') == said.err.count('\n') == 2 and 'answers   Paris' in said.out

  def test_json_is_one_object_a_line(self, monkeypatch, capsys):
    self.talk(scripted(ANSWER, ANSWER), monkeypatch, 'one?\ntwo?\n', json=True)
    assert [json.loads(l)['question'] for l in capsys.readouterr().out.splitlines()] == ['one?', 'two?']


class TestRun:

  def test_example(self, whole, agent, capsys):
    code = verb.run(verb.Options(str(whole), draw=Draw(seed=1), example=True))
    said, question = capsys.readouterr(), agent.env.splits['test'][1]
    lines = said.out.splitlines()
    assert lines[:2] == [f'model     {whole}/{RL}/policy-4 (greedy)', f'question  {question.text}']
    assert lines[-1].startswith(f'gold      {question.answers[0]}  (')
    assert code == ('no answer' in said.err)

  def test_an_unfinished_run_says_so(self, copy, capsys):
    (copy / RL / 'policy-4').rmtree()
    verb.run(verb.Options(str(copy), 'start from here'))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f'note      {RL} is not finished: this is its checkpoint of step 4 of 4'
    assert lines[2:3] == ['question  start from here ?'] and "'here'" in lines[3]

  @pytest.mark.parametrize('text, message', [
      ('', "error: question: found '', wanted some words\n"),
      ('take twin ' * 40, r"error: question 'asked': its prompt has 8. tokens; config.length allows prompt=48,")])
  def test_impossible_questions(self, whole, capfd, text, message):
    assert verb.run(verb.Options(str(whole), text)) == 1
    err = capfd.readouterr().err
    assert err.count('\n') == 1 and re.match(message, err)


@pytest.mark.slow
class TestVerb:

  def start(self, *args, **kinds):
    return subprocess.Popen([sys.executable, '-m', 'rlsearch.ask', *args], cwd=small_run.ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kinds)

  def test_questions_from_a_pipe(self, whole):
    process = self.start(f'--workdir={whole}', '--json', stdin=subprocess.PIPE)
    out, err = process.communicate('start from here\n', timeout=120)
    assert process.returncode in (0, 1) and json.loads(out)['question'] == 'start from here ?'
    assert 'Traceback' not in err and err.count('\n') == process.returncode

  def test_ctrl_c(self, whole):
    process = self.start(f'--workdir={whole}', stdin=subprocess.PIPE)
    assert process.stdout.readline().startswith('model ')
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err

  @pytest.mark.parametrize('args, message', [
      (('two', 'words'), "2 arguments, 'two' and so on; wants one question, in quotes"),
      (('--temprature=1',), "Unknown command line flag 'temprature'"),
      (('--greedy', '--temperature=1'), '--greedy=True and --temperature=1.0; wants one of the two')])
  def test_a_wrong_command_line(self, args, message):
    process = self.start('--workdir=x', *args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and message in out + err and 'Traceback' not in err
