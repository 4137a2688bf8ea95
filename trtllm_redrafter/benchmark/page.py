"""The HTML page of a report: a single file without external resources, for light and dark, wide and narrow screens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_COLOURS = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #ffffff; --ink: #1d2126; --soft: #5b6470; --faint: #c9ced6;
  --accent: #1c6fd1; --second: #c2570c; --good: #12743b; --bad: #b3261e; --open: #7a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e7eaee; --soft: #a3acb8;
  --faint: #434b56; --accent: #6fb1ff; --second: #ffa45c; --good: #6bd394; --bad: #ff8b80; --open: #e8c35a; } }
""".strip()

_STYLE = (
    _COLOURS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.verdict { background: var(--card); border: 1px solid var(--faint); border-left: .4rem solid var(--open);
  border-radius: .5rem; padding: .7rem 1rem; margin: .7rem 0; }
.verdict b { font-size: 1.1rem; }
.verdict.go { border-left-color: var(--good); } .verdict.go b { color: var(--good); }
.verdict.no-go { border-left-color: var(--bad); } .verdict.no-go b { color: var(--bad); }
.verdict.open b { color: var(--open); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
figure { background: var(--card); border: 1px solid var(--faint); border-radius: .5rem; margin: 0; padding: .8rem; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figcaption small { display: block; font-weight: 400; color: var(--soft); }
.table { overflow-x: auto; border: 1px solid var(--faint); border-radius: .5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tr:last-child td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.25; }
table.facts td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
table.facts td:first-child { white-space: nowrap; color: var(--soft); position: static; }
@media (max-width: 34rem) { main { padding: 1rem .7rem 3rem; } h1 { font-size: 1.35rem; }
  th, td { padding: .35rem .5rem; } figure { padding: .5rem; } }
"""
).strip()


def page(title: str, parts: Sequence[str]) -> str:
    """A complete HTML document."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def verdict_box(answer: str, title: str, text: str) -> str:
    kind = answer if answer in ("go", "no-go") else "open"
    return f'<div class="verdict {kind}"><b>{escape(title)}</b><br>{escape(text)}</div>'


def plots(entries: Sequence[tuple[str, str, str]]) -> str:
    """(caption, explanation, svg) each, side by side if the screen is wide enough."""
    cells = [
        f"<figure><figcaption>{escape(caption)}<small>{escape(text)}</small></figcaption>{svg}</figure>"
        for caption, text, svg in entries
    ]
    return f'<div class="plots">{"".join(cells)}</div>'


def picture(svg: str) -> str:
    """A plot as an SVG file of its own, for Markdown, with the page's colours and a background."""
    attributes, _, drawing = svg.removeprefix("<svg").partition(">")
    style = f"<style>{_COLOURS} svg {{ font-family: sans-serif; }}</style>"
    card = '<rect width="100%" height="100%" fill="var(--card)"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg"{attributes}>{style}{card}{drawing}\n'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers right-aligned, names left-aligned; wide tables scroll on their own."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="table"><table class="facts"><tbody>{body}</tbody></table></div>'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded to be readable in a terminal, too; the first column is left-aligned, the others are right-aligned."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    first, *others = (max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True))
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    padded = [[line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))
