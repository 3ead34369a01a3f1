"""Links that the book makes by itself: what becomes one, what stays text, and a small book really built."""

import re

import pytest
import yaml
from docutils import nodes
from sphinx.application import Sphinx

from tools.book import PACKAGE
from tools.links import claims, pieces

PAGES = {2: "two", 3: "three", 4: "four", 12: "twelve"}


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("as chapter 3 says", {"chapter 3": "three"}),
        ("Chapter 3's", {"Chapter 3": "three"}),
        ("in chapter\n3.", {"chapter\n3": "three"}),
        ("chapters 3 and 4 do", {"chapters 3": "three", "4": "four"}),
        ("Chapters 2 to 4", {"Chapters 2": "two", "4": "four"}),
        ("chapters 2, 3, and 12", {"chapters 2": "two", "3": "three", "12": "twelve"}),
        ("chapters 5 and 12", {"12": "twelve"}),  # 5 is not written
        ("chapter 2, 3 of them", {"chapter 2": "two"}),
        ("chapters 2 to 4, 12.5 of them", {"chapters 2": "two", "4": "four"}),
        ("chapter 13 and chapter 32, chapter 3.2, subchapter 3", {}),
    ],
)
def test_what_leads_to_a_chapter(text, links):
    found = pieces(text, PAGES)
    assert {piece: page for piece, page in found if page} == links
    assert "".join(piece for piece, _ in found) == text


def test_an_id_is_its_row_or_the_first_of_its_family():
    meant = claims()
    names = [row["id"] for row in yaml.safe_load((PACKAGE / "paper" / "claims.yml").read_text())]
    assert all(meant[name] == name for name in names)
    assert "A25" not in names and meant["A25"] == next(name for name in names if name.startswith("A25-"))
    assert len({nodes.make_id(name) for name in names}) == len(names), "anchors"


def test_a_small_book(tmp_path):
    """The titles, the sidebar, prose, what is left alone, and the ledger's anchors."""
    pages = {
        "index": "# Contents\n\n```{toctree}\n:glob:\n\nbook/*\n```\n",
        "book/02-multi-head-attention": "# Multi-head attention\n\n## After chapter 3\n\nAs chapter 2 and chapter 3 "
        "say, `chapter 3`, [chapter 3](ledger), `A25-batch`, `A25`, `A99`.\n",
        "book/03-latent-attention": "# Latent attention\n\n    chapter 2\n",
        "book/ledger": "# The ledger\n\n[`A25-batch`]{#A25-batch}\n",
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.md").write_text(text)
    settings = {"extensions": ["myst_parser", "tools.links"], "myst_enable_extensions": ["attrs_inline"]}
    out = tmp_path / "out"
    Sphinx(tmp_path, None, out, tmp_path / "trees", "html", settings, status=None, warningiserror=True).build()
    html = {name: (out / f"{name}.html").read_text() for name in pages}
    second = html["book/02-multi-head-attention"]
    article = second[second.index('role="main"') : second.index("sphinxsidebar")]
    assert re.search(r'<h1><span class="chapter-number">2\xa0</span>Multi-head attention', article)
    assert '<span class="chapter-number">3\xa0</span>Latent attention</a>' in html["index"]
    links = re.findall(r'<a class="reference internal" href="([^"]*)">(.*?)</a>', article)
    text = [(where, re.sub("<.*?>", "", said)) for where, said in links]
    first = nodes.make_id(claims()["A25"])
    assert text == [
        ("03-latent-attention.html", "chapter 3"),
        ("ledger.html", "chapter 3"),
        ("ledger.html#a25-batch", "A25-batch"),
        (f"ledger.html#{first}", "A25"),
    ]
    assert 'id="a25-batch"' in html["book/ledger"]
    assert re.search(r"<pre>.*chapter 2", html["book/03-latent-attention"], re.DOTALL)
