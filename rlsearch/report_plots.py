"""Plots of the report: inline SVG in the colours of the page, with the legend as HTML.

matplotlib draws with stand-in colours that are replaced by the page's CSS variables afterwards, so
that one file serves light, dark and paper.  Text stays text.
"""
from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.backends.backend_svg
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from rlsearch.report_text import NUM_COLORS, card, clean, esc, legend

_INK, _MUTED, _GRID = '#010101', '#020202', '#030303'
_COLORS = tuple(f'#0{i}fe0{i}' for i in range(NUM_COLORS))
_CSS = {_INK: 'var(--ink)', _MUTED: 'var(--muted)', _GRID: 'var(--line)',
        **{c: f'var(--c{i})' for i, c in enumerate(_COLORS)}}
_STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'report', 'text.parse_math': False, 'font.size': 8.5,
    'text.color': _INK, 'axes.labelcolor': _MUTED, 'axes.titlecolor': _MUTED,
    'xtick.labelcolor': _MUTED, 'ytick.labelcolor': _MUTED, 'xtick.color': _GRID,
    'ytick.color': _GRID, 'axes.edgecolor': _MUTED, 'axes.linewidth': 0.6,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.spines.left': False,
    'axes.axisbelow': True, 'axes.grid': True, 'axes.grid.axis': 'y', 'axes.xmargin': 0.02,
    'grid.color': _GRID, 'grid.linewidth': 0.7, 'ytick.major.size': 0, 'xtick.major.size': 3,
    'axes.titlesize': 8.5, 'axes.titlelocation': 'left', 'figure.facecolor': 'none',
    'axes.facecolor': 'none', 'lines.linewidth': 1.7, 'lines.solid_capstyle': 'round'}
_DASHES = ('-', '--', ':', '-.')        # once the colours are used up; as in the page's legend
_MOST_POINTS = 320                     # of a line; beyond, neighbours are averaged
_HALF, _WIDE = (4.7, 2.35), (9.6, 2.7)  # inches; the page scales them


class Curve(NamedTuple):
  """One line; points by stage number: (x, y) or (x, y, low, high)."""
  label: str
  color: int
  points: Mapping[int, tuple]
  smooth: bool = False                 # faint as measured, bold as a running mean
  marker: bool = False


def finite(values: Sequence[float]) -> np.ndarray:
  """Returns a float array; infinite values would break the axes and become gaps."""
  a = np.asarray(values, np.float64)
  return np.where(np.isfinite(a) & (np.abs(a) < 1e30), a, np.nan)


def thin(a: np.ndarray, most: int = _MOST_POINTS) -> np.ndarray:
  """Returns a with neighbours averaged (gaps left out) until at most `most` values are left."""
  if len(a) <= most:
    return a
  with warnings.catch_warnings():      # a block of nothing but gaps is a gap
    warnings.simplefilter('ignore', RuntimeWarning)
    return np.array([np.nanmean(block) for block in np.array_split(a, most)])


def running_mean(y: np.ndarray) -> np.ndarray:
  """Returns the mean over a centred window of about a tenth of y; gaps stay gaps."""
  half, at = max(1, len(y) // 20), np.arange(len(y))
  ok, filled = np.isfinite(y), np.nan_to_num(y)
  total, count = (np.concatenate([[0.], np.cumsum(v)]) for v in (filled, ok.astype(float)))
  low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
  with np.errstate(invalid='ignore', divide='ignore'):
    return np.where(ok, (total[high] - total[low]) / (count[high] - count[low]), np.nan)


def _svg(figure: matplotlib.figure.Figure, label: str) -> str:
  """The figure as an element of the page: ids of its own, colours and fonts of the page."""
  out = io.StringIO()
  with warnings.catch_warnings():      # letters that matplotlib's font lacks: browsers have them
    warnings.simplefilter('ignore')
    canvas = matplotlib.backends.backend_svg.FigureCanvasSVG(figure)
    canvas.print_svg(out, metadata={'Date': None})
  text = out.getvalue()
  text = text[text.index('<svg'):]
  text = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->', '', text, flags=re.S)
  text = text.replace('xlink:href', 'href')
  box = re.search(r'viewBox="([^"]*)"', text)[1]
  text = (f'<svg class="plot" role="img" aria-label="{esc(label)}" viewBox="{box}">' +
          text[text.index('>') + 1:])
  mark = 'p' + hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]
  used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
  text = re.sub(r' id="([^"]*)"', lambda m: f' id="{mark}{m[1]}"' if m[1] in used else '', text)
  text = re.sub(r'(href="#|url\(#)', rf'\g<1>{mark}', text)
  text = re.sub(r' (?:d|x|y|transform)="[^"]*"',
                lambda m: re.sub(r'(\d+\.\d{2})\d+', r'\1', m[0]), text)
  text = re.sub('|'.join(_CSS), lambda m: _CSS[m[0]], text)
  text = re.sub(r'font: ([\d.]+)px [^;"]*', r'font-size: \1px', text)
  return re.sub(r'\n\s*', '\n', text).strip()


def _tick(value: float, _=None) -> str:
  """A tick's label: short, and without mathematical markup."""
  size = abs(value)
  if 0 < size < 1e-3 or size >= 1e9:
    mantissa, exponent = f'{value:.2e}'.split('e')
    text = f'{float(mantissa):g}e{int(exponent)}'
  elif size >= 1e6:
    text = f'{value / 1e6:g}M'
  else:
    text = f'{value / 1e3:g}k' if size >= 1e3 else f'{value:.6g}'
  return text.replace('-', '−')


def _limits(ax, values: np.ndarray, bounds: tuple[float, float] | None, log: bool) -> None:
  """Sets the y axis: logarithmic where that shows more, and never zoomed into rounding."""
  low, high = np.nanmin(values), np.nanmax(values)
  if bounds is not None:
    ax.set_ylim(*bounds)
  elif log and low > 0 and high > 30 * low:
    ax.set_yscale('log')
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(numticks=6))
    ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  elif high - low <= 1e-6 * max(abs(low), abs(high)):
    around = 0.1 * max(abs(low), abs(high)) or 1.
    ax.set_ylim(low - around, high + around)
  ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_tick))


def _panels(stages: Sequence[str], used: Sequence[int], size: tuple[float, float], sharey: bool,
            xlabel: str = 'step'):
  """(figure, one panel for each stage that has something to show, the last the widest)."""
  figure = matplotlib.figure.Figure(figsize=size, layout='constrained')
  axes = figure.subplots(1, len(used), sharey=sharey, squeeze=False,
                         width_ratios=[0.7] * (len(used) - 1) + [1])[0]
  for ax, i in zip(axes, used):
    ax.set_xlabel(clean(xlabel)[:60])
    ax.set_title(clean(stages[i])[:40])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=xlabel == 'step'))
    if xlabel != 'step':
      ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_tick))
  return figure, axes


def _draw(ax, curve: Curve, stage: int) -> None:
  """One curve of one stage, its interval as a band and lone points as dots."""
  x, y, *interval = (finite(v) for v in curve.points[stage])
  color, lone = _COLORS[curve.color % NUM_COLORS], np.isfinite(y).sum() < 3
  dash = _DASHES[curve.color // NUM_COLORS % len(_DASHES)]
  if interval:
    ax.fill_between(x, *interval, color=color, alpha=0.16, linewidth=0)
    if lone:
      ax.vlines(x, *interval, color=color, linewidth=1.2)
  if curve.smooth and len(y) >= 10:
    ax.plot(thin(x), thin(y), color=color, alpha=0.3, linewidth=0.8)
    y = running_mean(y)
  dots = 'o' if curve.marker or lone else ''
  ax.plot(thin(x), thin(y), color=color, linestyle=dash, marker=dots, markersize=3.4)


def lines(title: str, stages: Sequence[str], curves: Sequence[Curve], ylabel: str, note: str = '',
          bounds: tuple[float, float] | None = None, log: bool = False, xlabel: str = 'step',
          wide: bool = False) -> str:
  """Returns a card with one panel a stage and all curves in each, or '' where no value is finite.

  Args:
    title: of the card.
    stages: titles of the panels, by the stage numbers of the curves.
    curves: what is drawn; beyond eight colours, dashed.
    ylabel: of the y axis.
    note: under the plot.
    bounds: of the y axis, which the panels then share; None leaves it to the data.
    log: a logarithmic axis, where all values are positive and differ much.
    xlabel: of the x axis; anything but 'step' may have fractions.
    wide: over both columns of the page.
  """
  curves = [c._replace(points={i: p for i, p in c.points.items()
                               if np.isfinite(finite(p[1])).any()}) for c in curves]
  curves = [c for c in curves if c.points]
  used = sorted({i for c in curves for i in c.points})
  if not used:
    return ''
  with matplotlib.rc_context(_STYLE):
    figure, axes = _panels(stages, used, _WIDE if wide else _HALF, bounds is not None, xlabel)
    for ax, stage in zip(axes, used):
      here = [c for c in curves if stage in c.points]
      for curve in here:
        _draw(ax, curve, stage)
      _limits(ax, np.concatenate([finite(c.points[stage][1]) for c in here]), bounds, log)
    axes[0].set_ylabel(clean(ylabel)[:60])
    named = len(curves) == 1 and curves[0].label.lower() in title.lower()
    keys = '' if named else legend([(c.label, c.color) for c in curves])
    over = 'steps' if xlabel == 'step' else xlabel
    return card(title, keys + _svg(figure, f'{title}: {ylabel} over {over}'), note, wide)


def stack(title: str, stages: Sequence[str], parts: Sequence[Curve], ylabel: str,
          top: float | None = None) -> str:
  """Returns a wide card with areas on top of each other, one panel a stage, or ''.

  All parts of a stage have the same steps.  Where few steps tower above the others (the first one
  compiles) the axis leaves their tops out and the card says so; not where `top` is given.
  """
  used = sorted({i for p in parts for i in p.points if len(p.points[i][0])})
  if not used:
    return ''
  cut = []
  with matplotlib.rc_context(_STYLE):
    figure, axes = _panels(stages, used, _WIDE, top is not None)
    for ax, stage in zip(axes, used):
      here = [p for p in parts if stage in p.points]
      x = thin(finite(here[0].points[stage][0]))
      y = np.stack([thin(np.nan_to_num(finite(p.points[stage][1]))) for p in here])
      height, limit = y.sum(0), top
      usual = 1.6 * np.quantile(height, 0.95) if len(x) >= 20 else math.inf
      if top is None and height.max() > 1.5 * usual > 0:
        limit = usual
        cut.append(f'{clean(stages[stage])}: {(height > usual).sum()} step(s) reach beyond the '
                   f'axis, up to {height.max():.3g}.')
      if len(x) == 1:
        x, y = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(y, 2, 1)
      colors = [_COLORS[p.color % NUM_COLORS] for p in here]
      ax.stackplot(x, y, colors=colors, alpha=0.85, linewidth=0)
      ax.set_ylim(0, limit)
      ax.margins(x=0)
      ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_tick))
    axes[0].set_ylabel(clean(ylabel)[:60])
    keys = legend([(p.label, p.color) for p in parts])
    return card(title, keys + _svg(figure, f'{title}: {ylabel} over steps'), ' '.join(cut), True)


def bars(title: str, groups: Sequence[str], rows: Sequence[tuple[str, int, Sequence[tuple]]],
         xlabel: str, ylabel: str, note: str = '') -> str:
  """Returns a card with grouped bars of shares and their whiskers.

  Args:
    title: of the card.
    groups: what the bars stand over.
    rows: (label, colour, [(value, low, high, *points) for each group]); NaN where there is none.
      Points are drawn over the bar: the values that it is the mean of.
    xlabel: what the groups are.
    ylabel: what the values are.
    note: under the plot.
  """
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=_HALF, layout='constrained')
    ax = figure.subplots()
    width = 0.72 / max(1, len(rows))
    for i, (_, color, values) in enumerate(rows):
      v, low, high = (finite([x[k] for x in values]) for k in range(3))
      x = np.arange(len(groups)) + (i - (len(rows) - 1) / 2) * width
      ax.bar(x, v, width * 0.92, color=_COLORS[color % NUM_COLORS], alpha=0.8)
      ax.vlines(x, low, high, color=_INK, linewidth=1)
      for at, (_, _, _, *points) in zip(x, values):
        spread = at + width * 0.5 * (np.arange(len(points)) - (len(points) - 1) / 2) / max(1, len(points))
        ax.plot(spread, finite(points), 'o', color=_INK, alpha=0.6, markersize=2.6)
      for at, value, tip in zip(x, v, np.where(np.isfinite(high), high, v)):
        if np.isfinite(value):
          ax.annotate(f'{value:.2f}', (at, tip), (0, 2), textcoords='offset points', ha='center',
                      fontsize=7.5)
    shown = [clean(g) if len(g) <= 22 else clean(g)[:21] + '…' for g in groups]
    slant = {'rotation': 20, 'ha': 'right'} if len(groups) * max(map(len, shown)) > 60 else {}
    ax.set_xticks(range(len(groups)), shown, **slant)
    ax.set_ylim(0, 1.08)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set(xlabel=clean(xlabel)[:60], ylabel=clean(ylabel)[:60])
    keys = legend([(label, color) for label, color, _ in rows])
    return card(title, keys + _svg(figure, f'{title}: {ylabel} by {xlabel}'), note)
