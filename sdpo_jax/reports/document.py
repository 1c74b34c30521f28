"""A page as a list of parts, rendered as self-contained HTML and as Markdown."""

import dataclasses
import html
import re
from collections.abc import Sequence

from sdpo_jax.reports.markdown import fenced, plain
from sdpo_jax.reports.tables import markdown as markdown_table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 74rem; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem; }
h2 { border-top: 1px solid #ddd; padding-top: 1.5rem; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid #e5e5e5; }
td { white-space: pre; }
th { vertical-align: bottom; border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; margin-top: 1rem; }
pre { background: #f6f6f6; padding: .7rem; white-space: pre-wrap; font-size: .8rem; }
figure { display: inline-block; max-width: 31rem; margin: 1rem .5rem 0 0; }
figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .875rem; }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Notes:
    """A list of short lines."""

    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """A header and rows. A line break within a cell is one in HTML, and a space in Markdown."""

    cells: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG element with all text escaped; left out of Markdown."""

    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Commands:
    """Shell commands."""

    lines: Sequence[str]


Part = Heading | Text | Notes | Table | Picture | Commands


def to_html(title: str, parts: Sequence[Part]) -> str:
    body = "\n".join(map(_html, parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escaped(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    texts = [_markdown(part) for part in parts]
    return "\n\n".join([f"# {plain(title)}", *filter(None, texts)]) + "\n"


def _escaped(text: str) -> str:
    return html.escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text))


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Text(text):
            return f"<p>{_escaped(text)}</p>"
        case Notes(lines):
            items = "".join(f"<li>{_escaped(line)}</li>" for line in lines)
            return f'<ul class="note">{items}</ul>'
        case Table(cells):
            return _html_table(cells)
        case Picture(svg, caption):
            return f"<figure>{svg}<figcaption>{_escaped(caption)}</figcaption></figure>"
        case Commands(lines):
            return f"<pre>{_escaped(chr(10).join(lines))}</pre>"


def _html_table(cells: Sequence[Sequence[str]]) -> str:
    def line(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in row) + "</tr>"

    rows = [line("th", cells[0]), *(line("td", row) for row in cells[1:])]
    return '<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {plain(text)}"
        case Text(text):
            return plain(text)
        case Notes(lines):
            return "\n".join(f"- {plain(line)}" for line in lines)
        case Table(cells):
            return "\n".join(markdown_table([list(map(_cell, row)) for row in cells]))
        case Picture():
            return ""
        case Commands(lines):
            return fenced("\n".join(lines))


def _cell(text: str) -> str:
    """Numbers are not escaped: brackets without parentheses are not a link."""
    return text if re.fullmatch(r"[-+–@%.,'\[\]\w ]*|<[\d.]+", text) else plain(text)
