"""Meshes, the rules from logical to mesh axes, and rows to devices and back."""
from __future__ import annotations

from types import SimpleNamespace

import jax
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest

from rlsearch import parallel


class TestMakeMesh:

  @pytest.mark.parametrize('shape, sizes', [
      (dict(data=2, fsdp=2, tensor=2), (2, 2, 2)), (dict(data=-1), (8, 1, 1)), (dict(fsdp=-1, tensor=4), (1, 2, 4)),
      (dict(data=1, fsdp=-1, tensor=1), (1, 8, 1)), (dict(tensor=8), (1, 1, 8))])
  def test_sizes(self, shape, sizes):
    mesh = parallel.make_mesh(shape)
    assert mesh.axis_names == parallel.AXES and [mesh.shape[n] for n in ('data', 'fsdp', 'tensor')] == list(sizes)
    assert list(mesh.devices.flat) == jax.devices()

  def test_axes_are_auto(self):
    """Under jax's default, Explicit, each operation would have to say its sharding."""
    assert parallel.make_mesh(dict(data=-1)).axis_types == (AxisType.Auto,) * 6

  def test_errors_name_the_entry(self):
    with pytest.raises(ValueError, match=r"config\.sampler_mesh=\{'tensor': 3\}: wants 3 devices"):
      parallel.make_mesh(dict(tensor=3), None, 'config.sampler_mesh')

  def test_some_devices(self):
    assert parallel.make_mesh(dict(data=-1, tensor=2), jax.devices()[:4]).devices.shape == (1, 2, 1, 1, 1, 2)

  @pytest.mark.parametrize('shape, message', [
      (dict(model=2), r'config\.mesh\.model: unknown axis; known'),
      (dict(data=3), r'config\.mesh=.*wants 3 devices .*found 8'),
      (dict(data=-1, tensor=3), r'wants 3 devices \(or a multiple of it\), found 8'),
      (dict(data=-1, fsdp=-1), 'at most one is -1'),
      (dict(data=0), 'sizes are positive'), (dict(data=-2), 'sizes are positive')])
  def test_impossible(self, shape, message):
    with pytest.raises(ValueError, match=message):
      parallel.make_mesh(shape)


class TestBox:

  def chips(self, *coords):
    return [SimpleNamespace(platform='tpu', coords=at) for at in coords]

  def test_sides(self):
    host = [(x, y, 0) for x in (4, 5) for y in (2, 3)]
    assert parallel.box(self.chips(*host)) == (2, 2, 1)
    cores = [SimpleNamespace(coords=at, core_on_chip=i) for at in host for i in range(2)]
    assert parallel.box(cores) == (2, 2, 1)
    assert parallel.box(self.chips(*host, *host)) == ()                     # the same places of two slices
    assert parallel.box(self.chips(*host[:3])) == ()

  def test_chips_that_are_none_keep_their_order(self, monkeypatch):
    """Three hosts of a slice form an L: JAX knows no arrangement of it, and fails on an assertion."""
    monkeypatch.setattr(parallel.mesh_utils, 'create_device_mesh', lambda *args, **kwargs: pytest.fail('asked for one'))
    devices = self.chips((0, 0, 0), (1, 0, 0), (0, 1, 0))
    assert parallel._arranged(devices, [1, 3, 1]).ravel().tolist() == devices


class TestSpec:

  def mesh(self):
    return parallel.make_mesh(dict(data=2, fsdp=2, tensor=2))

  @pytest.mark.parametrize('axes, shape, wanted', [
      (('layer', 'embed', 'heads', 'head_dim'), (3, 8, 4, 5), P(None, 'fsdp', 'tensor', None)),
      (('layer', 'heads', 'head_dim', 'embed'), (3, 4, 5, 8), P(None, 'tensor', None, 'fsdp')),
      (('vocab_in', 'embed'), (7, 8), P(None, 'fsdp')), (('vocab_in', 'embed'), (8, 8), P('tensor', 'fsdp')),
      (('vocab_out', 'embed'), (8, 8), P('tensor', 'fsdp')),
      (('batch', 'length'), (8, 5), P(('data', 'fsdp'), None)),
      ((), (), P())])
  def test_rules(self, axes, shape, wanted):
    assert parallel.spec(axes, shape, self.mesh()) == wanted

  def test_a_size_that_is_not_divided_is_replicated(self):
    """Two key heads over a tensor axis of two, one key head over none."""
    assert parallel.spec(('kv_heads', 'embed'), (2, 9), self.mesh()) == P('tensor', None)
    assert parallel.spec(('kv_heads', 'embed'), (1, 8), self.mesh()) == P(None, 'fsdp')
    assert parallel.spec(('batch',), (6,), self.mesh()) == P('data')

  def test_a_mesh_axis_serves_one_dimension(self):
    assert parallel.spec(('heads', 'ffn'), (4, 4), self.mesh()) == P('tensor', None)
    assert parallel.spec(('batch', 'embed'), (4, 4), self.mesh()) == P(('data', 'fsdp'), None)

  def test_wants_a_name_for_every_axis(self):
    with pytest.raises(ValueError):
      parallel.spec(('embed',), (4, 4), self.mesh())


class TestRows:

  def test_there_and_back(self):
    mesh = parallel.make_mesh(dict(data=2, fsdp=2, tensor=2))
    assert parallel.batch_ways(mesh) == 4
    tree = {'a': np.arange(24).reshape(8, 3), 'b': np.arange(8)}
    placed = parallel.to_global(tree, parallel.rows(mesh))
    assert placed['a'].addressable_shards[0].data.shape == (2, 3) and len(placed['a'].sharding.device_set) == 8
    back = parallel.local_rows(placed)
    np.testing.assert_array_equal(back['a'], tree['a'])
    np.testing.assert_array_equal(back['b'], tree['b'])

  def test_replicated(self):
    mesh = parallel.make_mesh(dict(data=-1))
    x = parallel.to_replicated({'a': np.arange(5)}, mesh)['a']
    assert x.sharding.is_fully_replicated and len(x.addressable_shards) == 8
    np.testing.assert_array_equal(x.addressable_shards[7].data, np.arange(5))


class TestHosts:

  def test_of_one_host(self):
    assert parallel.share(7, 1) == 7
    assert parallel.largest((3, -1)) == (3, -1) and parallel.largest(()) == ()
    assert parallel.any_host(True) is True and parallel.any_host(False) is False

  def test_of_three(self, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 3)
    assert parallel.share(9, 3) == 3 and parallel.share(9, 1) == 9           # one sampler of all grows the questions of all
    with pytest.raises(ValueError, match=r'config\.data\.questions_per_step=8: not a multiple of the 3 hosts'):
      parallel.share(8, 3)

  def test_largest_is_element_wise(self, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(parallel.multihost_utils, 'process_allgather', lambda x: np.stack([x, np.array([5, 1])]))
    assert parallel.largest((2, 9)) == (5, 9)
