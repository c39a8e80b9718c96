"""The style sheet of a report: light and dark, from a phone to a desk, and paper."""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5a6068; --line: #d9dce0; --box: #f4f5f7;
  --mark: #0063a0; --wrong: #a34700; --fill: #1f83c0; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e8e6e3; --soft: #a9adb3; --line: #3a4048; --box: #1f2429;
    --mark: #56b4e9; --wrong: #ff9d57; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.lead { font-size: 1.1rem; max-width: 46rem; }
p, li { max-width: 46rem; }
.notes { padding-left: 1.2rem; color: var(--soft); font-size: .92rem; }
figure { margin: 0; }
figure > svg { display: block; width: 100%; height: auto; }
.narrow { display: none; } svg.long { max-width: 28rem; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 46rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: .5rem 0; margin: 1rem 0 0; list-style: none;
  border: solid var(--line); border-width: 1px 0; }
nav a, .links a { display: inline-block; padding: .2rem 0; }
a { color: var(--mark); }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--box); border-radius: 4px; padding: .5rem .8rem; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: .85rem; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.bar { display: block; height: 5px; margin-top: 3px; background: var(--line); min-width: 3rem; }
.bar i { display: block; height: 100%; background: var(--fill); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.2rem .8rem; padding: 0;
  list-style: none; font-size: .88rem; line-height: 1.35; }
.sheet li { break-inside: avoid; max-width: none; }
.sheet img { width: 6rem; height: auto; image-rendering: pixelated; background: var(--box); margin-bottom: .3rem; }
.sheet small { color: var(--soft); display: block; font-size: .8rem; }
.right { color: var(--mark); } .wrong { color: var(--wrong); }
caption { text-align: left; font-weight: 600; padding: .6rem 0 .2rem; }
caption.hidden { padding: 0; }
.scroll { overflow-x: auto; margin: .5rem 0; position: relative; }
table { border-collapse: collapse; font-size: .95rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th[scope=row] { font-weight: normal; }
.numbers td { white-space: nowrap; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums;
  padding-left: .6rem; }
td small, th small { display: block; color: var(--soft); font-size: .8rem; white-space: nowrap; }
pre { background: var(--box); padding: .8rem; overflow-x: auto; border-radius: 4px; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
td code { overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--mark); padding: .2rem 0; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 40rem) {
  th, td { padding-right: .25rem; } .numbers td, .numbers thead th:not(:first-child) { padding-left: .2rem; }
  table { font-size: .79rem; } td small, th small { font-size: .72rem; }
  thead small { white-space: normal; } h1 { font-size: 1.5rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .skip { display: none; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; } h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .bar, .bar i, svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
@media screen and (max-width: 40rem) { .wide { display: none; } .narrow { display: block; } }
"""
