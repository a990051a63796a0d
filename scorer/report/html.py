"""The parts of a web page that holds everything it shows, as HTML. What is given as text is escaped here.

Knows HTML and CSS; not what the page is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

# Nothing but what is in the page: no script, no request, not even by a link's base or a form.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #23272f; --soft: #646b78; --line: #dfe2e8; --back: #fff; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa2b1; --line: #353b46; --back: #15181d; --panel: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2rem 1.5rem 4rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .9rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.2rem; }
h3 { margin: .6rem 0 -.4rem; font-size: 1rem; }
.lead, .note, figcaption span, .role { color: var(--soft); }
.lead { margin: .4rem 0 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1.2rem; }
.grid > :not(figure, .wide) { grid-column: 1 / -1; }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 42rem; height: auto; margin: .6rem auto 0; }
figure svg text { font-family: inherit !important; }
figcaption b { display: block; overflow-wrap: anywhere; }
figcaption span { font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; overflow-wrap: break-word; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
td { overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
article { margin: 0; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
article p { margin: 0; overflow-wrap: anywhere; }
.head { font-size: .9rem; font-variant-numeric: tabular-nums; }
.role { margin-top: .6rem; font-size: .8rem; }
pre { margin: .2rem 0 0; padding: .6rem .8rem; max-height: 24rem; overflow: auto; border-radius: 6px;
  background: var(--panel); font: .85rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
article .role { margin-top: .6rem; }
details { margin: 0 0 .6rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
@media print { pre { max-height: none; } figure, article { break-inside: avoid; } }
</style>
</head>
<body>
<header><h1>$title</h1><p class="lead">$lead</p></header>
<main>
$sections
</main>
</body>
</html>
""")


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole page; `sections` are HTML."""
    parts = "\n".join(filter(None, sections))
    return PAGE.substitute(policy=POLICY, title=escape(title), lead=escape(lead), sections=parts)


def section(title: str, *parts: str) -> str:
    """A section of `parts`, which are HTML; "" where there are none."""
    inner = "\n".join(filter(None, parts))
    return f'<section>\n<h2>{escape(title)}</h2>\n<div class="grid">\n{inner}\n</div>\n</section>' if inner else ""


def figure(svg: str, title: str, text: str) -> str:
    """A picture, given as HTML, with its title and a line about it."""
    return f"<figure><figcaption><b>{escape(title)}</b><span>{escape(text)}</span></figcaption>\n{svg}</figure>"


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column names the rows."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def details(title: str, text: str) -> str:
    """A text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def digits(value: float) -> str:
    """A number as a table shows it: whole, or to four digits."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:,.4g}"
