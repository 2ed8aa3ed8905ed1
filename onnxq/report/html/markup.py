"""HTML from Python: what is not markup already is escaped, so names of nodes and files can hold anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TypeAlias

VOID = {"meta", "link", "input", "br"}
"""Elements without content or end tag."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Content: TypeAlias = "str | int | Iterable[Content] | None"
"""What an element holds: text is escaped, `Html` is not, None is nothing, iterables are joined."""


def tag(kind: str, *content: Content, **attributes: object) -> Html:
    """One element.

    Args:
        kind: Its name, and behind a dot its class: "td.number".
        *content: What it holds.
        **attributes: `aria_label` becomes aria-label, `for_` becomes for; True stands alone, None and False are left
            out.
    """
    name, _, classes = kind.partition(".")
    given = {"class": classes.replace(".", " ") or None, **attributes}
    words = [
        name,
        *(_attribute(key, value) for key, value in given.items() if value is not None and value is not False),
    ]
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in VOID else f"{opened}{join(content)}</{name}>")


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return name if value is True else f'{name}="{escape(str(value))}"'


def join(content: Content) -> Html:
    """All parts as one piece of markup."""
    if content is None:
        return Html()
    if isinstance(content, Html):
        return content
    if isinstance(content, str | int):
        return Html(escape(str(content)))
    return Html("".join(join(part) for part in content))


def table(headings: Sequence[str], rows: Iterable[Sequence[Content]], caption: str, kind: str = "table") -> Html:
    """A table that scrolls sideways where it must and becomes a list of cards on a phone.

    Args:
        headings: One per column; the first column names the row.
        rows: Cells.
        caption: Says what it shows.
        kind: The element and its classes.
    """
    head = tag("thead", tag("tr", (tag("th", heading, scope="col") for heading in headings)))
    return tag(
        "div.scroll",
        tag(kind, tag("caption", caption), head, tag("tbody", (_row(headings, cells) for cells in rows))),
        role="region",
        tabindex=0,
        aria_label=caption,
    )


def _row(headings: Sequence[str], cells: Sequence[Content]) -> Html:
    first = tag("th", cells[0], scope="row")
    rest = (tag("td", cell, data_label=name) for name, cell in zip(headings[1:], cells[1:], strict=True))
    return tag("tr", first, rest)


def section(anchor: str, heading: str, *content: Content) -> Html:
    """A part of the page with a heading that can be linked to; nothing where `content` is empty."""
    inside = join(content)
    if not inside:
        return Html()
    return tag(
        "section", tag("h2", heading, id=f"{anchor}-heading"), inside, id=anchor, aria_labelledby=f"{anchor}-heading"
    )


def page(
    title: str, header: Html, parts: Sequence[tuple[str, str, Html]], footer: str, document: str | None = None
) -> str:
    """A whole document.

    Args:
        title: Of the window.
        header: In front of everything.
        parts: (anchor, word in the navigation, section); empty sections are left out.
        footer: Behind everything.
        document: JSON that the page carries for programs.
    """
    style, script = (_resource(name) for name in ("style.css", "table.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style)),
    )
    shown = [part for part in parts if part[2]]
    body = tag(
        "body",
        tag("a.skip", "Skip to the report", href="#main"),
        tag("header", header),
        tag("nav", (tag("a", word, href=f"#{anchor}") for anchor, word, _ in shown), aria_label="Parts of the report"),
        tag("main", (content for _, _, content in shown), id="main"),
        tag("footer", footer),
        _data(document),
        tag("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _data(document: str | None) -> Html | None:
    """JSON in a page; no string in it can end the element."""
    if document is None:
        return None
    return tag("script", Html(document.replace("<", "\\u003c")), type="application/json", id="document")


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The only inline style or script that the browser may use."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
