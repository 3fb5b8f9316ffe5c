"""The HTML page: it stands alone, escapes every text, and shades what is active."""

from html.parser import HTMLParser

import pytest

from fastsae.interpret import Bar, LatentPage, Snippet, TokenEffect, render_report
from fastsae.interpret.report import Fact

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "line", "rect", "link", "br", "img"}


class Reader(HTMLParser):
    """Collects elements and their text, and fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def render(**changes):
    snippet = Snippet(tokens=["a ", EVIL, "\n", " b"], activations=[0.0, 5.0, 0.001, 2.5], peak=1)
    page = LatentPage(3, 0.004, 5.0, [snippet], [TokenEffect(EVIL, 1.5), TokenEffect(" in", 1.0)])
    arguments = {
        "title": EVIL,
        "subtitle": EVIL,
        "facts": [Fact(EVIL, EVIL, EVIL)],
        "timing": [],
        "details": {EVIL: EVIL},
        "histogram": [Bar(1e-3, 1e-2, 5), Bar(1e-2, 1e-1, 7)],
        "pages": [page],
    }
    return render_report(**arguments | changes)


@pytest.fixture
def reader():
    reader = Reader()
    reader.feed(render())
    return reader


def test_tags_nest_and_ids_are_unique(reader):
    assert reader.open == []
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in reader.attributes("a")]
    assert links
    assert all(link.removeprefix("#") in ids for link in links)
    labels = [attributes["aria-labelledby"] for _, attributes in reader.elements if "aria-labelledby" in attributes]
    assert all(label in ids for group in labels for label in group.split())


def test_every_text_is_escaped(reader):
    assert not reader.attributes("script")
    text = "".join(reader.text)
    # Title twice, subtitle, a fact's three texts, a detail's two, a snippet's token, a raised token.
    assert text.count(EVIL) == 10


def test_nothing_is_loaded_from_elsewhere(reader):
    for tag, attributes in reader.elements:
        assert tag not in ("link", "img", "iframe", "object")
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in render()
    assert "@import" not in render()


def test_shade_follows_the_activation_and_the_peak_stands_out(reader):
    marks = [attributes["class"] for attributes in reader.attributes("mark")]
    assert marks == ["s10 peak", "s1", "s5"]


def test_blanks_can_be_seen(reader):
    text = "".join(reader.text)
    assert "↵" in text
    assert "·in" in text


def test_a_page_without_anything_to_show_says_so():
    page = render(pages=[], histogram=[])
    assert "No latent fired" in page
    assert "None fired often enough" in page
