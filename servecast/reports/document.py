"""The parts that all pages of a report share: the document around the sections, and its small building blocks.

A page is one file: its style sheets are embedded, there is no script, and a content security policy forbids every load.
What these functions are given as text is escaped here; what they are given as markup (sections, charts, cells) is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources

from servecast.reports.formats import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_JOINTS = ("× ", "≤ ", "tp ", "pp ")
_UNITS = "µs|ms|s|min|h|USD/h|req/s|tok/s|%"


def document(title: str, sections: Iterable[str], *, styles: Sequence[str] = ("plan_page.css",)) -> str:
    """A complete HTML document; `styles` are files beside this one, sections that are empty are left out."""
    sheets = (resources.files("servecast.reports").joinpath(name).read_text(encoding="utf-8") for name in styles)
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>\n{''.join(sheets)}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def header(eyebrow: str, answer: str, below: str) -> str:
    """The answer in one sentence, what it is about above it, and one remark below."""
    return (
        f'<header>\n<p class="eyebrow">{escape(eyebrow)}</p>\n<h1>{escape(unbroken(answer))}</h1>\n'
        f'<p class="below">{escape(below)}</p>\n</header>\n'
    )


def figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def tile(name: str, value: str, *notes: str, over: bool = False) -> str:
    """One large number with what belongs to it; `over` where it is above a limit."""
    state = "value over" if over else "value"
    lines = "".join(f"<dd>{escape(note)}</dd>" for note in notes)
    return f'<div class="tile"><dt>{escape(name)}</dt><dd class="{state}">{escape(value)}</dd>{lines}</div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what is said of them; both are text."""
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<dl class="facts">{entries}</dl>'


def table(label: str, heads: str, rows: str) -> str:
    """A table that scrolls inside its own box, by keyboard too."""
    return (
        f'<div class="table" role="region" aria-label="{escape(label)}" tabindex="0"><table><thead><tr>{heads}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def unbroken(sentence: str) -> str:
    """No line may end between a number and what belongs to it."""
    for joint in _JOINTS:
        sentence = sentence.replace(joint, joint.replace(" ", "\u00a0"))
    return re.sub(rf"(\d) ({_UNITS})(?!\w)", "\\1\u00a0\\2", sentence)


def listed(parts: Sequence[str]) -> str:
    """Words in a row.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
