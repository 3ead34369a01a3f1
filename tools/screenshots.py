"""Pictures of the rendered pages, to look at: light, dark and as wide as a phone.

python -m tools.screenshots --out screenshots [book/preface.html ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.browser import DESKTOP, HTML, MEND, PHONE, find, launched, open_context, open_page, pages, served

LOOKS = {
    "light": DESKTOP,
    "dark": {**DESKTOP, "dark": True},
    "phone": PHONE,
}


def take(names: list[str], out: Path, folder: Path = HTML, looks: list[str] | None = None) -> list[Path]:
    """Write one full-page PNG for each page and look; returns their paths."""
    executable = find()
    if executable is None:
        raise SystemExit(f"no Chromium: {MEND}")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with served(folder) as address, launched(executable) as browser:
        for look in looks or LOOKS:
            context = open_context(browser, **LOOKS[look])
            for name in names:
                page = open_page(context, address, name)
                written.append(out / f"{Path(name).stem}-{look}.png")
                page.screenshot(path=written[-1], full_page=True)
                page.close()
            context.close()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--look", action="append", choices=list(LOOKS), help="one look only (may be repeated)")
    parser.add_argument("pages", nargs="*", help="paths below _build/html; all pages of the contents when left out")
    options = parser.parse_args()
    for path in take(options.pages or pages(), options.out, looks=options.look):
        print(path)


if __name__ == "__main__":
    main()
