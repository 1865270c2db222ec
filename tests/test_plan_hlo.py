"""The reader of compiled programs: by hand on a few lines, and on two whole programs that compilers wrote."""
from __future__ import annotations

import pathlib

import pytest

from rlsearch.plan import hlo

GOLDEN = pathlib.Path(__file__).parent / 'golden'

# A loop of ten turns by steps of two from four on, an all-reduce in it, one behind it, one in a fusion.
LOOP = '''HloModule m, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[], f32[8]{0}, /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="jit(f)/psum"}
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %y, %n)
}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = LIMIT
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%inside (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %z = f32[8]{0} all-reduce(%r), replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (x0: f32[8]) -> f32[8] {
  %x0 = f32[8]{0} parameter(0)
  %four = s32[] constant(4)
  %count = s32[] constant(24)
  %start = (s32[], f32[8]{0}, s32[]) tuple(%four, %x0, %count)
  %loop = (s32[], f32[8]{0}, s32[]) while(%start), condition=%condition, body=%body
  %out = f32[8]{0} get-tuple-element(%loop), index=1
  %last = (f32[8]{0}, f32[16]{0}) all-gather-start(%out), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %gathered = f32[16]{0} all-gather-done(%last)
  ROOT %fused = f32[8]{0} fusion(%out), kind=kLoop, calls=%inside
}
'''
CONSTANT, CARRIED = 's32[] constant(24)', 's32[] get-tuple-element(%q), index=2'


def loop(limit):
  parts = hlo.computations(LOOP.replace('LIMIT', limit))
  return parts['main'].instructions['loop'], parts['main'], parts


class TestComputations:

  def test_names_entry_and_roots(self):
    parts = hlo.computations(LOOP.replace('LIMIT', CONSTANT))
    assert list(parts) == ['add', 'body', 'condition', 'inside', 'main']
    assert [c.name for c in parts.values() if c.entry] == ['main']
    assert parts['body'].root.op == 'tuple' and parts['condition'].root.name == 'less'

  def test_parts_of_a_line(self):
    one = hlo.computations(LOOP.replace('LIMIT', CONSTANT))['body'].instructions['y']
    assert (one.type, one.op, one.operands, one.root) == ('f32[8]{0}', 'all-reduce', '%x', False)
    assert 'to_apply=%add' in one.attributes

  def test_attributes_of_several_lines_end_no_computation(self):
    text = LOOP.replace('LIMIT', CONSTANT).replace(
        'calls=%inside',
        'calls=%inside, frontend_attributes={kernel_metadata={\n"a":"{}"\n}}, metadata={op_name="far"}')
    fused = hlo.computations(text)['main'].instructions['fused']
    assert fused.root and 'op_name="far"' in fused.attributes

  def test_an_open_bracket_is_an_error(self):
    with pytest.raises(ValueError, match='nothing closes'):
      hlo.computations('ENTRY %e (a: f32[]) -> f32[] {\n  %a = f32[] parameter(0\n}\n')


class TestTripCount:

  @pytest.mark.parametrize('limit', [CONSTANT, CARRIED])
  def test_from_start_limit_and_step(self, limit):
    assert hlo.trip_count(*loop(limit)) == 10                # 4, 6, ..., 22

  def test_what_the_compiler_says_comes_first(self):
    one, around, parts = loop(CONSTANT)
    said = one._replace(attributes=one.attributes + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.trip_count(said, around, parts) == 7

  def test_an_end_included(self):
    text = LOOP.replace('LIMIT', CONSTANT).replace('direction=LT', 'direction=LE')
    parts = hlo.computations(text)
    assert hlo.trip_count(parts['main'].instructions['loop'], parts['main'], parts) == 11

  @pytest.mark.parametrize('old, new', [
      ('%four = s32[] constant(4)', '%four = s32[] parameter(1)'),               # begins anywhere
      ('%next = s32[] add(%i, %two)', '%next = s32[] multiply(%i, %two)'),       # grows otherwise
      ('%less = pred[] compare(%j, %limit), direction=LT', '%less = pred[] and(%j, %limit)')])
  def test_none_where_the_text_does_not_say(self, old, new):
    text = LOOP.replace('LIMIT', CONSTANT)
    assert old in text
    parts = hlo.computations(text.replace(old, new))
    assert hlo.trip_count(parts['main'].instructions['loop'], parts['main'], parts) is None


class TestArrayBytes:

  @pytest.mark.parametrize('kind, wanted', [
      ('f32[8]{0}', [32]), ('pred[]', [1]), ('bf16[2,3,5]{2,1,0:T(8,128)(2,1)S(1)}', [60]),
      ('(s32[], f32[4,4]{1,0}, /*index=2*/u8[3])', [4, 64, 3]), ('token[]', [0]), ('f8e4m3fn[4]', [4])])
  def test_of_types_as_written(self, kind, wanted):
    assert hlo.array_bytes(kind) == wanted


class TestGroupSize:

  @pytest.mark.parametrize('attributes, wanted', [
      ('replica_groups={{0,4,8,12},{1,5,9,13}}', 4),
      ('replica_groups=[16,4]<=[64], use_global_device_ids=true', 4),
      ('replica_groups=[4,16]<=[16,4]T(1,0)', 16),
      ("replica_groups=mesh['axis_0'=16,'axis_1'=1,'axis_2'=4] {'axis_0'}, to_apply=%a", 16),
      ("replica_groups=mesh['axis_0'=16,'axis_1'=4,'axis_2'=2] {'axis_1','axis_2'}", 8),
      ("replica_groups=mesh['axis_0'=4,'axis_1'=16], device_ids=([16,4]T(1,0)) {'axis_0'}, to_apply=%a", 4),
      ('replica_groups={}', 64), ('', 64)])
  def test_of_every_way_to_write_groups(self, attributes, wanted):
    assert hlo.group_size(attributes, 64) == wanted


class TestCollectives:

  def test_a_loop_by_hand(self):
    found = hlo.collectives(LOOP.replace('LIMIT', CONSTANT), 8)
    assert [(c.kind, c.bytes, c.group, c.times, c.known) for c in found] == [
        ('all-reduce', 32, 4, 10, True), ('all-gather', 64, 2, 1, True), ('all-reduce', 32, 2, 1, True)]
    assert found[0].where == 'jit(f)/psum'
    # Rings: an all-reduce sends 2 (n - 1) / n of the array, an all-gather (n - 1) / n.
    assert [c.sent for c in found] == [48, 32, 32]

  def test_an_unknown_loop_counts_once_and_says_so(self):
    text = LOOP.replace('LIMIT', CONSTANT).replace('%four = s32[] constant(4)', '%four = s32[] parameter(1)')
    first = hlo.collectives(text, 8)[0]
    assert (first.times, first.known) == (1, False)

  def test_a_collective_that_is_written_into_several_fusions_is_one(self):
    mark = ('%add, channel_id=5, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}')
    text = LOOP.replace('LIMIT', CONSTANT).replace('<=[8], to_apply=%add', f'<=[8], to_apply={mark}')
    assert text.count('async_collective_fusion_config') == 1
    twice = text.replace('  ROOT %fused', '  %again = f32[8]{0} fusion(%out), kind=kLoop, calls=%inside\n  ROOT %fused')
    assert len(hlo.collectives(twice, 8)) == len(hlo.collectives(text, 8)) == 3

  def test_groups_of_one_say_nothing(self):
    text = LOOP.replace('LIMIT', CONSTANT).replace('{{0,1,2,3},{4,5,6,7}}', '{{0},{1}}')
    assert len(hlo.collectives(text, 8)) == 2

  # Six layers x W of 256 x 256, W cut over 4 x 2 devices and gathered over the four in the loop, bfloat16 on a TPU,
  # widened to float32 by a CPU's compiler: 64 or 128 KiB, forward, again for the backward pass, and its gradient back.
  @pytest.mark.parametrize('compiler, whole, back', [('cpu', 131072, 'all-reduce'), ('tpu', 65536, 'reduce-scatter')])
  def test_of_a_scanned_model(self, compiler, whole, back):
    found = hlo.collectives((GOLDEN / f'plan_{compiler}.hlo').read_text(), 8)
    assert all(c.times == 6 and c.known for c in found)
    weights = [c for c in found if c.bytes == whole]
    assert sorted(c.kind for c in weights) == sorted(['all-gather', 'all-gather', back])
    assert {c.group for c in weights} == {4}
    rest = [c for c in found if c.bytes != whole]             # activations, over the two
    assert {c.group for c in rest} == {2} and {c.bytes for c in rest} == {whole // 8}
    assert sum('rematted_computation' in c.where for c in found) == 2


class TestTotals:

  def test_sums_by_kind(self):
    found = hlo.collectives(LOOP.replace('LIMIT', CONSTANT), 8)
    by_kind = {t.kind: t for t in hlo.totals(found)}
    assert list(by_kind) == ['all-gather', 'all-reduce']
    assert (by_kind['all-reduce'].runs, by_kind['all-reduce'].bytes, by_kind['all-reduce'].sent) == (11, 352, 512)

  def test_of_nothing(self):
    assert hlo.totals([]) == []


class TestMost:

  def test_equal_ones_are_one_and_the_largest_comes_first(self):
    one = hlo.Collective('all-gather', 100, 4, 6, True, 'a')
    found = [one, hlo.Collective('all-reduce', 60, 4, 1, True, 'b'), one._replace(times=2), one._replace(where='c')]
    assert [(c.where, c.times) for c in hlo.most(found, 2)] == [('a', 8), ('c', 6)]
