"""The style sheet of a report: light and dark, from a phone to a desk, and paper."""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5a6068; --line: #d9dce0; --box: #f4f5f7;
  --mark: #0063a0; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e8e6e3; --soft: #a9adb3; --line: #3a4048; --box: #1f2429; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.lead { font-size: 1.1rem; max-width: 46rem; }
p, li { max-width: 46rem; }
ul { padding-left: 1.2rem; color: var(--soft); font-size: .92rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 46rem; }
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
  table { font-size: .79rem; } td small, th small { font-size: .72rem; } }
"""
