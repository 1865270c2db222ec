"""A module of your own, Flax Linen, Flax NNX or plain functions, as the policy, the critic or the reward module.

A module is called with i32[P, S] tokens, i32[P, S] positions along each token's path, and bool[P, S, S] `sees`, which
query (first S) may see which key: several rows may share a sequence, so causal attention is not enough.  It returns, of
each token,

  policy: f32[P, S, V], the logits of the token behind it; V at least the tokenizer's size;
  value:  f32[P, S], the value of the state behind it;
  reward: f32[P, S], the score of the path up to and with it.

Parameters are float32.  What is not a function of parameters and tokens is refused: dropout, batch statistics, caches.
In a config, with `make` of a file my_models.py that returns, say, from_linen(MyPolicy(vocab_size, width)):

  c.model.modules = dict(policy=dict(make='my_models:make', width=512))
  c.engine = dict(name='reprefill', rows=64, contexts=(512, 1024, 2048, 4096), max_new_tokens=512)
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import importlib
import inspect
from typing import Any, NamedTuple, TYPE_CHECKING

from flax import errors, linen
from flax.core import meta
import jax
import jax.numpy as jnp

from rlsearch import parallel
from rlsearch.models.params import Param, Specs, is_param
from rlsearch.types import Params

if TYPE_CHECKING:
  from flax import nnx

ROLES = ('policy', 'value', 'reward')
# A parameter's axes under the names that Flax's releases gave them.
_NAMES = ('out_sharding', 'sharding_names', 'sharding')


class Module(NamedTuple):
  """A module as pure functions.

  Attributes:
    specs: table of its parameters.  Their initial values are `init`'s, and Muon leaves them to Adam (fan_in is 0).
    init: key -> parameters, nested dicts as in the table.
    apply: (parameters, tokens, positions, sees) -> what its role wants, see above.
  """
  specs: Specs
  init: Callable[[jax.Array], Params]
  apply: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def example(rows: int = 1, length: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns tokens, positions and `sees` of rows that are paths: zeros, 0 to length - 1, what is left of a token."""
  tokens = jnp.zeros((rows, length), jnp.int32)
  return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), causal(tokens)


def causal(tokens: jax.Array) -> jax.Array:
  """Returns bool[P, S, S]: a token sees itself and what is left of it."""
  length = tokens.shape[1]
  return jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (tokens.shape[0], length, length))


def from_linen(module: linen.Module) -> Module:
  """Returns a Linen module as pure functions.

  Axes are those that nn.with_partitioning or nn.with_logical_partitioning gave its parameters, names of
  parallel.RULES; a parameter without names, or an axis whose name has no rule, lies whole on every device.

  Args:
    module: called as module(tokens, positions, sees); its parameters' shapes do not depend on the length.

  Raises:
    ValueError: a module with random numbers in its call or with collections beside 'params', parameters that are not
      float32, or an axis named after a mesh axis.
  """
  name = type(module).__name__
  def variables(key):
    return module.init({'params': key}, *example())
  shapes = jax.eval_shape(variables, jax.random.key(0))
  try:                                              # init would give it the key of the parameters
    jax.eval_shape(lambda variables: module.apply(variables, *example(), mutable=True), shapes)
  except errors.InvalidRngError as error:
    raise ValueError(f'module {name}: draws random numbers in its call, dropout for example; wants one that is '
                     'deterministic, as with nn.Dropout(..., deterministic=True): '
                     f'{str(error).splitlines()[0]}') from error
  others = sorted(set(shapes) - {'params'})
  if others:
    raise ValueError(f'module {name}: collections {others} change while it runs; wants parameters alone')
  boxed = lambda x: isinstance(x, meta.AxisMetadata)
  def row(path, x):
    names, x = (x.names, x.unbox()) if boxed(x) else (None, x)
    return _row(name, jax.tree_util.keystr(path, simple=True, separator='/'), x, names)
  specs = jax.tree_util.tree_map_with_path(row, shapes['params'], is_leaf=boxed)
  unboxed = lambda tree: jax.tree.map(lambda x: x.unbox() if boxed(x) else x, tree, is_leaf=boxed)
  return Module(specs, lambda key: unboxed(variables(key)['params']),
                lambda params, *inputs: module.apply({'params': params}, *inputs))


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Module:
  """Returns an NNX module as pure functions: it is split here and merged at every call.

  Axes are those of nnx.with_partitioning, names of parallel.RULES, as for `from_linen`.  The numbers of a list's
  entries are written as text in the names of parameters.

  Args:
    make: rngs -> the module, called as module(tokens, positions, sees); the only stream is 'params'.

  Raises:
    ValueError: variables that are not nnx.Param (batch statistics, states of random numbers, caches), and as
      from_linen.
  """
  from flax import nnx                               # slow to import, and few bring a module
  def made(key):
    with nnx.use_eager_sharding(False):             # shardings are the mesh's, not those of where it is made
      return make(nnx.Rngs(params=key))
  try:
    shapes = nnx.eval_shape(lambda: made(jax.random.key(0)))
  except KeyError as error:
    if 'RngStream' not in str(error):
      raise
    raise ValueError(f'the NNX module asks for random numbers beside those of its parameters: {error.args[0]}  Wants '
                     'one that is deterministic, without nnx.Dropout') from error
  name, (graph, params, rest) = type(shapes).__name__, nnx.split(shapes, nnx.Param, ...)
  others = {'.'.join(map(str, path)): type(v).__name__ for path, v in nnx.to_flat_state(rest)}
  if others:
    raise ValueError(f'module {name}: variables {others} change while it runs; wants nnx.Param alone')
  flat = list(nnx.to_flat_state(params))
  def axes(variable):
    said = variable.get_metadata()
    return next((said[n] for n in _NAMES if said.get(n) is not None), None)
  specs = _nested((path, _row(name, '/'.join(map(str, path)), v, axes(v))) for path, v in flat)

  def init(key):
    return _nested((path, v.get_value()) for path, v in nnx.to_flat_state(nnx.state(made(key), nnx.Param)))

  def apply(params, *inputs):
    filled = nnx.from_flat_state([(path, v.replace(_at(params, path))) for path, v in flat])
    return nnx.merge(graph, filled)(*inputs)
  return Module(specs, init, apply)


def _row(module: str, path: str, x: Any, names: Sequence[str | None] | None) -> Param:
  """A row of the table."""
  if x.dtype != jnp.float32:
    raise ValueError(f'module {module}: {path} is {x.dtype}; wants float32 (param_dtype), in which the optimizer adds; '
                     'activations may be bfloat16 (dtype)')
  names = (None,) * len(x.shape) if names is None else tuple(names)
  if len(names) != len(x.shape):
    raise ValueError(f'module {module}: {path} has shape {x.shape} and axes {names}; wants a name for every axis')
  for axis in names:
    if axis is not None and not isinstance(axis, str) or axis in parallel.AXES and axis not in parallel.RULES:
      raise ValueError(f'module {module}: {path} names the axis {axis!r}; wants logical names, of which '
                       f'{sorted(parallel.RULES)} are divided over the mesh')
  return Param(tuple(x.shape), tuple(axis or '-' for axis in names), 0)


def _nested(leaves) -> dict[str, Any]:
  """Nested dicts of (path, leaf) pairs; keys are text."""
  out: dict[str, Any] = {}
  for path, leaf in leaves:
    *parents, last = map(str, path)
    inside = out
    for name in parents:
      inside = inside.setdefault(name, {})
    inside[last] = leaf
  return out


def _at(tree: Params, path: Sequence[Any]) -> jax.Array:
  for name in path:
    tree = tree[str(name)]
  return tree


## From a config.

def load(role: str, entry: Mapping[str, Any], vocab_size: int) -> Module:
  """Returns the module of config.model.modules.<role>.

  Args:
    role: 'policy', 'value' or 'reward'.
    entry: `make`, 'package.module:function', and the function's own entries; it is called as
      function(vocab_size, **entries) and returns a Module.
    vocab_size: of the module: the tokenizer's, rounded up to a multiple of 8.

  Raises:
    ValueError: a function that cannot be imported, entries that it does not have, or a module that
      does not return what its role wants.
  """
  at = f'config.model.modules.{role}'
  where = entry.get('make', '') if isinstance(entry, Mapping) else ''
  package, colon, name = where.partition(':')
  if not colon:
    raise ValueError(f"{at}={entry!r}: wants an entry make='package.module:function' and the entries of that function")
  try:
    make = getattr(importlib.import_module(package), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(f'{at}.make={where!r}: {error}') from error
  entries = {k: v for k, v in entry.items() if k != 'make'}
  try:
    inspect.signature(make).bind(vocab_size, **entries)
  except TypeError as error:
    raise ValueError(f'{at}: {where}{inspect.signature(make)} is called with vocab_size and {entries}: '
                     f'{error}') from error
  module = make(vocab_size, **entries)
  if not isinstance(module, Module):
    raise ValueError(f'{at}.make={where!r}: returned a {type(module).__name__}; wants a '
                     'rlsearch.models.modules.Module, as of from_linen or from_nnx')
  check_output(at, module, role, vocab_size)
  return module


def check_output(at: str, module: Module, role: str, vocab_size: int) -> None:
  """Raises ValueError for a module that does not return what its role wants; `at` is the entry to name."""
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), module.specs, is_leaf=is_param)
  inputs = jax.eval_shape(lambda: example(2, 6))
  found = jax.eval_shape(module.apply, shapes, *inputs)
  wanted = (2, 6, vocab_size) if role == 'policy' else (2, 6)
  fits = isinstance(found, jax.ShapeDtypeStruct) and jnp.issubdtype(found.dtype, jnp.floating)
  if not fits or len(found.shape) != len(wanted) or found.shape[:2] != (2, 6) or found.shape[2:] < wanted[2:]:
    raise ValueError(f'{at}: of tokens [2, 6] it returns {jax.tree.map(lambda x: (x.shape, str(x.dtype)), found)}; a '
                     f'{role} wants numbers of shape {wanted}')


def check_causal(module: Module, params: Params) -> None:
  """Raises ValueError for a policy whose logits change with a token to their right: trained, it would copy it."""
  inputs = example(2)
  tokens = inputs[0].at[1, -1].set(1)
  a, b = jax.jit(module.apply)(params, tokens, *inputs[1:])[:, :-1].astype(jnp.float32)
  gap, size = float(jnp.max(jnp.abs(a - b))), float(jnp.max(jnp.abs(a)))
  if gap > 1e-4 * size:
    raise ValueError(f'config.model.modules.policy: the logits of a token change by {gap:.2g} (of at most {size:.2g}) '
                     'with the token behind it; wants attention and all else within `sees`')


def check_sees(role: str, module: Module, params: Params) -> None:
  """Raises ValueError for a module that reads what `sees` hides: in a shared layout other rows lie to the left of a token.

  The first half of a sequence is hidden from the second; then only the second half's first tokens may tell.
  """
  tokens, positions, sees = example(2)
  half = tokens.shape[1] // 2
  sees = sees.at[:, half:, :half].set(False)
  a, b = jax.jit(module.apply)(params, tokens.at[1, :half].set(1), positions, sees)[:, half:].astype(jnp.float32)
  gap, size = float(jnp.max(jnp.abs(a - b))), float(jnp.max(jnp.abs(a)))
  if gap > 1e-4 * max(size, 1e-6):
    raise ValueError(f'config.model.modules.{role}: what it says of a token changes by {gap:.2g} (of at most {size:.2g}) with '
                     'tokens that `sees` hides from it; wants attention and all else within `sees`')
