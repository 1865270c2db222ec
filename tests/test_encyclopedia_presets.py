"""The presets `standard` and `hard`: who can answer their questions, and who cannot.

The scripted agent reads the texts of passages, not the world's tables.  It searches with BM25, title weight 2, and
reads the best K = 3 passages.
"""
from __future__ import annotations

import collections
import re
import time

import numpy as np
import pytest

import fakes
from rlsearch.data import normalize, tokenizer
from rlsearch.envs import encyclopedia as envs, encyclopedia_kinds as kinds_of, encyclopedia_text as text_of
from rlsearch.envs import environments, expert, judge, retrieval
from rlsearch.protocols.search_r1 import TAGS, search_r1

K = 3
PRESETS = ('standard', 'hard')
RELATIONS = (*text_of.RELATIONS, *text_of.YEAR_RELATIONS)
NAME, YEAR = r'[A-Z][a-z]+ [A-Z][a-z]+', r'\d\d'
KINDS = [('chain', 1), ('chain', 2), ('chain', 3), ('comparison', 2), ('intersection', 1)]
# One pattern for each relation: the sentences that state it, whatever they say of whom.
STATES = {relation.noun: re.compile('|'.join(
    template.format(subject=f'(?:{NAME})', phrase=relation.phrase, noun=relation.noun, value=f'({NAME}|{YEAR})')
    for template in text_of.TEMPLATES)) for relation in RELATIONS}


def kind(question):
  return question.meta['type'], question.meta['hops']


def stated(passage, noun):
  """What the passage's text says that its entity's relation is; '' if it says nothing."""
  found = STATES[noun].search(passage.text)
  return next(value for value in found.groups() if value) if found else ''


def called(passage):
  """The names of the entity that the passage is about."""
  also = re.search(f'{NAME} is also called ({NAME})', passage.text)
  return (passage.title, also[1]) if also else (passage.title,)


def scripted_agent(question, search, k=K, rule=True):
  """The answer of an agent that is handed the gold sub-questions; for chains it asks about what it has read itself.

  With the rule it passes over rumours; without, it believes the first passage that says anything.
  """
  meta, seen = question.meta, []
  for i, (asked, noun) in enumerate(zip(meta['sub_questions'], meta['relations'])):
    if i and meta['type'] == 'chain':
      asked = f'{seen[-1]} {noun}'
    found = search([asked], k)[0]
    if rule:
      found = [p for p in found if not p.text.startswith('rumour says')]
    if meta['type'] == 'intersection':
      read = [p.title for p in found if all(stated(p, n) == v for n, v in zip(noun.split(), meta['clues']))]
    else:
      read = [stated(p, noun) for p in found if asked[:-len(noun) - 1] in called(p) and stated(p, noun)]
    seen.append(read[0] if read else '')
  if meta['type'] != 'comparison':
    return seen[-1]
  best = min(seen) if meta['direction'] == 'earlier' else max(seen)            # two digits each
  return meta['entities'][seen.index(best)] if all(seen) else ''


def right(question, answer):
  return normalize.exact_match(answer, question.answers)


def by_kind(questions, marks):
  """Share of marks over all questions and for each kind, for printing."""
  shares = {'all': float(np.mean(marks))}
  return shares | {k: float(np.mean([m for q, m in zip(questions, marks) if kind(q) == k])) for k in KINDS}


def searcher(world):
  return retrieval.bm25(world.passages, title_weight=2).search


@pytest.fixture(scope='module')
def worlds():
  return {preset: envs.make_world(0, preset=preset) for preset in PRESETS}


@pytest.fixture(scope='module')
def searches(worlds):
  return {preset: searcher(world) for preset, world in worlds.items()}


@pytest.fixture(scope='module')
def standard(worlds):
  return worlds['standard']


@pytest.fixture(scope='module')
def hard(worlds):
  return worlds['hard']


@pytest.fixture(scope='module')
def asked(standard):
  """Test questions, 100 of each kind."""
  return envs.draw_questions(standard, 'test', 500, np.random.default_rng(1))


@pytest.fixture(scope='module')
def taught(standard):
  """Train questions, 200 of each kind."""
  return envs.draw_questions(standard, 'train', 1000, np.random.default_rng(2))


class TestBytes:

  @pytest.mark.parametrize('preset', PRESETS)
  def test_same_seed_same_bytes(self, preset):
    def made(seed):
      world = envs.make_world(seed, 200, preset)
      drawn = [envs.draw_questions(world, split, 20, np.random.default_rng(5)) for split in envs.SPLITS]
      return repr((world.passages, world.facts, world.aliases, world.years.tolist(), drawn, envs.world_text(world, 50)))
    assert made(3) == made(3) != made(4)

  def test_hard_is_standard_with_rumours(self, standard, hard, asked):
    assert hard.passages[:1000] == standard.passages and len(standard.passages) == 1000
    assert envs.draw_questions(hard, 'test', 500, np.random.default_rng(1)) == asked
    assert len({p.uid for p in hard.passages}) == len(hard.passages) == len(hard.facts)

  def test_demo_has_none_of_it(self):
    world = envs.make_world(0, 200)
    assert not len(world.years) and not world.aliases and len(world.passages) == 200
    assert not set(' '.join(p.text for p in world.passages).split()) & {'also', 'rumour', 'release'}
    assert {q.meta['type'] for q in envs.draw_questions(world, 'test', 60, np.random.default_rng(0))} == {'chain'}

  @pytest.mark.parametrize('preset', PRESETS)
  @pytest.mark.parametrize('num', [200, 202, 404])
  def test_small_worlds(self, preset, num):
    world = envs.make_world(1, num, preset)
    for split, share in (('train', 300), ('validation', 20), ('test', 120)):
      questions = envs.draw_questions(world, split, share, np.random.default_rng(0))
      assert len({q.uid for q in questions}) == len({q.text for q in questions}) == share

  def test_subworlds_are_closed_and_values_of_the_right_type_and_never_the_entity(self, standard):
    for members in standard.members.values():
      assert np.isin(standard.values[members], members).all()
    for entity, values in enumerate(standard.values):
      for slot, value in enumerate(values):
        relation = text_of.RELATIONS[2 * standard.types[entity] + slot]
        assert text_of.TYPES[standard.types[value]] == relation.value and value != entity

  def test_no_hubs(self, standard):
    for split, members in standard.members.items():
      for r in range(len(text_of.RELATIONS)):
        subjects = members[standard.types[members] == r // 2]
        degree = np.bincount(standard.values[subjects, r % 2])
        assert degree.max() <= (1 if split == 'famous' else 3)

  def test_too_small_a_subworld(self):
    with pytest.raises(ValueError, match='12 validation entities .*wanted at least 16 or none'):
      envs.make_world(0, 120, 'standard')

  @pytest.mark.slow
  @pytest.mark.parametrize('preset', PRESETS)
  def test_100000_entities(self, preset):
    start = time.perf_counter()
    world = envs.make_world(0, 100_000, preset)
    questions = envs.draw_questions(world, 'test', 500, np.random.default_rng(0))
    seconds = time.perf_counter() - start
    search = searcher(world)
    marks = [right(q, scripted_agent(q, search)) for q in questions]
    print(f'{preset}, 100,000 entities: {seconds:.1f} s;', by_kind(questions, marks))
    assert seconds < 60 and np.mean(marks) >= .98


class TestQuestions:

  @pytest.mark.parametrize('preset', PRESETS)
  @pytest.mark.parametrize('split, num', [('train', 1003), ('validation', 252), ('test', 512)])
  def test_equal_shares_of_distinct_questions(self, worlds, preset, split, num):
    questions = envs.draw_questions(worlds[preset], split, num, np.random.default_rng(0))
    assert len({q.uid for q in questions}) == len({q.text for q in questions}) == num
    counts = collections.Counter(map(kind, questions))
    assert sorted(counts) == KINDS and max(counts.values()) - min(counts.values()) <= 1

  def test_sub_questions_are_answered_by_the_gold_passages(self, standard, asked, taught):
    own = {p.uid: p for p in standard.passages}
    for q in (*asked, *taught):
      meta = q.meta
      parts = [meta[entry] for entry in ('gold_passages', 'sub_questions', 'sub_answers', 'relations')]
      assert {len(part) for part in parts} == {meta['hops']} and not meta['famous']
      for uid, sub, answer, noun in zip(*parts):
        passage = own[uid]
        assert sub.endswith(f' {noun}')
        if meta['type'] == 'intersection':
          assert sub == f'{meta["clues"][0]} {meta["clues"][1]} {noun}' and answer == passage.title
          assert [stated(passage, n) for n in noun.split()] == list(meta['clues'])
        else:
          assert sub[:-len(noun) - 1] in called(passage) and stated(passage, noun) == answer
      if meta['type'] == 'chain':
        following = zip(meta['sub_answers'], meta['relations'][1:])
        assert meta['sub_questions'][1:] == tuple(f'{answer} {noun}' for answer, noun in following)

  def test_splits_share_no_entity(self, standard, asked, taught):
    test, train = ({x for q in qs for x in (*q.meta['entities'], *q.meta['gold_passages'])} for qs in (asked, taught))
    assert not test & train
    for split, questions in (('test', asked), ('train', taught)):
      members = {standard.names[i] for i in standard.members[split]}
      assert all(set(q.meta['entities']) <= members for q in questions)

  @pytest.mark.parametrize('preset', PRESETS)
  @pytest.mark.parametrize('seed', range(4))
  def test_the_scripted_agent_answers(self, preset, seed):
    world = envs.make_world(seed, preset=preset)
    questions, search = envs.draw_questions(world, 'test', 500, np.random.default_rng(1)), searcher(world)
    shares = {}
    for k in (1, 2, K):
      shares[k] = by_kind(questions, [right(q, scripted_agent(q, search, k)) for q in questions])
      print(f'scripted agent, {preset}, seed {seed}, best {k}: {shares[k]}')
    assert shares[K]['all'] >= .98 and min(shares[K].values()) >= .9

  def test_one_search_and_an_oracle_reader_do_not_answer_chains(self, standard, searches, asked):
    long = [q for q in asked if kind(q) == ('chain', 3)]
    found = searches['standard']([q.text for q in long], K)
    marks = [any(stated(p, q.meta['relations'][-1]) in q.answers for p in passages) for q, passages in zip(long, found)]
    assert np.mean(marks) < .2

  def test_the_oracle_judge_likes_the_gold_queries(self, asked):
    for q in asked[:200]:
      turns = [fakes.turn(f'<search> {sub} </search>') for sub in q.meta['sub_questions']]
      assert judge.judge_query(q, turns[:1]) == 1


def guessers(world, seen, split='test'):
  """Answers from the question alone, by name: they know the split's entities, and the answers of the questions seen."""
  counts = collections.defaultdict(collections.Counter)
  for q in seen:
    for feature in (q.meta['type'], (q.meta['type'], q.meta['relations'][-1]), *q.text.split()):
      counts[feature][q.answers[0]] += 1
  bags = [set(q.text.split()) for q in seen]
  members = [int(i) for i in world.members[split]]
  mentioned = collections.Counter(
      world.entity[value] for facts in world.facts.values() for _, value in facts if not value.isdigit())
  ranked = sorted(members, key=lambda i: (-mentioned[i], i))
  names = [(frozenset(name.split()), name) for name, i in world.entity.items() if i in set(members)]
  best = lambda *features: next((counts[f].most_common(1)[0][0] for f in features if f in counts), '')
  inside = lambda q: [n for n in re.findall(NAME, q.text) if n in world.entity]
  sort = lambda q: world.types[world.entity[q.answers[0]]]                     # of the answer, which a reader may infer
  def voted(q):
    votes = collections.Counter()
    for word in re.findall('[A-Z][a-z]+', q.text):
      votes.update(counts.get(word, ()))
    return votes
  return {
      'frequent answer of the type': lambda q: best(q.meta['type']),
      'frequent answer of the relation': lambda q: best((q.meta['type'], q.meta['relations'][-1]), q.meta['type']),
      'votes of the words': lambda q: max(voted(q).items(), key=lambda one: (one[1], one[0]), default=('', 0))[0],
      'nearest question': lambda q: seen[int(np.argmax([len(set(q.text.split()) & bag) for bag in bags]))].answers[0],
      'first name': lambda q: inside(q)[0],
      'last name': lambda q: inside(q)[-1],
      'first of the alphabet': lambda q: min(inside(q)),
      'last of the mirrored alphabet': lambda q: max(inside(q), key=lambda n: n[::-1]),
      'more often mentioned': lambda q: max(inside(q), key=lambda n: (mentioned[world.entity[n]], n)),
      'more votes': lambda q: max(inside(q), key=lambda n: (voted(q)[n], n)),
      'other name that shares words': lambda q: max(
          (len(words & set(q.text.split())), n) for words, n in names if n not in q.text)[1],
      'most often mentioned of its type': lambda q: world.names[next(i for i in ranked if world.types[i] == sort(q))]}


@pytest.fixture(scope='module')
def seen(standard, asked, taught):
  """Other test questions, with their answers: more than any guesser should know; and the train questions."""
  key = lambda q: (q.meta['type'], q.meta['gold_passages'], frozenset(' '.join(q.meta['relations']).split()))
  known, others = set(map(key, asked)), envs.draw_questions(standard, 'test', 900, np.random.default_rng(9))
  return [q for q in others if key(q) not in known] + list(taught)


class TestGuessing:

  @pytest.mark.parametrize('name', ['chain', 'intersection'])
  def test_the_question_alone_does_not_answer(self, standard, asked, seen, name):
    questions = [q for q in asked if q.meta['type'] == name]
    scores = {guesser: float(np.mean([right(q, guess(q)) for q in questions]))
              for guesser, guess in guessers(standard, seen).items()}
    print(f'guessers, {name}:', {guesser: round(score, 3) for guesser, score in scores.items()})
    assert len(scores) == 12 and max(scores.values()) <= .05

  def test_no_answer_is_frequent(self, asked):
    # What no one can know: for each last relation, the most frequent answer of the very questions that are asked.
    groups, chains = collections.defaultdict(collections.Counter), [q for q in asked if q.meta['type'] == 'chain']
    for q in chains:
      groups[q.meta['relations'][-1]].update(q.answers)
    best = {noun: counter.most_common(1)[0][0] for noun, counter in groups.items()}
    assert np.mean([best[q.meta['relations'][-1]] in q.answers for q in chains]) <= .05
    answers = [q.answers for q in asked if q.meta['type'] == 'intersection']
    assert len(set(answers)) == len(answers) == 100

  def test_a_comparison_is_a_coin(self, standard, seen):
    questions = kinds_of.comparisons(standard, 'test', 4000, np.random.default_rng(3))
    table = guessers(standard, seen)
    inside = ('first name', 'last name', 'first of the alphabet', 'last of the mirrored alphabet',
              'more often mentioned', 'more votes')
    named = {name: table[name] for name in inside} | {
        'by the wording': lambda q: q.meta['entities'][('earlier' in q.text) ^ q.text.startswith('which')]}
    scores = {guesser: float(np.mean([right(q, guess(q)) for q in questions])) for guesser, guess in named.items()}
    print('guessers, comparison:', {guesser: round(score, 3) for guesser, score in scores.items()})
    assert all(.45 <= score <= .55 for score in scores.values())
    for guesser in table.keys() - named.keys():        # who names whom it was not asked about is not even a coin
      assert np.mean([right(q, table[guesser](q)) for q in questions[:100]]) <= .55, guesser


class TestComparisons:

  @pytest.mark.parametrize('split, num', [('train', 1200), ('test', 400), ('validation', 100)])
  def test_every_pair_is_asked_in_both_orders(self, standard, split, num):
    questions = kinds_of.comparisons(standard, split, num, np.random.default_rng(0))
    key = lambda q, names: (names, q.meta['direction'], q.uid[-1])
    seen = {key(q, q.meta['entities']): q for q in questions}
    assert len(seen) == num
    for q in questions:
      other = seen[key(q, q.meta['entities'][::-1])]
      assert other.answers == q.answers and other.meta['sub_answers'] == q.meta['sub_answers'][::-1]
    first = [q.meta['entities'][0] in q.answers for q in questions]
    assert sum(first) == num // 2
    words = collections.Counter((q.meta['direction'], q.uid[-1]) for q in questions)
    assert len(words) == 4 and min(words.values()) > num / 8

  def test_an_odd_number_lacks_one_counterpart(self, standard):
    questions = kinds_of.comparisons(standard, 'test', 51, np.random.default_rng(0))
    pairs = collections.Counter(frozenset(q.meta['entities']) for q in questions)
    assert len(questions) == 51 and sorted(pairs.values()) == [1] + [2] * 25

  def test_the_answer_has_the_year(self, standard):
    for q in kinds_of.comparisons(standard, 'test', 400, np.random.default_rng(0)):
      a, b = (standard.entity[name] for name in q.meta['entities'])
      assert standard.types[a] == standard.types[b] and standard.years[a] != standard.years[b]
      wanted = min if q.meta['direction'] == 'earlier' else max
      assert standard.years[standard.entity[q.answers[0]]] == wanted(standard.years[[a, b]])
      assert q.meta['sub_answers'] == (str(standard.years[a]), str(standard.years[b]))
      assert q.meta['start'] == q.meta['entities'][0]

  def test_wordings(self):
    words = 'later', 'birth', ('Ab Cd', 'Ef Gh')
    assert text_of.render_comparison(0, *words) == 'which has the later birth , Ab Cd or Ef Gh ?'
    assert text_of.render_comparison(1, *words) == 'Ab Cd or Ef Gh , which has the later birth ?'

  def test_all_pairs_and_no_more(self):
    world = envs.make_world(0, 200, 'standard')
    entities = world.members['validation']
    most = 2 * sum(world.types[a] == world.types[b] and world.years[a] != world.years[b]
                   for i, a in enumerate(entities) for b in entities[:i])
    assert len({q.uid for q in kinds_of.comparisons(world, 'validation', most, np.random.default_rng(0))}) == most
    with pytest.raises(ValueError, match=f'{most + 1} distinct validation comparisons wanted, only {most} exist'):
      kinds_of.comparisons(world, 'validation', most + 1, np.random.default_rng(0))


class TestIntersections:

  def test_exactly_one_entity_has_both_and_each_has_others(self, standard, asked, taught):
    facts = [(standard.entity[p.title], {(noun, standard.entity[value]) for noun, value in standard.facts[p.uid]
                                         if not value.isdigit()}) for p in standard.passages]
    for q in (*asked, *taught):
      if q.meta['type'] != 'intersection':
        continue
      wanted = set(zip(q.meta['relations'][0].split(), (standard.entity[clue] for clue in q.meta['clues'])))
      assert [entity for entity, of in facts if wanted <= of] == [standard.entity[q.answers[0]]] and len(wanted) == 2
      assert all(sum(fact in of for _, of in facts) >= 2 for fact in wanted)

  def test_test_questions_differ_in_the_entity_and_train_questions_also_in_the_words(self, standard):
    test = kinds_of.intersections(standard, 'test', 200, np.random.default_rng(0))
    assert len({q.answers for q in test}) == 200
    assert len({(q.text.split()[0] == 'which', q.meta['relations']) for q in test}) == 16
    train = kinds_of.intersections(standard, 'train', 1080, np.random.default_rng(0))
    assert len({q.text for q in train}) == 1080 > len({q.answers for q in train})

  def test_wordings(self):
    words = ('director', 'studio'), ('Ab Cd', 'Ef Gh')
    assert text_of.render_intersection(0, 'film', *words) == 'which film has director Ab Cd and studio Ef Gh ?'
    assert text_of.render_intersection(1, 'film', *words) == 'director Ab Cd and studio Ef Gh , which film is it ?'

  def test_more_than_exist(self, standard):
    with pytest.raises(ValueError, match='401 distinct test intersections wanted, only'):
      kinds_of.intersections(standard, 'test', 401, np.random.default_rng(0))


class TestAliases:

  def test_a_share_of_entities_has_one_that_its_passage_states(self, standard):
    assert len(standard.aliases) == round(.25 * 988) and not set(standard.aliases) & set(standard.members['famous'])
    for entity, alias in standard.aliases.items():
      passage = standard.passages[entity]
      assert passage.text.startswith(f'{standard.names[entity]} is also called {alias} .')
      assert called(passage) == (standard.names[entity], alias) and standard.entity[alias] == entity
    others = [p for i, p in enumerate(standard.passages) if i not in standard.aliases]
    assert not any('also called' in p.text for p in others)

  def test_no_two_names_have_the_same_words(self, standard):
    names = [*standard.names, *standard.aliases.values()]
    assert len({frozenset(n.split()) for n in names}) == len(names) and all(len(set(n.split())) == 2 for n in names)

  def test_passages_mention_entities_by_either_name(self, standard):
    said = collections.Counter()
    for facts in standard.facts.values():
      for _, value in facts:
        if not value.isdigit() and standard.entity[value] in standard.aliases:
          said[value in standard.aliases.values()] += 1
    assert .4 < said[True] / said.total() < .6 and said.total() > 300

  def test_every_name_of_the_answer_is_right_and_no_other(self, standard, asked):
    seen = 0
    for q in asked:
      entity = standard.entity[q.answers[0]]
      names = {standard.names[entity], standard.aliases.get(entity, standard.names[entity])}
      assert set(q.answers) == names and len(q.answers) == len(names)
      assert all(right(q, name) for name in names) and not right(q, standard.names[entity - 1])
      seen += len(names) == 2
    assert .15 < seen / len(asked) < .35

  def test_chains_go_on_from_an_alias(self, standard, asked, searches):
    through = [q for q in asked if q.meta['type'] == 'chain' and any(
        answer in standard.aliases.values() for answer in q.meta['sub_answers'][:-1])]
    assert len(through) > 20
    assert np.mean([right(q, scripted_agent(q, searches['standard'])) for q in through]) >= .98


class TestTwins:

  @staticmethod
  def of(world):
    """Entities, by entity, that share a word at the same place, of one type and subworld."""
    found = collections.defaultdict(set)
    for members in (m for split, m in world.members.items() if split != 'famous'):
      groups = collections.defaultdict(list)
      for entity in members.tolist():
        for place, word in enumerate(world.names[entity].split()):
          groups[world.types[entity], place, word].append(entity)
      for group in groups.values():
        for entity in group:
          found[entity] |= set(group) - {entity}
    return {entity: twins for entity, twins in found.items() if twins}

  @pytest.mark.parametrize('num', [200, 1000])
  def test_half_of_the_entities_have_one(self, num):
    world = envs.make_world(0, num, 'standard')
    twins = self.of(world)
    for split in envs.SPLITS:
      members = world.members[split]
      share = np.mean([int(entity) in twins for entity in members])
      print(f'{num} entities, {split}: {share:.2f} have a near-duplicate')
      assert share >= .5

  def test_half_a_name_finds_the_wrong_one(self, standard, searches):
    twins, wrong, full = self.of(standard), [], []
    for entity, others in list(twins.items())[:400]:
      own = standard.names[entity].split()
      shared = next(w for o in others for w, v in zip(own, standard.names[o].split()) if w == v)
      noun = text_of.YEAR_RELATIONS[standard.types[entity]].noun
      sloppy, exact = searches['standard']([f'{shared} {noun}', f'{standard.names[entity]} {noun}'], 1)
      wrong.append(sloppy[0].title != standard.names[entity])
      full.append(exact[0].title == standard.names[entity])
    print(f'near-duplicates: half the name finds another one first in {np.mean(wrong):.2f}, the whole name the right '
          f'one in {np.mean(full):.2f}')
    assert np.mean(wrong) >= .5 and np.mean(full) >= .95


class TestRumours:

  def test_the_rule_finds_them_all_and_nothing_else(self, hard):
    marked = [p for p in hard.passages if p.text.startswith('rumour says')]
    assert [p.uid for p in marked] == [p.uid for p in hard.passages if p.uid.startswith('rumour-')]
    assert .2 * 988 < len(marked) <= .3 * 988 and len({p.title for p in marked}) == len(marked)
    assert hard.passages[-1] == text_of.RULE and hard.facts['rule'] == ()
    assert 'a passage that begins with rumour says is false' in text_of.RULE.text

  def test_all_that_they_state_is_false_and_another_passage_has_the_truth(self, hard):
    famous = {hard.names[i] for i in hard.members['famous']}
    for passage in hard.passages:
      if not passage.text.startswith('rumour says'):
        continue
      entity = hard.entity[passage.title]
      own = hard.passages[entity]
      assert own.title == passage.title not in famous and not own.text.startswith('rumour')
      facts = hard.facts[passage.uid]
      assert len(facts) == 3 == len({noun for noun, _ in facts})
      for noun, value in facts:
        assert stated(passage, noun) == value and passage.title in passage.text
        true = stated(own, noun)
        assert true and (value != true if value.isdigit() else hard.entity[value] != hard.entity[true])

  @pytest.mark.parametrize('seed', range(2))
  def test_who_ignores_the_rule_is_wrong_in_a_quarter_of_the_questions(self, seed):
    world = envs.make_world(seed, preset='hard')
    questions, search = envs.draw_questions(world, 'test', 500, np.random.default_rng(1)), searcher(world)
    follow, ignore = ([scripted_agent(q, search, rule=rule) for q in questions] for rule in (True, False))
    misled = [bool(naive) and right(q, told) and not right(q, naive)
              for q, told, naive in zip(questions, follow, ignore)]
    shares = by_kind(questions, misled)
    print(f'hard, seed {seed}: right with the rule and misled without: {shares}')
    assert .2 <= shares['all'] <= .35 and all(share >= .03 for share in shares.values())
    assert np.mean([right(q, a) for q, a in zip(questions, follow)]) >= .98

  def test_a_chain_is_led_to_what_the_rumour_states(self, hard, searches, asked):
    rumours = {p.title: p for p in hard.passages if p.text.startswith('rumour says')}
    led = [q for q in asked if kind(q) == ('chain', 1) and q.meta['start'] in rumours]
    told = [scripted_agent(q, searches['hard'], rule=False) == stated(rumours[q.meta['start']], q.meta['relations'][0])
            for q in led]
    assert len(led) > 20 and np.mean(told) > .6


class TestRedraw:

  @pytest.mark.parametrize('preset', PRESETS)
  def test_maps_every_kind_consistently(self, worlds, preset, asked, searches):
    world = worlds[preset]
    mapping = envs.rename(world, np.random.default_rng(0))
    apply, seen = (lambda text: text_of.apply_names(mapping, text)), set()
    for q in asked[:150]:
      new = text_of.redraw_question(q, mapping)
      assert new.text == apply(q.text) != q.text and text_of.apply_names(new.meta['names_back'], new.text) == q.text
      assert new.answers == tuple(map(apply, q.answers)) and new.meta['start'] == apply(q.meta['start'])
      for entry in ('entities', 'sub_questions', 'sub_answers', 'clues'):
        assert (entry in new.meta) == (entry in q.meta)
        assert new.meta.get(entry, ()) == tuple(map(apply, q.meta.get(entry, ())))
      same = ('gold_passages', 'relations', 'hops', 'type', 'famous', 'direction')
      assert all(new.meta.get(entry) == q.meta.get(entry) for entry in same)
      if q.meta['type'] == 'comparison':
        assert new.meta['sub_answers'] == q.meta['sub_answers']
      def search(queries, k, names=new.meta['names'], back=new.meta['names_back']):
        found = searches[preset]([text_of.apply_names(back, query) for query in queries], k)
        return [[p._replace(title=text_of.apply_names(names, p.title), text=text_of.apply_names(names, p.text))
                 for p in hits] for hits in found]
      assert scripted_agent(new, search) == apply(scripted_agent(q, searches[preset]))
      seen.add(kind(q))
    assert len(seen) == 5

  def test_environment_redraws_in_blocks_of_a_kind(self):
    env = environments.embedded(
        preset='hard', seed=0, num_entities=200, num_famous=12, num_train=200, num_validation=20, num_test=30,
        redraw_names=True, block=4, demonstrations=None)
    questions = [env.train.get(position) for position in range(80)]
    assert [kind(q) for q in questions] == [KINDS[position // 4 % 5] for position in range(80)]
    assert all(q.meta['tool_options']['names'] == q.meta['names'] for q in questions)
    assert len({q.uid for q in questions}) == 80


TURN = re.compile(r'<think> (?:take (?P<take>\w+(?: \w+)?)|the (?P<read>\w+) is (?P<value>[\w ]+?) '
                  r'after (?P<after>\w+(?: \w+)?) (?P<next>done|\w+(?: [A-Z]\w+)?)'
                  r'(?: the (?P<direction>earlier|later) is (?P<best>[\w ]+) of (?P<owner>[\w ]+))?) </think>'
                  r'(?:<search> (?P<query>[\w ]+) </search>|<answer> (?P<answer>[\w ]+) </answer>)')


class TestDemonstrations:

  def demos(self, world, questions, search, noise, seed=0, k=K, **entries):
    rng = np.random.default_rng(seed)
    return expert.demonstrations(world, questions, lambda queries: search(queries, k), rng, noise, **entries)

  def test_clean_expert_word_for_word(self, standard, searches, taught):
    q = next(q for q in taught if q.meta['type'] == 'comparison')
    (x, y), (a, b), noun, way = q.meta['entities'], q.meta['sub_answers'], q.meta['relations'][0], q.meta['direction']
    best = (min if way == 'earlier' else max)(a, b)
    name = (x, y)[(a, b).index(best)]
    assert self.demos(standard, [q], searches['standard'], 0.)[0] == (
        f'<think> take {noun} </think><search> {x} {noun} </search>',
        f'<think> the {noun} is {a} after {x} {y} </think><search> {y} {noun} </search>',
        f'<think> the {noun} is {b} after {y} done the {way} is {best} of {name} </think><answer> {name} </answer>')
    q = next(q for q in taught if q.meta['type'] == 'intersection')
    (x, y), (r, s), z = q.meta['clues'], q.meta['relations'][0].split(), q.meta['sub_answers'][0]
    what = text_of.TYPES[standard.types[standard.entity[z]]]
    assert self.demos(standard, [q], searches['standard'], 0.)[0] == (
        f'<think> take {r} {s} </think><search> {x} {y} {r} {s} </search>',
        f'<think> the {what} is {z} after {r} {s} done </think><answer> {z} </answer>')

  @pytest.mark.parametrize('preset', PRESETS)
  def test_exact_match_by_noise(self, worlds, searches, preset, taught):
    scores = {}
    for noise in (0., .45, 1.):
      turns = self.demos(worlds[preset], taught, searches[preset], noise)
      marks = [right(q, TURN.fullmatch(texts[-1])['answer']) for q, texts in zip(taught, turns)]
      scores[noise] = by_kind(taught, marks)
      print(f'expert, {preset}, noise {noise}:', {k: round(v, 3) for k, v in scores[noise].items()})
    assert scores[0.]['all'] >= .97 and .35 < scores[.45]['all'] < .65 and scores[1.]['all'] < .35

  @pytest.mark.parametrize('preset', PRESETS)
  def test_every_error_is_visible_and_every_reading_faithful(self, worlds, searches, preset, taught):
    world, questions = worlds[preset], taught[:500]
    for q, turns in zip(questions, self.demos(world, questions, searches[preset], .6)):
      shown, reads = [], []
      for i, turn in enumerate(turns):
        said = TURN.fullmatch(turn)
        assert said, turn
        assert (said['take'] is not None) == (i == 0) and (said['answer'] is not None) == (i == len(turns) - 1)
        if i:
          believed = [p for p in shown if not p.text.startswith('rumour says')] or shown
          noun, value = said['read'], said['value']
          if q.meta['type'] == 'intersection':
            assert any(p.title == value for p in believed) and noun == text_of.TYPES[world.types[world.entity[value]]]
          else:
            assert any(stated(p, noun) == value for p in believed)
          reads.append(value)
        if said['query']:
          shown = searches[preset]([said['query']], K)[0]
      assert (said['direction'] is not None) == (q.meta['type'] == 'comparison') and said['next'] == 'done'
      if said['direction']:
        years = [r for r in reads if r.isdigit()] or reads[:1]
        best = min(years) if q.meta['direction'] == 'earlier' else max(years)
        assert said['direction'] == q.meta['direction'] and said['best'] == best
        assert said['owner'] == said['answer'] == q.meta['entities'][reads.index(best)]
      else:
        assert said['answer'] == reads[-1]

  def test_rumours_are_passed_over_unless_there_is_nothing_else(self, hard):
    false = next(p for p in hard.passages if p.text.startswith('rumour says'))
    entity = hard.entity[false.title]
    own, noun = hard.passages[entity], hard.facts[false.uid][0][0]
    assert expert.read(hard, (false, own), noun, false.title) == (noun, stated(own, noun))
    assert expert.read(hard, (false, text_of.RULE, own), noun, '') == (noun, stated(own, noun))
    assert expert.read(hard, (false, text_of.RULE), noun, '') == hard.facts[false.uid][0]
    clues = [(n, v) for n, v in hard.facts[false.uid] if not v.isdigit()]
    truth = next(p for p in hard.passages if set(clues) <= set(hard.facts[p.uid]) and p.uid.startswith('entity'))
    assert expert.read_entity(hard, (false, own, truth), clues)[1] == truth.title != false.title
    assert expert.read_entity(hard, (false,), clues)[1] == false.title
    with pytest.raises(ValueError, match="no passage with a fact, only .'rule'.: "[:-2]):
      expert.read(hard, (text_of.RULE,), noun, '')

  def test_redrawn_questions_get_their_own_names(self, hard, searches, taught):
    mapping = envs.rename(hard, np.random.default_rng(0))
    plain = taught[:60]
    redrawn = [text_of.redraw_question(q, mapping) for q in plain]
    first, second = (self.demos(hard, qs, searches['hard'], .4, seed=3) for qs in (plain, redrawn))
    assert second == tuple(tuple(text_of.apply_names(mapping, t) for t in turns) for turns in first) != first
    clean = self.demos(hard, redrawn, searches['hard'], 0.)
    assert np.mean([right(q, TURN.fullmatch(t[-1])['answer']) for q, t in zip(redrawn, clean)]) >= .95

  @pytest.mark.parametrize('budget', [1, 2])
  def test_respects_the_search_budget(self, standard, searches, taught, budget):
    demos = self.demos(standard, taught[:100], searches['standard'], 0., max_searches=budget)
    for q, turns in zip(taught, demos):
      assert len(turns) == min(q.meta['hops'], budget) + 1

  def test_works_with_one_passage_a_search(self, hard, searches, taught):
    for turns in self.demos(hard, taught[:300], searches['hard'], .5, k=1):
      assert all(TURN.fullmatch(turn) for turn in turns)

  def test_famous_questions_are_answered_by_heart(self, hard):
    for q, turns in zip(envs.famous_questions(hard), self.demos(hard, envs.famous_questions(hard), None, 1.)):
      assert len(turns) == 1 and right(q, TURN.fullmatch(turns[0])['answer'])


class TestTokens:

  @pytest.mark.parametrize('preset', PRESETS)
  def test_words_are_whole_and_everything_fits(self, preset):
    env = environments.embedded(
        preset=preset, seed=0, num_entities=1000, num_famous=12, num_train=1000, num_validation=100, num_test=100,
        redraw_names=True, block=8, demonstrations=dict(
            noise=.45, clean_positions=0, famous_every=25, topk=K, title_weight=2, max_searches=3))
    world, tags = envs.make_world(0, preset=preset), [f'<{s}{tag}>' for tag in TAGS for s in ('', '/')]
    tok = tokenizer.train_sentencepiece(env.text(), vocab_size=1000, symbols=[*tags, '\n'], path=None)
    size = lambda text: len(tok.encode(text))
    words = (*text_of.template_words(), *text_of.more_words(), *world.name_words, *world.famous_words)
    assert [word for word in words if size(' ' + word) != 1] == []
    protocol = search_r1(max_searches=3, prompt='question')
    assert max(size(' ' + p.title + ' : ' + p.text) for p in env.passages) <= 40
    for q in map(env.train.get, range(300)):
      assert size(protocol.prompts(q)[0]) <= 40 and max(map(size, q.meta['demonstration'])) <= 32

  def test_the_text_has_no_other_words(self, hard):
    words = *text_of.template_words(), *text_of.more_words(), *hard.name_words, *hard.famous_words
    known = {*words, *map(str, range(10, 100))}
    for line in envs.world_text(hard):
      assert set(line.split()) <= known
    assert not {w.lower() for w in hard.name_words} & known
