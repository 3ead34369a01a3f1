"""A Chromium for the tests of the rendered book, and a door through which it sees nothing but the book.

`python -m tools.browser` finds one or gets one: Playwright's own download, or for root on Debian `chromium`.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tools.book import ROOT, contents

HTML = ROOT / "_build" / "html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Whatever is not localhost goes to a proxy that is not there. (Playwright's own routing would block as well,
    # but it turns the cache off, and every page would fetch the fonts again.)
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=localhost",
]
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
MEND = "`.venv/bin/playwright install --with-deps chromium`, or Debian's package `chromium`, or CHROMIUM=/path/to/it"


def works(executable: str | None) -> bool:
    """True when the program starts: a download without its system libraries, or Ubuntu's stub, does not."""
    if not executable or not Path(executable).exists():
        return False
    try:
        done = subprocess.run([executable, "--headless", "--no-sandbox", "--version"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def find() -> str | None:
    """The Chromium to use: the variable CHROMIUM, then the PATH, then Playwright's own; None when there is none."""
    candidates = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)]
    found = next(filter(works, candidates), None)
    if found:
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if works(own) else None


def get() -> str | None:
    """Find a Chromium, or try to install one; None when neither can be had."""
    found = find()
    if found:
        return found
    environment = {**os.environ, "PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "20000", "DEBIAN_FRONTEND": "noninteractive"}
    ways = [[[sys.executable, "-m", "playwright", "install", "chromium"]]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-liberation"]
        apt = [["apt-get", "update"], install]
        # Debian's package brings the system libraries along, so where it can be installed it comes first.
        ways.insert(0 if "ID=debian" in Path("/etc/os-release").read_text().splitlines() else 1, apt)
    for commands in ways:
        for command in commands:
            print("getting a Chromium:", " ".join(command), flush=True)
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, env=environment, timeout=600, stdout=subprocess.DEVNULL)
        found = find()
        if found:
            return found
    return None


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path = HTML) -> Iterator[str]:
    """Serve a folder on localhost, on a free port, for the length of a `with` block; gives the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def launched(executable: str) -> Iterator:
    """A running Chromium (a Playwright `Browser`)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_context(browser, dark: bool = False, **options):
    """A context whose pages are light or dark, whatever the system says: the theme asks its own setting first."""
    mode = "dark" if dark else "light"
    context = browser.new_context(color_scheme=mode, **options)
    context.add_init_script(f"localStorage.setItem('mode', '{mode}')")
    return context


def open_page(context, address: str, name: str):
    """A settled page, with `page.left` (requests that left `address`; all fail) and `page.said` (its errors)."""
    page = context.new_page()
    page.left, page.said = [], []

    def asked(request) -> None:
        if not request.url.startswith((address + "/", "data:", "blob:")):
            page.left.append(request.url)

    page.on("request", asked)
    page.on("console", lambda message: message.type == "error" and page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("response", lambda answer: answer.status >= 400 and page.said.append(f"{answer.status} {answer.url}"))
    page.goto(f"{address}/{name}")
    settle(page)
    return page


def settle(page) -> None:
    """Wait until the page has loaded, mathematics included."""
    page.wait_for_load_state("load")
    page.evaluate(
        """async () => {
            if (document.querySelector('.math')) {
                const start = Date.now();
                const ready = () => window.MathJax && MathJax.startup && MathJax.startup.promise;
                while (!ready() && Date.now() - start < 15000)
                    await new Promise(done => setTimeout(done, 20));
                if (ready()) await MathJax.startup.promise;
            }
            document.querySelectorAll('img[loading=lazy]').forEach(image => image.loading = 'eager');
            await document.fonts.ready;
        }"""
    )


def pages() -> list[str]:
    """The pages of the contents, as paths below the rendered book, first page first."""
    return [f"{name}.html" for name in contents()]


def main() -> int:
    executable = get()
    if executable:
        print(f"Chromium: {executable}")
        return 0
    print(f"browser tests: NOT RUN (no Chromium could be found or installed; mend it with {MEND})")
    return 1 if os.environ.get("REQUIRE_BROWSER") == "1" else 0


if __name__ == "__main__":
    sys.exit(main())
