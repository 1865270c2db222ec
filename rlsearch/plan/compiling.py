"""Compiles programs and keeps what the compiler says: seconds, memory, complaints, collectives."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import re
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

import jax

from rlsearch import reserve
from rlsearch.plan import hlo
from rlsearch.plan.hlo import Collective

REMATERIALIZATION = re.compile(r'involuntary full rematerialization', re.IGNORECASE)
RESHARDED = re.compile(r'from sharding (\S+ ?\S*) to (.*?) efficiently for HLO operation (%?\S+) = (\S+)'
                       r'.*?op_name="([^"]*)"')
OUT_OF_MEMORY = re.compile(r'\(?([\d.]+)G\)?\s*(?:of|exceeds available HBM)\s*\(?([\d.]+)G')


class Compiled(NamedTuple):
  """A compiled program, and its compiler's figures for one device.

  Attributes:
    name: of the program.
    seconds, cpu_seconds: that lowering and compiling took here, by the clock and of this process's threads together.
    arguments, outputs, aliased, temporaries, code: bytes; aliased outputs lie where arguments did.
    peak: bytes that are alive at once, as the compiler counts them; it places the temporaries in `temporaries`.
    flops: that the compiler counts, each loop's body once; 0 where it does not say.
    complaints: lines in which it says that it could not shard something.
    collectives: None where the text cannot be read.
    read_from: whose text they were read from, where not the topology's own.
    failed: why it was not compiled; '' if it was.
  """
  name: str
  seconds: float
  cpu_seconds: float = 0.
  arguments: int = 0
  outputs: int = 0
  aliased: int = 0
  temporaries: int = 0
  code: int = 0
  peak: int = 0
  flops: float = 0.
  complaints: tuple[str, ...] = ()
  collectives: Sequence[Collective] | None = None
  read_from: str = ''
  failed: str = ''

  @property
  def own(self) -> int:
    """Bytes that the program takes beside its arguments."""
    return reserve.own_bytes(self.temporaries, self.outputs, self.aliased, self.code)

  @property
  def total(self) -> int:
    """Bytes that the program holds while it runs."""
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@contextlib.contextmanager
def standard_error() -> Iterator[Callable[[], str]]:
  """Yields a function that returns what was written to this process's standard error meanwhile, by C++ too.

  All of it is passed on at the end, but for the lines of compilers.
  """
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as caught:
    os.dup2(caught.fileno(), 2)
    def read():
      sys.stderr.flush()
      at = os.lseek(2, 0, os.SEEK_CUR)
      text = os.pread(2, at, 0).decode('utf-8', 'replace')
      return text
    try:
      yield read
    finally:
      text = read()
      os.dup2(kept, 2)
      os.close(kept)
      for line in text.splitlines():
        if not _of_a_compiler(line):
          print(line, file=sys.stderr)


def _of_a_compiler(line: str) -> bool:
  return bool(re.match(r'[IWE]\d{4} |WARNING: (All log|Logging before)|Failed to find host bounds|=== Source Location|'
                       r'learning/', line))


def complaints(text: str) -> tuple[str, ...]:
  """Returns the lines about involuntary full rematerialisations, each operation once."""
  found = {}
  for line in text.splitlines():
    if REMATERIALIZATION.search(line):
      what = RESHARDED.search(line)
      found[' '.join(what.groups()[2:5]) if what else line[:300]] = (
          f'{what[3]} = {what[4]} ({what[5]}): {what[1]} to {what[2]}' if what else line[:300])
  return tuple(found.values())


@contextlib.contextmanager
def progress(name: str, say: Callable[[str], None], every: float = 20.0) -> Iterator[None]:
  """Says every `every` seconds how long something takes."""
  done, begun = threading.Event(), time.monotonic()
  def beat():
    while not done.wait(every):
      say(f'{name}: compiling for {time.monotonic() - begun:.0f} s')
  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def run(name: str, lower: Callable[[], Any], num_devices: int, say: Callable[[str], None] = lambda text: None,
        instead: Callable[[], Any] | None = None) -> Compiled:
  """Returns what compiling says; a program that does not fit or compile is one with `failed`.

  Args:
    name: of the program.
    lower: returns the lowered program.
    num_devices: that it is for.
    say: progress, a line each.
    instead: returns the program lowered for as many virtual CPUs: its collectives are read where the program's own text
      cannot be.
  """
  begun, spent = time.monotonic(), time.process_time()
  took = lambda: (time.monotonic() - begun, time.process_time() - spent)
  with progress(name, say), standard_error() as read:
    try:
      program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
      return Compiled(name, *took(), complaints=complaints(read()), failed=_why(str(error)))
    said, seconds = complaints(read()), took()
  memory, cost = program.memory_analysis(), program.cost_analysis() or {}
  found, read_from = _collectives(program, num_devices), ''
  if found is None and instead is not None:
    with progress(f'{name}, for virtual CPUs', say), standard_error():
      found, read_from = _collectives(instead().compile(), num_devices), f'{num_devices} virtual CPU devices'
  return Compiled(name, *seconds, memory.argument_size_in_bytes, memory.output_size_in_bytes,
                  memory.alias_size_in_bytes, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes,
                  getattr(memory, 'peak_memory_in_bytes', 0), float(cost.get('flops', 0.)), said, found, read_from)


def _collectives(program: Any, num_devices: int) -> list[Collective] | None:
  try:
    return hlo.collectives(program.as_text(), num_devices)
  except (jax.errors.JaxRuntimeError, ValueError):            # some libtpus cannot print some programs
    return None


def _why(error: str) -> str:
  """A compiler's error in a line."""
  found = OUT_OF_MEMORY.search(error)
  if found:
    return f'does not fit: wants {found[1]} GiB of {found[2]} GiB'
  return error.strip().splitlines()[0][:300]
