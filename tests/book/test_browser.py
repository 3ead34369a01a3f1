"""The rendered book in a real Chromium, without a network: what a reader meets on every page.

Pages are served on localhost; a request to anywhere else is refused and recorded. Without a Chromium the tests are
left out with a line that says so, or fail where REQUIRE_BROWSER=1.
"""

import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from PIL import Image, ImageStat

from tools.browser import DESKTOP, HTML, MEND, PHONE, find, launched, open_context, open_page, pages, served
from tools.measures import LINE

PAGES = pages()
DARK = 0.3  # mean lightness of a figure at night; white paper has 1, the page's ground 0.07
WORDS = ["attention", "router"]  # what a reader would look for first


@pytest.fixture(scope="session")
def browser():
    executable = find()
    if executable is None:
        message = f"browser tests: NOT RUN (no Chromium; mend it with {MEND})"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with launched(executable) as running:
        yield running


@pytest.fixture(scope="session")
def address():
    assert HTML.is_dir(), "no rendered book: run `make book`"
    with served() as address:
        yield address


@pytest.fixture(scope="session")
def contexts(browser):
    return {
        "light": open_context(browser, **DESKTOP),
        "dark": open_context(browser, dark=True, **DESKTOP),
        "phone": open_context(browser, **PHONE),
    }


@pytest.fixture
def visit(contexts, address):
    """Open a page as it looks light, dark or on a phone."""
    opened = []

    def visit(name, look="light"):
        opened.append(open_page(contexts[look], address, name))
        return opened[-1]

    yield visit
    for page in opened:
        page.close()


every_page = pytest.mark.parametrize("name", PAGES)


@every_page
def test_page_is_whole(visit, name):
    """No console error, no request that leaves; mathematics typeset; pictures loaded, described and legible."""
    page = visit(name)
    assert page.said == [], "console errors"
    assert page.left == [], "requests that leave the page"
    formulas = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= formulas, "mathematics that is not typeset"
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, "formulas with an error"
    raw = page.evaluate(r"document.querySelector('article').innerText.match(/\$\$|\\\(|\\begin\{|\{math\}/g)")
    assert raw is None, "formulas shown as source"
    pictures = page.evaluate(
        """[...document.querySelectorAll('.bd-article img')].map(i => [i.getAttribute('src'), i.naturalWidth, i.alt])"""
    )
    assert [src for src, width, _ in pictures if not width] == [], "pictures that do not load"
    # Sphinx fills a missing alt with the file's name.
    unnamed = [src for src, _, alt in pictures if not alt.strip() or alt == src or re.fullmatch(r"\S+\.(svg|png)", alt)]
    assert unnamed == [], "pictures without alt text"
    legible(page)


@every_page
def test_page_fits_a_phone(visit, name):
    page = visit(name, "phone")
    width = page.evaluate("document.scrollingElement.scrollWidth")
    wide = page.evaluate(
        """() => [...document.querySelectorAll('.bd-article *')].filter(node => {
            if (node.getBoundingClientRect().right <= innerWidth + 1) return false;
            for (let p = node.parentElement; p; p = p.parentElement)
                if (/auto|scroll|hidden/.test(getComputedStyle(p).overflowX) && p !== document.body) return false;
            return true;
        }).slice(0, 5).map(node => node.outerHTML.slice(0, 120))"""
    )
    assert width <= 390 and wide == [], f"{width} pixels wide: {wide}"


CONTRAST = """async () => {
    const light = ([r, g, b]) => {
        const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    };
    const ground = node => {
        for (let p = node; p; p = p.parentElement) {
            const colour = getComputedStyle(p).backgroundColor;
            if (colour !== 'transparent' && !/, 0\\)$/.test(colour)) return colour;
        }
        return getComputedStyle(document.documentElement).backgroundColor;
    };
    const found = [];
    for (const image of document.querySelectorAll('.bd-article img')) {
        if (getComputedStyle(image).display === 'none') continue;
        const canvas = document.createElement('canvas');
        canvas.width = Math.min(image.naturalWidth, 800);
        canvas.height = Math.max(1, Math.round(canvas.width * image.naturalHeight / image.naturalWidth));
        const draw = canvas.getContext('2d', {willReadFrequently: true});
        draw.fillStyle = ground(image);
        draw.fillRect(0, 0, canvas.width, canvas.height);
        const look = getComputedStyle(image);  // at night light and dark change places, and the ground shines through
        draw.filter = look.filter;
        draw.globalCompositeOperation = look.mixBlendMode === 'normal' ? 'source-over' : look.mixBlendMode;
        draw.drawImage(image, 0, 0, canvas.width, canvas.height);
        const pixels = draw.getImageData(0, 0, canvas.width, canvas.height).data;
        const lights = [];
        for (let i = 0; i < pixels.length; i += 4) lights.push(light(pixels.slice(i, i + 3)));
        lights.sort((a, b) => a - b);
        const low = lights[Math.floor(lights.length * 0.002)], high = lights[Math.floor(lights.length * 0.998)];
        found.push({src: image.getAttribute('src'), contrast: (high + 0.05) / (low + 0.05)});
    }
    return found;
}"""


def legible(page):
    """Ink and ground of every figure, as composed on the page, differ by 4.5 : 1 or more."""
    for figure in page.evaluate(CONTRAST):
        assert figure["contrast"] >= 4.5, figure


@every_page
def test_figures_are_legible_in_the_dark(visit, name):
    """And none is a white slab: what the screen shows of a figure is hardly lighter than the page."""
    page = visit(name, "dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    legible(page)
    for figure in page.locator(".bd-article img").all():
        if figure.is_visible():
            seen = Image.open(io.BytesIO(figure.screenshot())).convert("L")
            light = ImageStat.Stat(seen).mean[0] / 255
            assert light < DARK, f"{figure.get_attribute('src')} is {light:.2f} light at night"


NARROWEST = """() => {
    document.querySelectorAll('details').forEach(fold => fold.open = true);
    document.querySelectorAll('.toggle-hidden').forEach(fold => fold.classList.remove('toggle-hidden'));
    const fit = pre => {
        const ruler = pre.appendChild(document.createElement('span'));
        ruler.textContent = '0'.repeat(50);
        const width = ruler.getBoundingClientRect().width / 50, look = getComputedStyle(pre);
        ruler.remove();
        return (pre.clientWidth - parseFloat(look.paddingLeft) - parseFloat(look.paddingRight)) / width;
    };
    return Math.min(...[...document.querySelectorAll('.bd-article :is(.cell_input, .cell_output) pre')]
        .filter(pre => pre.offsetParent).map(fit));
}"""


@pytest.mark.parametrize("name", [name for name in PAGES if re.match(r"book/\d", name)])
def test_a_line_of_the_guide_fits_every_box(visit, name):
    assert visit(name).evaluate(NARROWEST) >= LINE


def test_text_is_legible_in_the_dark(visit):
    page = visit(PAGES[0], "dark")
    colours = page.evaluate(
        "[getComputedStyle(document.querySelector('article p')).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, ground = (sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3 for colour in colours)
    assert ink > 150 and ground < 60, colours


@every_page
def test_keyboard_reaches_the_content(visit, name):
    """The first Tab is the way past the menus; Enter goes to the content, where the next links are."""
    page = visit(name)
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.innerText.trim()")
    assert "skip" in focused.lower(), f"the first Tab goes to {focused!r}"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    where = page.evaluate("!!document.activeElement.closest('main, #main-content, .bd-content, footer')")
    assert where, page.evaluate("document.activeElement.outerHTML.slice(0, 200)")


@pytest.mark.parametrize("word", WORDS)
def test_search_finds(visit, word):
    sources = [(HTML / "_sources" / name).with_suffix("") for name in PAGES]
    having = [s for s in sources for f in s.parent.glob(s.name + ".*") if re.search(rf"\b{word}", f.read_text(), re.I)]
    if word != "attention" and not having:
        pytest.skip(f"no page has the word {word!r} yet")
    page = visit(f"search.html?q={word}")
    page.wait_for_selector("#search-results li", timeout=15_000)
    links = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
    assert any(Path(urlparse(link).path).with_suffix("").name in {s.name for s in having} for link in links), links
    assert page.said == [] and page.left == []


def test_the_first_page_is_the_address_itself(contexts, address):
    page = contexts["light"].new_page()
    page.goto(f"{address}/index.html")
    page.wait_for_url(f"**/{PAGES[0]}", timeout=15_000)
    page.close()


def test_other_addresses_cannot_be_reached(contexts, address):
    """The wall and the record that the tests above rely on."""
    page = open_page(contexts["light"], address, PAGES[0])
    for url in ("http://example.invalid/", "http://127.0.0.2:9/"):
        assert page.evaluate("url => fetch(url, {mode: 'no-cors'}).then(() => 'came', () => 'failed')", url) == "failed"
        assert page.left[-1] == url
    page.close()


# ---- links: no browser needed


class _Anchors(HTMLParser):
    """Links, ids and what a page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source", "video") and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("href"):
            self.loads.append(attrs["href"])


@pytest.fixture(scope="session")
def anchors():
    assert HTML.is_dir(), "no rendered book: run `make book`"
    return {path: _Anchors(path.read_text()) for path in HTML.rglob("*.html") if "_static" not in path.parts}


def test_every_page_of_the_contents_is_rendered(anchors):
    assert PAGES and [name for name in PAGES if HTML / name not in anchors] == []


def test_every_internal_link_leads_somewhere(anchors):
    lost = []
    for path, page in anchors.items():
        for link in page.links:
            url, anchor = urldefrag(link)
            if urlparse(url).scheme or url.startswith("//"):
                continue
            target = (path.parent / unquote(urlparse(url).path)).resolve() if url else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                lost.append(f"{path.relative_to(HTML)} -> {link}")
            elif anchor and target in anchors and unquote(anchor) not in anchors[target].ids | {"top"}:
                lost.append(f"{path.relative_to(HTML)} -> {link} (no such anchor)")
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(anchors):
    foreign = {(path.name, url) for path, page in anchors.items() for url in page.loads if urlparse(url).netloc}
    assert foreign == set()
