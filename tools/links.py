"""A Sphinx extension for the book: chapters by their numbers, claims by their ids.

The title of a chapter begins with its number, in the sidebar too. In prose "chapter 3" and "chapters 3 and 4" lead to
the chapters that are written, and an id of the ledger in backticks leads to its row. Titles, code and links stay.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from tools.book import PACKAGE, plan

LEDGER_PAGE = "book/ledger"
_NUMBER = r"\d+(?!\d|[.,]\d)"
_MORE = rf"(?:(?:,\s+|,?\s+(?:and|or|to)\s+){_NUMBER})*"
CHAPTERS = re.compile(rf"\b[Cc]hapters\s+{_NUMBER}{_MORE}|\b[Cc]hapter\s+{_NUMBER}")
LEFT_ALONE = (
    nodes.title,
    nodes.rubric,
    nodes.term,
    nodes.literal,
    nodes.literal_block,
    nodes.math,
    nodes.math_block,
    nodes.raw,
    nodes.reference,
    nodes.citation,
    addnodes.pending_xref,
)


def written() -> dict[int, str]:
    """The chapters that are there, by number: "book/03-latent-attention"."""
    return {chapter.number: f"book/{chapter.page}" for chapter in plan() if chapter.written}


def claims() -> dict[str, str]:
    """The id of the row that an id means; A2, where no row is called that, means the first of A2-*."""
    rows = yaml.safe_load((PACKAGE / "paper" / "claims.yml").read_text(encoding="utf-8"))
    names = [row["id"] for row in rows]
    meant: dict[str, str] = {}
    for name in names:
        parts = name.split("-")
        for n in range(1, len(parts)):
            meant.setdefault("-".join(parts[:n]), name)
    return meant | {name: name for name in names}


def pieces(text: str, pages: dict[int, str]) -> list[tuple[str, str | None]]:
    """A text in pieces, each with the page that it leads to, or None: "chapter 3" as a whole, of a list the numbers."""
    found, end = [], 0
    for match in CHAPTERS.finditer(text):
        for number in re.finditer(r"\d+", match[0]):
            page = pages.get(int(number[0]))
            if page:
                first = number.start() == re.search(r"\d", match[0]).start()
                start = match.start() + (0 if first else number.start())
                found += [(text[end:start], None), (text[start : match.start() + number.end()], page)]
                end = match.start() + number.end()
    return [(piece, page) for piece, page in [*found, (text[end:], None)] if piece]


def _number_title(app: Sphinx, doctree: nodes.document) -> None:
    numbers = {page: number for number, page in written().items()}
    title = next(doctree.findall(nodes.title), None)
    number = numbers.get(app.env.docname)
    if number and title is not None:
        title.insert(0, nodes.inline("", f"{number}\N{NO-BREAK SPACE}", classes=["chapter-number"]))


def _link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    def reference(page: str, anchor: str, *inside: nodes.Node) -> nodes.reference:
        address = app.builder.get_relative_uri(docname, page) + anchor
        return nodes.reference("", "", *inside, internal=True, refuri=address)

    def free(node: nodes.Node) -> bool:
        above = node.parent
        while above is not None and not isinstance(above, LEFT_ALONE):
            above = above.parent
        return above is None

    pages = {number: page for number, page in written().items() if page != docname}
    for text in list(doctree.findall(nodes.Text)):
        parts = pieces(str(text), pages)
        if any(page for _, page in parts) and free(text):
            new = [reference(page, "", nodes.Text(part)) if page else nodes.Text(part) for part, page in parts]
            text.parent.replace(text, new)
    if docname != LEDGER_PAGE and LEDGER_PAGE in app.env.found_docs:
        rows = claims()
        for literal in list(doctree.findall(nodes.literal)):
            row = rows.get(literal.astext())
            if row and free(literal):
                literal.parent.replace(literal, reference(LEDGER_PAGE, f"#{nodes.make_id(row)}", literal.deepcopy()))


def setup(app: Sphinx) -> dict:
    # A new chapter, a claim or a line of this file changes links on any page: then Sphinx reads all of them again.
    state = repr((written(), claims(), Path(__file__).read_text(encoding="utf-8")))
    app.add_config_value("moemla_links", state, "env", [str])
    app.connect("doctree-read", _number_title, priority=100)  # before the titles are collected for the sidebar
    app.connect("doctree-resolved", _link)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
