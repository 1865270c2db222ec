"""How the report's page looks, its one script, and the policy that lets no other script run."""
from __future__ import annotations

import base64
import hashlib

CSS = """
:root { color-scheme: light dark; --bg: #f6f5f2; --card: #fff; --ink: #1d1e22; --muted: #676a73;
  --line: #e4e2dc; --accent: #2352c8; --good: #0d7f5f; --bad: #b8322a; --gold: #96690a; --goldbg:
  #fdf3d6; --code: #f3f2ee; --pos: 37, 99, 235; --neg: 220, 38, 38; --c0: #2f63d6; --c1: #e0761a;
  --c2: #14946f; --c3: #c2417f; --c4: #7b5bd0; --c5: #a98600; --c6: #2f9dc0; --c7: #7a7f8a; }
@media (prefers-color-scheme: dark) { :root { --bg: #131418; --card: #1b1d23; --ink: #e8e6e1;
  --muted: #9b9ea8; --line: #30333c; --accent: #8fb0ff; --good: #4fcf9f; --bad: #ff8d83; --gold:
  #edc35c; --goldbg: #332b14; --code: #23252d; --pos: 84, 140, 255; --neg: 248, 90, 82; --c0:
  #7ba2ff; --c1: #f79d4d; --c2: #43c59b; --c3: #ee7fb4; --c4: #ab92f5; --c5: #d8b83a; --c6:
  #62c6e6; --c7: #9ba0ac; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI",
  Helvetica, Arial, sans-serif; }
main { padding-top: .9rem; } .pct { display: inline-block; width: 3.4rem; }
main, .top, nav > div { max-width: 1180px; margin: 0 auto; padding-left: 1.25rem; padding-right:
  1.25rem; }
h1, h2 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif;
  font-weight: 600; line-height: 1.2; }
h1 { font-size: 2.1rem; margin: 1.6rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 2.4rem 0 .3rem; }
h3 { font-size: .93rem; margin: 0 0 .35rem; }
p.lead { color: var(--muted); margin: 0 0 .9rem; max-width: 76ch; }
.muted { color: var(--muted); } .good { color: var(--good); } .bad { color: var(--bad); }
nav { position: sticky; top: 0; z-index: 2; background: var(--bg); border-bottom: 1px solid
  var(--line); margin-top: 1rem; }
nav > div { display: flex; gap: 1.1rem; overflow-x: auto; padding-top: .5rem; padding-bottom:
  .5rem; font-size: .88rem; }
nav a { color: var(--muted); text-decoration: none; white-space: nowrap; } nav a:hover { color:
  var(--accent); }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .5rem 0 1.1rem; font-size:
  .88rem; }
.facts div { display: flex; gap: .45rem; } .facts dt { color: var(--muted); } .facts dd { margin:
  0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem;
  margin: 0 0 1rem; }
.figures > div, .card, details.box, .notes { background: var(--card); border: 1px solid
  var(--line); border-radius: 10px; }
.figures > div { padding: .75rem 1rem; } .figures b { display: block; font-size: 1.6rem;
  line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .figures span { font-size: .82rem; color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.card { margin: 0; padding: .9rem 1rem; min-width: 0; break-inside: avoid; } .card { display:
  flex; flex-direction: column; } .card svg.plot { margin-top: auto; }
.card.wide { grid-column: 1 / -1; } .card.wide th { white-space: normal; vertical-align: bottom; }
.grid + .grid { margin-top: 1rem; }
figcaption { font-size: .8rem; color: var(--muted); margin-top: .3rem; }
svg.plot { display: block; width: 100%; height: auto; font-family: system-ui, "Segoe UI",
  Helvetica, Arial, sans-serif; }
svg.plot * { stroke-linejoin: round; stroke-linecap: butt; }
svg.spark { width: 120px; height: 24px; display: block; } svg.spark path { fill: none; stroke:
  var(--c0); stroke-width: 1.3; stroke-linecap: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: 0 0 .35rem;
  padding: 0; font-size: .8rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.legend i { width: 1rem; height: .24rem; border-radius: 2px; background: currentColor; flex: none; }
.legend .d1 { background: repeating-linear-gradient(90deg, currentColor 0 6px, transparent 6px 8px); }
.legend .d2 { background: repeating-linear-gradient(90deg, currentColor 0 2px, transparent 2px 4px); }
.legend .d3 { background: repeating-linear-gradient(90deg, currentColor 0 6px, transparent 6px 7px,
  currentColor 7px 9px, transparent 9px 10px); }
.k0 { color: var(--c0); } .k1 { color: var(--c1); } .k2 { color: var(--c2); } .k3 { color:
  var(--c3); }
.k4 { color: var(--c4); } .k5 { color: var(--c5); } .k6 { color: var(--c6); } .k7 { color:
  var(--c7); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric:
  tabular-nums; }
th, td { padding: .34rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 550; color: var(--muted); font-size: .8rem; } tbody tr:last-child > * {
  border-bottom: 0; }
.l { text-align: left; } td.name { font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: .8rem; text-align: left; }
.share { display: inline-block; width: 120px; height: .55rem; background: var(--code);
  border-radius: 3px; overflow: hidden; }
.share i { display: block; height: 100%; background: currentColor; }
details.box { padding: .2rem 1rem; margin: .7rem 0; } details.box[open] { padding-bottom: 1rem; }
summary { cursor: pointer; } details.box > summary { padding: .5rem 0; font-weight: 550;
  overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 8px; padding: .9rem 1rem; overflow: auto;
  max-height: 32rem; font-size: .8rem; line-height: 1.45; margin: 0; unicode-bidi: isolate; }
.notes { padding: .6rem 1rem .6rem 2rem; font-size: .86rem; color: var(--gold); margin: 0 0 1rem;
  }
.empty { color: var(--muted); border: 1px dashed var(--line); border-radius: 10px; padding: .8rem
  1rem; }
.tools { display: none; flex-wrap: wrap; gap: .45rem; margin: .2rem 0 .8rem; } .js .tools {
  display: flex; }
button { font: inherit; font-size: .84rem; color: var(--ink); background: var(--card); border: 1px
  solid var(--line); border-radius: 99px; padding: .22rem .8rem; cursor: pointer; }
  button[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); font-weight:
  600; }
.chip { display: inline-block; font-size: .76rem; font-weight: 550; border: 1px solid var(--line);
  border-radius: 99px; padding: 0 .55rem; white-space: nowrap; max-width: 100%; overflow: hidden; text-overflow:
  ellipsis; vertical-align: bottom; } .chip.good { border-color:
  var(--good); } .chip.bad { border-color: var(--bad); }
.ask > summary { display: flex; flex-wrap: wrap; gap: .3rem .6rem; align-items: baseline;
  list-style: none; }
.ask > summary::-webkit-details-marker { display: none; } .ask > summary::before { content: "+";
  color: var(--muted); width: .8em; } .ask[open] > summary::before { content: "−"; } .ask >
  summary > span:first-of-type { flex: 1 1 26rem; }
.gives { font-size: .86rem; margin: 0 0 .7rem; color: var(--muted); overflow-wrap: anywhere; }
  .gives b { color: var(--ink); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr));
  gap: 1rem; align-items: start; }
.path { border-left: 3px solid var(--line); padding-left: .9rem; min-width: 0; } .path.good {
  border-color: var(--good); }
.path.bad { border-color: var(--bad); } .path, .path .turns { color: var(--ink); }
.path h4 { margin: 0 0 .5rem; font-size: .86rem; display: flex; flex-wrap: wrap; gap: .3rem .5rem;
  align-items: center; }
.turns { list-style: none; margin: 0; padding: 0; } .turns > li { margin: 0 0 .9rem; }
.n { font-size: .74rem; color: var(--muted); letter-spacing: .04em; }
.said { font: 12.5px/1.75 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--code); border-radius: 7px; padding: .45rem .65rem;
  unicode-bidi: isolate; }
.said i, .key i { font-style: normal; border-radius: 2px; padding: .12em 0; } .said .f, .key .f {
  color: var(--muted); opacity: .75; }
.said .u, .key .u { text-decoration: underline dotted var(--muted); text-underline-offset: .25em;
  }
.p1 { background: rgba(var(--pos), .14); } .p2 { background: rgba(var(--pos), .28); } .p3 {
  background: rgba(var(--pos), .42); }
.p4 { background: rgba(var(--pos), .58); } .n1 { background: rgba(var(--neg), .14); } .n2 {
  background: rgba(var(--neg), .28); }
.n3 { background: rgba(var(--neg), .42); } .n4 { background: rgba(var(--neg), .58); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .8rem; color: var(--muted);
  margin: 0 0 .8rem; align-items: center; } .star { color: var(--gold); } .ramp { display: flex;
  align-items: center; gap: .05rem; white-space: pre; }
.key i { display: inline-block; width: 1.5rem; height: .9rem; border-radius: 0; }
.did { margin: .35rem 0; font-size: .86rem; overflow-wrap: anywhere; } .did q { font-weight: 550;
  unicode-bidi: isolate; }
.got { list-style: none; margin: .2rem 0; padding: 0; font-size: .83rem; } .got li { border-left:
  2px solid var(--line); padding: .08rem .6rem; margin: .2rem 0; overflow-wrap: anywhere;
  unicode-bidi: isolate; } .got p { margin: .2rem 0; }
.got .gold { border-color: var(--gold); background: var(--goldbg); border-radius: 0 6px 6px 0; }
  .got .gold b { color: var(--gold); }
.card.wide th, .card.wide td { padding-left: .55rem; padding-right: .55rem; }
.step { border-left: 2px solid var(--line); margin: .35rem 0 .35rem .35rem; padding-left: .7rem; }
.cand > .step { margin-left: .1rem; border-color: var(--accent); }
.tree > .step { margin-left: 0; } .step.lost { border-left-style: dashed; }
h5 { margin: .1rem 0; font-size: .74rem; font-weight: 550; letter-spacing: .04em; color: var(--muted); }
.cands { list-style: none; margin: 0; padding: 0; } .cand > details { border-radius: 7px; }
.cand > details > summary { display: flex; flex-wrap: wrap; gap: .15rem .45rem; align-items: baseline;
  padding: .16rem .45rem; font-size: .86rem; list-style: none; border-radius: 7px; }
.cand > details > summary::-webkit-details-marker { display: none; } .cand > details > summary:hover {
  background: var(--code); }
.cand > details[open] { padding-bottom: .4rem; } .cand > details > :not(summary) { margin-left: 1.6rem;
  margin-right: .5rem; }
.chosen > details { background: color-mix(in srgb, var(--accent) 9%, transparent); box-shadow: inset 3px 0 0
  var(--accent); }
.chosen > details > summary .tease { font-weight: 550; } .mark { color: var(--accent); display: inline-block;
  min-width: 1em; }
.tease { flex: 1 1 18rem; min-width: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
.chip.forced { border: 1px dashed var(--muted); color: var(--muted); } .chip.star { border-color: var(--gold); }
.chip.total { border-color: var(--ink); } .key .chip { line-height: 1.35; }
td.sub { padding-left: 1.6rem; } tr.mean > * { background: var(--code); font-weight: 550; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; background: currentColor;
  margin-right: .4rem; } main a { color: var(--accent); }
.raw summary { font-size: .76rem; color: var(--muted); } .terms { display: flex; flex-wrap: wrap;
  gap: .3rem; }
footer { color: var(--muted); font-size: .8rem; margin: 2.5rem auto 1.5rem; }
@media (max-width: 760px) { .grid { grid-template-columns: minmax(0, 1fr); } body { font-size:
  14.5px; } h1 { font-size: 1.6rem; } }
@media print { :root { --bg: #fff; --card: #fff; --ink: #111; --muted: #555; --line: #ccc; --code:
  #f6f6f6; } body { font-size: 10pt; } nav, .tools { display: none !important; } details.box,
  .card { break-inside: avoid-page; } pre { max-height: none; white-space: pre-wrap; } * {
  print-color-adjust: exact; } .ask { break-inside: auto; } }
"""

SCRIPT = """
'use strict';
document.documentElement.classList.add('js');
const all = (s, r) => Array.from((r || document).querySelectorAll(s));
all('.tools').forEach(bar => {
  const boxes = all('.ask', bar.parentElement);
  bar.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (!button) return;
    const { open, kind } = button.dataset;
    if (open) { boxes.forEach(b => { b.open = open === 'yes'; }); return; }
    all('button[data-kind]', bar).forEach(
      b => b.setAttribute('aria-pressed', String(b === button)));
    boxes.forEach(b => { b.hidden = kind !== 'all' && b.dataset.kind !== kind; });
  });
});
addEventListener('beforeprint', () => all('.ask').forEach(b => { b.open = true; }));
"""


def policy() -> str:
  """Returns the Content-Security-Policy: nothing is loaded, and only SCRIPT, by its hash, runs."""
  digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  return ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
          f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
