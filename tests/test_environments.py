"""Questions by position from the embedded world and from files: pure, in blocks, under names of their own."""
from __future__ import annotations

import hashlib
import json

import pytest

from rlsearch.envs import encyclopedia, encyclopedia_text, environments, retrieval
from rlsearch.types import OK, Call

EXPERT = dict(noise=.45, clean_positions=12, famous_every=5, topk=3, title_weight=2, max_searches=3)


def world(demonstrations=None, **changes):
  """A small embedded environment."""
  entries = dict(preset='demo', seed=0, num_entities=200, num_famous=12, num_train=90, num_validation=20,
                 num_test=30, redraw_names=False, block=4)
  return environments.embedded(**{**entries, **changes}, demonstrations=demonstrations)


def get(env, positions):
  """The training questions at these positions."""
  return [env.train.get(p) for p in positions]


def write(path, *records):
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


@pytest.fixture(scope='module')
def plain():
  return world()


@pytest.fixture(scope='module')
def redrawn():
  return world(redraw_names=True)


@pytest.fixture(scope='module')
def taught():
  return world(EXPERT, redraw_names=True)


class TestEmbedded:

  @pytest.mark.parametrize('demonstrations', [None, EXPERT])
  def test_position_to_question_is_pure(self, demonstrations):
    first, second = (world(demonstrations, redraw_names=True) for _ in range(2))
    wanted = get(first, range(60))
    assert get(first, range(60)) == wanted
    assert get(second, reversed(range(60))) == wanted[::-1]
    assert get(second, [431, 7, 7]) == [first.train.get(431), wanted[7], wanted[7]]
    assert get(world(demonstrations, redraw_names=True, seed=1), range(60)) != wanted

  def test_blocks_share_hops_and_take_turns(self, plain):
    hops = [q.meta['hops'] for q in get(plain, range(48))]
    assert hops == [1 + position // 4 % 3 for position in range(48)]
    other = [q.meta['hops'] for q in get(world(block=8), range(48))]
    assert other == [1 + position // 8 % 3 for position in range(48)]

  def test_questions_come_round_in_a_fresh_order(self):
    env = world(block=5)
    rounds = [[q.uid for q in get(env, range(90 * i, 90 * i + 90))] for i in range(4)]
    assert len(set(map(tuple, rounds))) == 4
    assert len({uid for uids in rounds for uid in uids}) <= 90 == env.train.size

  def test_every_question_is_asked_once_a_round(self):
    env = world(block=5)                               # 18 blocks of 5 are 30 questions of each of 3 kinds
    assert len({q.uid for q in get(env, range(90))}) == 90

  def test_questions_alone_bring_no_demonstration(self, plain, redrawn):
    for q in (*get(plain, range(40)), *get(redrawn, range(40))):
      assert 'demonstration' not in q.meta and not q.meta['famous']

  def test_clean_positions_are_one_hop_with_the_clean_expert(self, taught):
    for q in get(taught, range(12)):
      (r,), (x, y) = q.meta['relations'], q.meta['entities']
      assert q.meta['demonstration'] == (
          f'<think> take {r} </think><search> {x} {r} </search>',
          f'<think> the {r} is {y} after {r} done </think><answer> {y} </answer>')
    assert [taught.train.get(p).meta['hops'] for p in (12, 20, 28)] == [1, 3, 2]

  def test_noise_is_that_of_the_positions_behind(self):
    def share_right(noise):
      found = get(world({**EXPERT, 'noise': noise, 'famous_every': 0}), range(12, 132))
      return sum(f'<answer> {q.answers[0]} <' in q.meta['demonstration'][-1] for q in found) / 120
    assert share_right(0.) == 1 and .2 < share_right(.45) < .7

  def test_demonstrations_of_a_question_differ_when_it_comes_again(self, taught):
    seen = {}
    for q in get(taught, range(12, 400)):
      seen.setdefault(q.uid, set()).add(q.meta['demonstration'])
    again = [texts for texts in seen.values() if len(texts) > 1]
    assert len(again) > 10

  def test_every_so_many_blocks_is_famous(self, taught):
    made = encyclopedia.make_world(0, 200, num_famous=12)
    by_heart = {q.text: q.answers for q in encyclopedia.famous_questions(made)}
    for position, q in enumerate(get(taught, range(12, 120)), start=12):
      assert q.meta['famous'] == (position // 4 % 5 == 4)
      if q.meta['famous']:                             # their names stay
        assert q.answers == by_heart[q.text] and len(q.meta['demonstration']) == 1
    assert len({taught.train.get(p).uid for p in range(120) if p // 4 % 5 == 4}) > 12
    never = get(world({**EXPERT, 'famous_every': 0}), range(120))
    assert not any(q.meta['famous'] for q in never)

  def test_no_famous_entities(self):
    assert not any(q.meta['famous'] for q in get(world(EXPERT, num_famous=0), range(60)))

  def test_redrawn_questions_are_the_same_ones_under_other_names(self, plain, redrawn):
    fresh = 0
    for old, new in zip(get(plain, range(60)), get(redrawn, range(60))):
      names, back = (new.meta['tool_options'][entry] for entry in ('names', 'names_back'))
      apply = encyclopedia_text.apply_names
      assert new.uid == old.uid and new.meta['gold_passages'] == old.meta['gold_passages']
      assert new.text == apply(names, old.text) and old.text == apply(back, new.text)
      assert new.answers == tuple(apply(names, a) for a in old.answers)
      assert new.meta['entities'] == tuple(apply(names, e) for e in old.meta['entities'])
      assert 'tool_options' not in old.meta
      fresh += new.text != old.text
    assert fresh > 50

  def test_names_differ_from_position_to_position(self, redrawn):
    names = [tuple(sorted(q.meta['names'].items())) for q in get(redrawn, range(20))]
    assert len(set(names)) == 20

  def test_search_under_other_names_finds_the_gold_passage(self, redrawn):
    service = retrieval.search_service(retrieval.bm25(redrawn.passages, title_weight=2))
    own = {p.uid: p for p in redrawn.passages}
    questions = get(redrawn, range(60))
    calls = [Call((i,), 'search', {'queries': q.meta['sub_questions']}, {**q.meta['tool_options'], 'k': 1})
             for i, q in enumerate(questions)]
    for q, outcome in zip(questions, service(calls), strict=True):
      assert outcome.kind == OK
      best = [hits[0] for hits in outcome.value]
      assert tuple(p.uid for p in best) == q.meta['gold_passages']
      assert tuple(p.title for p in best) == q.meta['entities'][:-1]
      for passage, value in zip(best, q.meta['sub_answers'], strict=True):
        assert value in passage.text
        assert passage.text == encyclopedia_text.apply_names(q.meta['names'], own[passage.uid].text)

  def test_without_the_options_the_search_does_not_know_the_names(self, redrawn):
    service = retrieval.search_service(retrieval.bm25(redrawn.passages, title_weight=2))
    questions = [q for q in get(redrawn, range(60)) if q.meta['hops'] == 1]
    found = service([Call((i,), 'search', {'queries': q.meta['sub_questions']}, {'k': 1})
                     for i, q in enumerate(questions)])
    right = [bool(o.value) and [p.uid for p in o.value[0]] == list(q.meta['gold_passages'])
             for q, o in zip(questions, found)]
    assert sum(right) < .2 * len(right)

  def test_splits_are_fixed_and_in_their_own_names(self, plain, taught):
    assert {name: len(qs) for name, qs in plain.splits.items()} == {'validation': 20, 'test': 30}
    assert set(plain.splits) == set(environments.SPLITS)
    others = (taught, world(num_train=60), world(block=8))
    assert all(env.splits == plain.splits for env in others)
    assert world(num_test=15).splits['validation'] == plain.splits['validation']
    assert world(seed=1).splits != plain.splits
    titles = {p.title for p in plain.passages}
    for q in (*plain.splits['validation'], *plain.splits['test']):
      assert set(q.meta['entities']) <= titles and not {'names', 'demonstration'} & set(q.meta)

  def test_splits_and_training_have_nothing_in_common(self, plain):
    parts = {'train': get(plain, range(360)), **plain.splits}
    for entry in ('entities', 'gold_passages'):
      seen = [{x for q in qs for x in q.meta[entry]} for qs in parts.values()]
      assert sum(map(len, seen)) == len(set().union(*seen))

  def test_digest_is_that_of_the_world_and_its_questions(self, plain):
    assert world().digest == plain.digest
    others = [world(seed=1), world(num_entities=204), world(num_train=60), world(num_test=15)]
    assert len({plain.digest, *(env.digest for env in others)}) == 5

  @pytest.mark.parametrize('num_entities, seed, digest', [
      (200, 0, 'c56fe89eed0768e1661f07ec7cf7cc4649b63a9698cb38102ef396eed9a92a9b'),
      (200, 1, 'cc2098389faf624dc725c59b544a0f7ac00b9b6f0570808ceaa80f044f4e2a2f'),
      (404, 1, 'b3882cef3f1059031abcaa32cf5a78ac2cbcda12d26f64bf9f55599bd0853380'),
      (1000, 0, '94c49799294ddc320da398cd7f3a70e0a51fcbe9ad3b393eb9b3f4b120959f5f'),
      (1000, 1, '7fded97c0d3ffc71c8e033b7e13660a723998f4e78745c437ac03e47a8c9fcfb'),
      (2000, 0, '2eb25fa6c592aad9fff1eee4789c83f0dcebdf76c31af7098ec4c7d8f61c5f1f')])
  def test_demo_is_for_ever_what_it_was(self, num_entities, seed, digest):
    # Computed before there were other presets; a run that has begun goes on only in the same world.
    assert world(num_entities=num_entities, seed=seed).digest == digest

  @pytest.mark.parametrize('preset, seed, digest', [
      ('standard', 0, 'e0b16355a83a0370a33437ad7f8d93218dc499757a71252db848beef2c4ecd83'),
      ('standard', 1, 'feb585bd095292393c0bcccd983b340d4f86e8547fe0cae38483f812c021db1e'),
      ('hard', 0, '7c95a2afb845c4927406e0866d34708d8636245d39a8db8bfc325c9be5d7c267'),
      ('hard', 1, '4923e6e10a64802f0500a169fbecdd77233b289ade78ff6378e2fcf8c1a50023')])
  def test_the_other_presets_are_what_they_were(self, preset, seed, digest):
    assert world(preset=preset, seed=seed).digest == digest

  @pytest.mark.parametrize('seed, digest', [
      (0, 'cb56a0938f7022e9dbb0589407b38528637ada84a8b4228bf85a9c826e95b4e1'),
      (1, '4a95c0b9ce4ec41e94a2745fb424cb97282357e277d2a092a3058e61d0aef673')])
  def test_the_world_of_the_demo_is_too(self, seed, digest):
    sizes = dict(num_entities=1000, num_train=5400, num_validation=256, num_test=512)
    assert world(seed=seed, redraw_names=True, block=8, **sizes).digest == digest

  def test_demonstrations_of_the_demo_are_too(self):
    env = world(EXPERT, redraw_names=True)
    questions = [env.train.get(position) for position in range(100)]
    said = repr([(q.uid, q.text, q.answers, sorted(q.meta.items())) for q in questions])
    assert hashlib.sha256(said.encode()).hexdigest() == '881265362fd10d69cc98dd47030915eaac8ee3c0939a1a6e4ed59638976c4093'
    text = repr(list(env.text()))
    assert hashlib.sha256(text.encode()).hexdigest() == 'b28e90973cccf256740a5b9cb72119ff7405b79e706119b4f64ed098a71ad7a3'

  def test_text_is_that_of_the_world(self, plain):
    assert list(plain.text()) == encyclopedia.world_text(encyclopedia.make_world(0, 200, num_famous=12))

  @pytest.mark.parametrize('entries, named', [
      ({**EXPERT, 'noize': .1}, r"\['noize'\]"),
      ({k: v for k, v in EXPERT.items() if k != 'topk'}, r"\['topk'\]"),
      ({}, "'clean_positions', 'famous_every'")])
  def test_unknown_or_missing_entries_of_the_expert_are_named(self, entries, named):
    with pytest.raises(ValueError, match=rf'config\.data\.source\.demonstrations: .*{named}'):
      world(entries)


class TestFiles:

  @pytest.fixture
  def made(self, tmp_path):
    """Paths of a small corpus and two question files."""
    def question(uid, gold):
      return {'id': uid, 'question': f'who wrote {uid}', 'golden_answers': ['Bach'], 'supporting_ids': gold}
    return dict(
        corpus_path=write(tmp_path / 'corpus.jsonl', {'id': 'p1', 'title': 'Hamlet', 'text': 'A play.'},
                          {'id': 'p2', 'title': 'Faust', 'text': 'Another play.'}),
        train=write(tmp_path / 'mine' / 'train.jsonl', *(question(f'q{i}', ['p1']) for i in range(5))),
        validation='', test=write(tmp_path / 'mine' / 'test.jsonl', question('t1', ['p1', 'p2'])),
        format=None, seed=0)

  def test_reads_questions_and_passages(self, made):
    env = environments.files(**made)
    assert [p.title for p in env.passages] == ['Hamlet', 'Faust']
    assert env.splits['validation'] == () and [q.uid for q in env.splits['test']] == ['mine/t1']
    assert env.splits['test'][0].meta['gold_passages'] == ('p1', 'p2')
    assert env.train.size == 5
    rounds = [[q.uid for q in get(env, range(5 * i, 5 * i + 5))] for i in range(8)]
    assert all(sorted(uids) == [f'mine/q{i}' for i in range(5)] for uids in rounds)
    assert len(set(map(tuple, rounds))) > 1
    lines = list(env.text())
    assert lines[:2] == [' Hamlet\nA play.', ' Faust\nAnother play.']
    assert lines[2:] == [f' who wrote q{i}?' for i in range(5)]

  def test_the_order_follows_the_seed(self, made):
    orders = {tuple(q.uid for q in get(environments.files(**{**made, 'seed': seed}), range(10)))
              for seed in (0, 0, 1, 2, 3)}
    assert len(orders) == 4

  def test_digest_is_that_of_what_was_read(self, made, tmp_path):
    first = environments.files(**made).digest
    assert environments.files(**made).digest == first
    assert environments.files(**{**made, 'test': ''}).digest != first
    other = write(tmp_path / 'other.jsonl', {'id': 'p1', 'title': 'Hamlet', 'text': 'A tragedy.'},
                  {'id': 'p2', 'title': 'Faust', 'text': 'Another play.'})
    assert environments.files(**{**made, 'corpus_path': other}).digest != first

  @pytest.mark.parametrize('split', ['train', 'validation', 'test'])
  def test_a_missing_gold_passage_names_the_question(self, made, tmp_path, split):
    path = write(tmp_path / 'bad' / 'x.jsonl', {'id': 'b7', 'question': 'who', 'golden_answers': ['Bach'],
                                                'supporting_ids': ['p1', 'p9']})
    with pytest.raises(ValueError, match=r"question 'bad/b7': gold passage 'p9' is not in .*corpus\.jsonl"):
      environments.files(**{**made, split: path})

  def test_training_needs_a_file(self, made):
    with pytest.raises(ValueError, match=r'config\.data\.source\.train: empty; wants a question file'):
      environments.files(**{**made, 'train': ''})
