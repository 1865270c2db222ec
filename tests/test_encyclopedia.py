"""The embedded world: its bytes, splits, names and questions, and what BM25 makes of it."""
from __future__ import annotations

import collections
import hashlib
import io
import json
import re
import time

import bm25s
from bm25s.stopwords import STOPWORDS_EN, STOPWORDS_EN_PLUS
import numpy as np
import pytest
import sentencepiece

from rlsearch.envs import encyclopedia as envs
from rlsearch.envs import encyclopedia_text as text_of
from rlsearch.envs import expert

TURN = re.compile(r'<think> (?:take (\w+)|the (\w+) is (\w+ \w+) after (\w+) (\w+)) </think>'
                  r'(?:<search> ([\w ]+) </search>|<answer> ([\w ]+) </answer>)')


def bm25_search(world, k=3):
  """Queries to the k best passages of the world, the title counted twice."""
  texts = [f'{p.title} {p.title} {p.text}' for p in world.passages]
  index = bm25s.BM25()
  index.index(bm25s.tokenize(texts, stopwords='en', show_progress=False), show_progress=False)
  def search(queries):
    tokens = bm25s.tokenize(queries, stopwords='en', show_progress=False)
    rows, _ = index.retrieve(tokens, k=k, show_progress=False)
    return [tuple(world.passages[i] for i in row) for row in rows]
  return search


def fingerprint(world):
  """Hash of everything in a world and of what is drawn from it."""
  rng = np.random.default_rng(5)
  parts = [world.names, world.types.tolist(), world.values.tolist(), world.passages, world.facts,
           {split: members.tolist() for split, members in world.members.items()}, world.name_words,
           world.famous_words, envs.famous_questions(world), envs.rename(world, rng),
           *(envs.draw_questions(world, split, 60, rng) for split in envs.SPLITS),
           envs.world_text(world, 50)]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def scripted_agent(world, questions, search):
  """Answers of an agent that asks the gold sub-questions about the entities that it has read."""
  known = [q.meta['start'] for q in questions]
  for hop in range(max(q.meta['hops'] for q in questions)):
    live = [i for i, q in enumerate(questions) if hop < q.meta['hops'] and known[i]]
    relation = {i: questions[i].meta['relations'][hop] for i in live}
    found = search([f'{known[i]} {relation[i]}' for i in live])
    for i, passages in zip(live, found):
      own = next((p for p in passages if p.title == known[i]), None)
      known[i] = dict(world.facts[own.uid]).get(relation[i], '') if own else ''
  return known


def exact_match(questions, turns):
  """Share of the demonstrations that end with the right answer."""
  return np.mean([f'<answer> {q.answers[0]} </answer>' in texts[-1]
                  for q, texts in zip(questions, turns, strict=True)])


def by_hops(questions, right):
  """Mean of what is right, by hops, for printing."""
  return {h: round(float(np.mean([r for q, r in zip(questions, right) if q.meta['hops'] == h])), 3)
          for h in (1, 2, 3)}


@pytest.fixture(scope='module')
def world():
  return envs.make_world(0)


@pytest.fixture(scope='module')
def search(world):
  return bm25_search(world)


@pytest.fixture(scope='module')
def test_questions(world):
  return envs.draw_questions(world, 'test', 512, np.random.default_rng(1))


@pytest.fixture(scope='module')
def train_questions(world):
  return envs.draw_questions(world, 'train', 512, np.random.default_rng(2))


class TestMakeWorld:

  def test_same_seed_same_bytes(self):
    assert fingerprint(envs.make_world(3, 200)) == fingerprint(envs.make_world(3, 200))

  def test_bytes_are_those_of_other_machines(self):
    # Computed once; a change here changes every published number.
    assert fingerprint(envs.make_world(0, 200)) == (
        '3c66c3737f7263a4294a5161d997d1ac29355ef77f229a8380be5b38902e9b9e')

  def test_other_seeds_and_sizes_differ(self):
    worlds = [envs.make_world(0, 200), envs.make_world(1, 200), envs.make_world(0, 204)]
    assert len({fingerprint(w) for w in worlds}) == 3

  def test_shares(self, world):
    sizes = {split: len(members) for split, members in world.members.items()}
    assert sizes == {'famous': 12, 'validation': 100, 'test': 400, 'train': 488}
    for members in world.members.values():
      assert np.ptp(np.bincount(world.types[members], minlength=4)) == 0

  def test_subworlds_partition_the_entities_and_are_closed(self, world):
    assert sorted(np.concatenate(list(world.members.values()))) == list(range(1000))
    for members in world.members.values():
      assert np.isin(world.values[members], members).all()

  def test_values_have_the_right_type_and_are_never_the_entity(self, world):
    for entity in range(1000):
      for slot, value in enumerate(world.values[entity]):
        relation = text_of.RELATIONS[2 * world.types[entity] + slot]
        assert text_of.TYPES[world.types[value]] == relation.value and value != entity

  def test_no_hubs(self, world):
    for members in world.members.values():
      for index, relation in enumerate(text_of.RELATIONS):
        subjects = members[world.types[members] == index // 2]
        candidates = members[world.types[members] == text_of.TYPES.index(relation.value)]
        degree = np.bincount(world.values[subjects, index % 2], minlength=1000)[candidates]
        assert degree.max() - degree.min() <= 1, relation

  @pytest.mark.parametrize('seed', range(3))
  def test_names(self, seed):
    world = envs.make_world(seed)
    assert len({frozenset(name.split()) for name in world.names}) == 1000
    words = (*world.name_words, *world.famous_words)
    assert len(world.name_words) == 240 and len(world.famous_words) == 24 and len(set(words)) == 264
    taken = {*text_of.template_words(), *text_of.TAG_WORDS, *STOPWORDS_EN, *STOPWORDS_EN_PLUS}
    for word in words:
      assert word.lower() not in taken and len(word) >= 4 and word == word.capitalize()
    for entity, name in enumerate(world.names):
      own = world.famous_words if entity in world.members['famous'] else world.name_words
      assert set(name.split()) <= set(own) and len(name.split()) == 2

  def test_no_stop_word_sounds_like_a_name(self):
    onset, vowel, coda = (f'[{x}]' for x in (text_of._ONSETS, text_of._VOWELS, text_of._CODAS))
    sound = re.compile(f'{onset}{vowel}{coda}?{onset}{vowel}{coda}')
    assert not [w for w in (*STOPWORDS_EN, *STOPWORDS_EN_PLUS) if sound.fullmatch(w)]

  def test_passages_state_their_facts(self, world):
    for entity, passage in enumerate(world.passages):
      assert passage.title == world.names[entity] and len(passage.text.split()) <= 32
      facts = world.facts[passage.uid]
      assert {value for _, value in facts} == {world.names[v] for v in world.values[entity]}
      places = []
      for noun, value in facts:
        relation = text_of.RELATIONS[text_of.NOUNS.index(noun)]
        sentences = [text_of.render_fact(t, relation, passage.title, value) for t in range(3)]
        assert sum(sentence in passage.text for sentence in sentences) == 1
        places.append(max(passage.text.find(sentence) for sentence in sentences))
      assert places[0] < places[1]

  def test_passages_vary(self, world):
    starts = collections.Counter()
    for passage in world.passages:
      filler = next((f for f in text_of.FILLERS if f in passage.text), None)
      where = '-' if filler is None else (
          'before' if passage.text.startswith(filler) else
          'behind' if passage.text.endswith(filler) else 'between')
      starts[where] += 1
    assert 430 < starts['-'] < 570 and min(starts.values()) > 120 and len(starts) == 4, starts

  def test_text_is_lower_case_words_and_names(self, world):
    known = {*text_of.template_words(), *world.name_words, *world.famous_words}
    for line in envs.world_text(world):
      assert set(line.split()) <= known
    nouns = {*text_of.NOUNS, *(w for r in text_of.RELATIONS for w in r.phrase.split())} - {
        'was', 'is', 'by', 'in', 'for', 'with'}
    assert not nouns & set(' '.join(text_of.FILLERS).split())

  def test_errors_say_what_is_wanted(self):
    with pytest.raises(ValueError, match=r"world.preset='hrad'; known: \['demo', 'hard', 'standard'\]"):
      envs.make_world(0, preset='hrad')
    with pytest.raises(ValueError, match='4 famous entities .*wanted at least 8 or none'):
      envs.make_world(0, num_famous=4)
    with pytest.raises(ValueError, match='-12 train entities'):
      envs.make_world(0, test_share=.8, validation_share=.2)
    with pytest.raises(ValueError, match='words wanted, the syllables give'):
      text_of.invent_words(10 ** 6, np.random.default_rng(0))
    with pytest.raises(ValueError, match='100 names wanted, 3 words give 3'):
      text_of.invent_names(('Ab', 'Cd', 'Ef'), 100, np.random.default_rng(0))

  def test_no_famous_entities(self):
    world = envs.make_world(0, 200, num_famous=0)
    assert world.famous_words == () and envs.famous_questions(world) == ()
    assert len(world.members['train']) == 100

  @pytest.mark.slow
  def test_100000_entities(self):
    start = time.perf_counter()
    world = envs.make_world(0, 100_000)
    questions = envs.draw_questions(world, 'test', 512, np.random.default_rng(0))
    seconds = time.perf_counter() - start
    print(f'100,000 entities, {len(world.name_words)} name words: {seconds:.1f} s')
    assert len(set(world.names)) == 100_000 and seconds < 40
    known = scripted_agent(world, questions, bm25_search(world))
    right = [k == q.answers[0] for k, q in zip(known, questions)]
    print('scripted agent by hops:', by_hops(questions, right))
    assert np.mean(right) >= .98


class TestDrawQuestions:

  @pytest.mark.parametrize('split, num', [('train', 900), ('validation', 256), ('test', 512)])
  def test_distinct_chains_of_the_split_in_equal_shares(self, world, split, num):
    questions = envs.draw_questions(world, split, num, np.random.default_rng(0))
    assert len({q.uid for q in questions}) == len({q.text for q in questions}) == num
    hops = collections.Counter(q.meta['hops'] for q in questions)
    assert set(hops) == {1, 2, 3} and max(hops.values()) - min(hops.values()) <= 1
    members = {world.names[i] for i in world.members[split]}
    for q in questions:
      names, nouns = q.meta['entities'], q.meta['relations']
      assert set(names) <= members and len(set(names)) == len(names) == q.meta['hops'] + 1
      assert q.meta['start'] == names[0] and q.answers == names[-1:] and not q.meta['famous']
      assert q.meta['sub_answers'] == names[1:] and q.meta['type'] == 'chain'
      for uid, name, noun, value, sub in zip(
          q.meta['gold_passages'], names, nouns, names[1:], q.meta['sub_questions']):
        assert len(q.meta['gold_passages']) == len(nouns) == len(q.meta['sub_questions'])
        passage = world.passages[world.entity[name]]
        assert passage.uid == uid and value in passage.text and sub == f'{name} {noun}'
        assert dict(world.facts[uid])[noun] == value

  def test_both_wordings(self, world, test_questions):
    q = next(q for q in test_questions if q.meta['hops'] == 3)
    a, b, c = q.meta['relations']
    start = q.meta['start']
    assert text_of.render_question(0, start, (a, b, c)) == (
        f'what do you reach if you take {a} {b} {c} from {start} ?')
    assert text_of.render_question(1, start, (a, b, c)) == (
        f'start from {start} take {a} {b} {c} ?')
    openings = collections.Counter(q.text.split()[0] for q in test_questions)
    assert min(openings['what'], openings['start']) > 200

  def test_one_wording_a_chain_in_test_and_two_in_train(self, world, test_questions):
    def chains(questions):
      return {(q.meta['start'], q.meta['relations']) for q in questions}
    assert len(chains(test_questions)) == 512
    train = envs.draw_questions(world, 'train', 4000, np.random.default_rng(0))
    assert len(chains(train)) < 4000

  def test_same_generator_same_questions(self, world):
    first, second, other = (
        envs.draw_questions(world, 'train', 32, np.random.default_rng(s)) for s in (7, 7, 8))
    assert first == second != other

  def test_splits_share_no_question_and_no_name(self, test_questions, train_questions):
    for entry in ('entities', 'gold_passages'):
      test, train = ({x for q in qs for x in q.meta[entry]}
                     for qs in (test_questions, train_questions))
      assert not test & train

  def test_no_answer_is_frequent(self, test_questions):
    counts = collections.Counter((q.meta['relations'][-1], q.answers) for q in test_questions)
    assert max(counts.values()) == 1

  def test_hops_can_be_chosen(self, world):
    questions = envs.draw_questions(world, 'train', 50, np.random.default_rng(0), hops=(1,))
    assert {q.meta['hops'] for q in questions} == {1}

  def test_errors_say_what_could_not_be_met(self):
    small, rng = envs.make_world(0, 200), np.random.default_rng(0)
    with pytest.raises(ValueError, match='86 distinct validation questions of 1 hops wanted '
                                         r'\(num=256\), only 40 exist among 20 validation'):
      envs.draw_questions(small, 'validation', 256, rng)
    with pytest.raises(ValueError, match="split='dev'; known"):
      envs.draw_questions(small, 'dev', 1, rng)
    assert len(envs.draw_questions(small, 'validation', 120, rng)) == 120

  def test_scripted_agent_answers_through_bm25(self, world, search, test_questions):
    known = scripted_agent(world, test_questions, search)
    right = [k == q.answers[0] for k, q in zip(known, test_questions)]
    print('scripted agent by hops:', by_hops(test_questions, right))
    assert np.mean(right) >= .98

  def test_one_search_and_an_oracle_reader_do_not_answer(self, test_questions, world, search):
    found = search([q.text for q in test_questions])
    right = [any((q.meta['relations'][-1], q.answers[0]) in world.facts[p.uid] for p in passages)
             for q, passages in zip(test_questions, found)]
    print('one search and an oracle reader by hops:', by_hops(test_questions, right))
    assert by_hops(test_questions, right)[3] < .2

  def test_question_alone_does_not_answer(self):
    world = envs.make_world(0, num_famous=0)
    train = envs.draw_questions(world, 'train', 900, np.random.default_rng(1))
    test = envs.draw_questions(world, 'test', 512, np.random.default_rng(2))
    def most_frequent(questions, feature):
      counts = collections.defaultdict(collections.Counter)
      for q in questions:
        counts[feature(q)][q.answers[0]] += 1
      return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    def last(q): return q.meta['relations'][-1]
    bags = [set(q.text.split()) for q in train]
    by_last, by_start = most_frequent(train, last), most_frequent(train, lambda q: q.meta['start'])
    oracle = most_frequent(test, last)
    entities = [(set(n.split()), n) for n in world.names]
    guessers = {
        'last relation': lambda q: by_last[last(q)],
        'start': lambda q: by_start.get(q.meta['start']),
        'nearest train question': lambda q: train[
            int(np.argmax([len(set(q.text.split()) & bag) for bag in bags]))].answers[0],
        'name that shares a word': lambda q: max(
            (len(words & set(q.text.split())), n) for words, n in entities
            if n != q.meta['start'])[1],
        'test answers of the last relation': lambda q: oracle[last(q)]}
    scores = {name: np.mean([guess(q) == q.answers[0] for q in test])
              for name, guess in guessers.items()}
    print('question only:', {name: round(float(score), 3) for name, score in scores.items()})
    assert max(scores.values()) <= .05


class TestRename:

  def test_is_a_permutation_that_leaves_the_rest_alone(self, world):
    mapping = envs.rename(world, np.random.default_rng(0))
    assert sorted(mapping) == sorted(mapping.values()) == sorted(world.name_words)
    assert mapping != envs.rename(world, np.random.default_rng(1))
    assert not set(mapping) & set(world.famous_words)
    for passage in world.passages:
      new = text_of.apply_names(mapping, passage.text)
      for old_word, new_word in zip(passage.text.split(' '), new.split(' '), strict=True):
        assert new_word == mapping.get(old_word, old_word)
      assert text_of.apply_names(text_of.invert(mapping), new) == passage.text

  def test_apply_names_replaces_at_once_and_only_whole_words(self):
    mapping = {'Tor': 'Vek', 'Vek': 'Tor'}
    text = 'Tor Vek\tTorvek tor "Vek", xTor Tor.\n'
    assert text_of.apply_names(mapping, text) == 'Vek Tor\tTorvek tor "Tor", xTor Vek.\n'
    assert text_of.apply_names({}, text) == text

  def test_invert_refuses_what_is_not_one_to_one(self):
    with pytest.raises(ValueError, match='2 words have only 1 images'):
      text_of.invert({'Tor': 'Vek', 'Pal': 'Vek'})


class TestRedrawQuestion:

  def test_maps_everything_consistently(self, world, test_questions):
    mapping = envs.rename(world, np.random.default_rng(0))
    for q in test_questions[:60]:
      new = text_of.redraw_question(q, mapping)
      names = tuple(text_of.apply_names(mapping, n) for n in q.meta['entities'])
      assert new.meta['entities'] == names and new.answers == names[-1:] != q.answers
      assert new.meta['start'] == names[0] and new.meta['sub_answers'] == names[1:]
      wording = int(q.uid[-1])
      assert new.text == text_of.render_question(wording, names[0], q.meta['relations'])
      assert new.meta['sub_questions'] == tuple(
          f'{n} {r}' for n, r in zip(names, q.meta['relations']))
      back, same = new.meta['names_back'], ('gold_passages', 'relations', 'hops', 'famous', 'type')
      assert text_of.apply_names(back, new.text) == q.text and new.uid == q.uid
      assert all(new.meta[entry] == q.meta[entry] for entry in same)
      assert 'names' not in q.meta and new.meta['names'] == mapping

  def test_leaves_famous_questions_alone(self, world):
    mapping = envs.rename(world, np.random.default_rng(0))
    for q in envs.famous_questions(world):
      new = text_of.redraw_question(q, mapping)
      assert (new.text, new.answers) == (q.text, q.answers)

  def test_refuses_a_second_time(self, world, test_questions):
    mapping = envs.rename(world, np.random.default_rng(0))
    with pytest.raises(ValueError, match='re-drawn already'):
      text_of.redraw_question(text_of.redraw_question(test_questions[0], mapping), mapping)


class TestFamousQuestions:

  def test_are_closed_book_and_apart(self, world, test_questions, train_questions):
    famous = envs.famous_questions(world)
    assert len(famous) == 48 == len({q.text for q in famous})
    names = {world.names[i] for i in world.members['famous']}
    assert all(q.meta['famous'] and set(q.meta['entities']) <= names for q in famous)
    assert not names & {n for q in (*test_questions, *train_questions) for n in q.meta['entities']}


class TestWorldText:

  def test_byte_pairs_make_every_word_whole(self, world):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(envs.world_text(world)), model_writer=model, vocab_size=1000,
        model_type='bpe', num_threads=1, minloglevel=2)
    encode = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode
    words = (*text_of.template_words(), *world.name_words, *world.famous_words)
    assert [word for word in words if len(encode(word)) != 1] == []

  def test_holds_no_held_out_questions(self, world):
    test = {world.names[i] for i in world.members['test']}
    asked = [line for line in envs.world_text(world) if line.endswith('?')]
    assert len(asked) == 500
    assert not [line for line in asked if any(name in line for name in test)]


class TestDemonstrations:

  def test_clean_expert_word_for_word(self, world, search, train_questions):
    q = next(q for q in train_questions if q.meta['hops'] == 2)
    (x, y, z), (r, s) = q.meta['entities'], q.meta['relations']
    (turns,) = expert.demonstrations(world, [q], search, np.random.default_rng(0), 0.)
    assert turns == (
        f'<think> take {r} </think><search> {x} {r} </search>',
        f'<think> the {r} is {y} after {r} {s} </think><search> {y} {s} </search>',
        f'<think> the {s} is {z} after {s} done </think><answer> {z} </answer>')

  def test_exact_match_by_noise(self, world, search, train_questions):
    scores = {}
    for noise in (0., .25, .45, 1.):
      turns = expert.demonstrations(
          world, train_questions, search, np.random.default_rng(0), noise)
      scores[noise] = exact_match(train_questions, turns)
      right = [f'> {q.answers[0]} <' in t[-1] for q, t in zip(train_questions, turns)]
      print(f'expert, noise {noise}: {scores[noise]:.3f}', by_hops(train_questions, right))
    assert scores[0.] >= .98 and .4 < scores[.25] < .8
    assert .3 < scores[.45] < .55 and scores[1.] < .3

  def test_every_error_is_visible_and_every_reading_faithful(self, world, search, train_questions):
    shown, calls = {}, []
    def recording(queries):
      found = search(queries)
      calls.append(len(queries))
      shown.update(zip(queries, found))
      return found
    demos = expert.demonstrations(
        world, train_questions, recording, np.random.default_rng(0), .6)
    assert len(calls) == 3 and calls[0] == 512          # one batch a hop
    kinds = collections.Counter()
    for q, turns in zip(train_questions, demos):
      query, asked, known = None, None, q.meta['start']
      for i, turn in enumerate(turns):
        first, relation, value, after, next_one, next_query, answer = TURN.fullmatch(turn).groups()
        assert (first is None) == bool(i) and after == relation
        assert (next_one == 'done') == bool(answer)
        wanted = first or next_one
        if i:
          assert any((relation, value) in world.facts[p.uid] for p in shown[query])
          known = value
          kinds['other fact'] += relation != asked
        if answer:
          assert i + 1 == len(turns) and answer == value
          kinds['stop'] += i < q.meta['hops']
          continue
        *words, named = next_query.split()
        assert named == wanted and set(words) <= set(known.split())
        kinds['half'] += len(words) == 1
        kinds['relation'] += wanted != q.meta['relations'][i]
        query, asked = next_query, wanted
    print(dict(kinds))
    assert all(kinds[kind] > 20 for kind in ('other fact', 'stop', 'half', 'relation'))

  def test_redrawn_questions_get_their_own_names(self, world, search, train_questions):
    mapping = envs.rename(world, np.random.default_rng(0))
    plain = train_questions[:40]
    redrawn = [text_of.redraw_question(q, mapping) for q in plain]
    first, second = (expert.demonstrations(world, qs, search, np.random.default_rng(3), .3)
                     for qs in (plain, redrawn))
    assert second == tuple(
        tuple(text_of.apply_names(mapping, t) for t in turns) for turns in first) != first
    clean = expert.demonstrations(world, redrawn, search, np.random.default_rng(3), 0.)
    assert exact_match(redrawn, clean) >= .95

  def test_famous_questions_are_answered_by_heart(self, world, train_questions):
    def search(queries):
      raise AssertionError(f'searched for {queries}')
    questions = envs.famous_questions(world)
    demos = expert.demonstrations(world, questions, search, np.random.default_rng(0), 1.)
    for q, turns in zip(questions, demos, strict=True):
      (relation,), answer = q.meta['relations'], q.answers[0]
      assert turns == (f'<think> the {relation} is {answer} after {relation} done </think>'
                       f'<answer> {answer} </answer>',)

  @pytest.mark.parametrize('budget', [1, 2])
  def test_respects_the_search_budget(self, world, search, train_questions, budget):
    demos = expert.demonstrations(
        world, train_questions[:60], search, np.random.default_rng(0), 0., max_searches=budget)
    for q, turns in zip(train_questions, demos):
      assert len(turns) == min(q.meta['hops'], budget) + 1
      assert f'<answer> {q.meta["entities"][len(turns) - 1]} </answer>' in turns[-1]

  def test_same_generator_same_turns(self, world, search, train_questions):
    first, second, other = (
        expert.demonstrations(world, train_questions[:60], search, np.random.default_rng(s), .5)
        for s in (0, 0, 1))
    assert first == second != other

  def test_errors(self, world, search, train_questions):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match='noise=1.5'):
      expert.demonstrations(world, train_questions, search, rng, 1.5)
    with pytest.raises(ValueError, match='max_searches=0'):
      expert.demonstrations(world, train_questions, search, rng, 0., max_searches=0)
    with pytest.raises(ValueError, match='found no passage'):
      expert.demonstrations(world, train_questions, lambda queries: [()] * len(queries), rng, 0.)
    assert expert.demonstrations(world, [], search, rng, 0.) == ()


class TestRead:

  def test_order_of_preference(self, world):
    film, other = (next(i for i in range(k, 1000) if world.types[i] == 0) for k in (0, 500))
    company = next(i for i in range(1000) if world.types[i] == 2)
    p, q, c = (world.passages[i] for i in (film, other, company))
    def facts(passage): return dict(world.facts[passage.uid])
    # Its own passage, wherever it stands.
    assert expert.read(world, (q, p), 'studio', p.title) == ('studio', facts(p)['studio'])
    # Its own passage although another one states the relation.
    assert expert.read(world, (c, p), 'founder', p.title) == world.facts[p.uid][0]
    # Not there, or only half a name known: the first that states the relation.
    assert expert.read(world, (c, q), 'studio', p.title) == ('studio', facts(q)['studio'])
    assert expert.read(world, (c, q, p), 'studio', '') == ('studio', facts(q)['studio'])
    # Nobody states it: the first fact shown.
    assert expert.read(world, (c, q), 'mayor', '') == world.facts[c.uid][0]
