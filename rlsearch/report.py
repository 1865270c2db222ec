"""Writes one self-contained report.html about a run.

  python -m rlsearch.report --workdir=runs/demo [--out=report.html]

The page needs no server and no network; what the run recorded is escaped, and only the page's own
script may run.
"""
from __future__ import annotations

import os
import pathlib
import sys

from absl import app, flags

from rlsearch import report_data, report_html


def build(workdir: str | pathlib.Path) -> str:
  """Returns the page for a run folder.

  Raises:
    ValueError: the folder is not there, or holds no stage.
  """
  return report_html.page(report_data.read(workdir))


def write(workdir: str | pathlib.Path, out: str | pathlib.Path | None = None) -> pathlib.Path:
  """Writes the page, whole or not at all, and returns its path.

  Args:
    workdir: folder of the run.
    out: file to write; report.html in that folder by default.
  """
  text = build(workdir)
  path = pathlib.Path(out) if out else pathlib.Path(workdir) / 'report.html'
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    part.write_text(text, 'utf-8', newline='\n')
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
  return path


def main(argv: list[str]) -> int:
  """Returns the exit code: 0, or 2 where there is no report to write."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; wanted --workdir and --out')
  try:
    path = write(flags.FLAGS.workdir, flags.FLAGS.out)
  except (ValueError, OSError) as e:
    print(f'report: {e}', file=sys.stderr)
    return 2
  print(path)
  return 0


if __name__ == '__main__':             # flags belong to the verb, not to whoever imports it
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  flags.DEFINE_string('out', None, 'File to write; report.html in the run folder by default.')
  app.run(main)
