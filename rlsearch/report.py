"""Writes one self-contained report.html about a run, or one page that compares several.

  python -m rlsearch.report --workdir=runs/demo [--out=report.html]
  python -m rlsearch.report --workdir=runs/a,runs/b,runs/c [--out=compare.html]

The page needs no server and no network; what the run recorded is escaped, and only the page's own
script may run.
"""
from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from rlsearch import report_compare, report_data, report_html


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
  return _put(build(workdir), pathlib.Path(out) if out else pathlib.Path(workdir) / 'report.html')


def write_comparison(workdirs: Sequence[str | pathlib.Path], out: str | pathlib.Path | None = None) -> pathlib.Path:
  """Writes the page that compares several runs, whole or not at all, and returns its path.

  Args:
    workdirs: folders of runs; one without a run is left out, and the page says so.
    out: file to write; compare.html beside the first folder that exists by default.

  Raises:
    ValueError: no folder holds a run.
  """
  first = next((w for w in workdirs if pathlib.Path(w).is_dir()), workdirs[0])
  path = pathlib.Path(out) if out else pathlib.Path(first).resolve().parent / 'compare.html'
  return _put(report_compare.page(workdirs, path.parent), path)


def _put(text: str, path: pathlib.Path) -> pathlib.Path:
  """Writes a file whole or not at all, and returns its path."""
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    part.write_text(text, 'utf-8', newline='\n')
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
  return path


def folders(workdir: str) -> list[str]:
  """Returns the folders that the flag names: itself if it is one, else what stands between its commas."""
  if pathlib.Path(workdir).is_dir():
    return [workdir]
  return [w.strip() for w in workdir.split(',') if w.strip()] or [workdir]


def main(argv: list[str]) -> int:
  """Returns the exit code: 0, or 2 where there is no report to write."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; wanted --workdir and --out')
  workdirs, out = folders(flags.FLAGS.workdir), flags.FLAGS.out
  try:
    path = write(workdirs[0], out) if len(workdirs) == 1 else write_comparison(workdirs, out)
  except (ValueError, OSError) as e:
    print(f'report: {e}', file=sys.stderr)
    return 2
  print(path)
  return 0


if __name__ == '__main__':             # flags belong to the verb, not to whoever imports it
  flags.DEFINE_string('workdir', None, 'Folder of the run; several, with commas between, are compared on one page.',
                      required=True)
  flags.DEFINE_string('out', None, 'File to write; report.html in the run folder, or compare.html beside the first of '
                      'several, by default.')
  app.run(main)
