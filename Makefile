# Two commands do all the set-up: `make book` and `make test`. The others are habits; CONTRIBUTING.md says when.
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
HTML   := _build/html/.rendered
BOOK   := _config.yml _toc.yml $(wildcard book/*.md book/*.ipynb book/*.bib book/*.yml book/*.json book/_static/*) tools/links.py moemla/paper/claims.yml

# Two tests at a time (make test WORKERS=8 for more), one thread each: more threads than cores only wait for each other.
WORKERS ?= 2
QUIET   := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST  := $(QUIET) $(BIN)/python -m pytest

# Neither the user's own packages nor another project's path leak into .venv.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup book test test-all unit nbval browser mutants notebooks lab lint format speedrun screenshots clean

help:  ## this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## .venv with everything pinned; done by the other targets when needed

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "moemla needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[book,test]'
	@touch $@

book: $(HTML)  ## render the book from its committed outputs; warnings are errors
	@echo "The book: $(CURDIR)/_build/html/index.html"

# After a failed run Sphinx would count the pages as read and keep their warnings to itself: its memory is dropped.
$(HTML): $(STAMP) $(BOOK)
	@rm -f $@
	$(BIN)/jupyter-book build . -n -W --keep-going -q || { rm -rf _build/.doctrees; exit 1; }
	@cp -R book/_static/. _build/html/_static/  # Sphinx forgets them where no page has changed
	@touch $@

test: unit nbval browser  ## everything that CI runs: unit tests and lint, the book's cells, the book in a browser

unit: $(STAMP)  ## unit tests and the book's checks
	$(PYTEST) tests -n $(WORKERS) --ignore=tests/book/test_browser.py

nbval: $(STAMP)  ## run every cell of the book again (timeouts in seconds)
	$(PYTEST) book -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout=180 \
	  --nbval-kernel-startup-timeout=180 -n $(WORKERS) --dist loadscope

browser: $(HTML)  ## the rendered book in a real Chromium; REQUIRE_BROWSER=1 fails where none can be had
	@$(BIN)/python -m tools.browser
	$(PYTEST) tests/book/test_browser.py

test-all: $(HTML)  ## the slow tests too: long fuzzing, many kills
	$(PYTEST) tests -n $(WORKERS) -m ''

mutants: $(STAMP)  ## try each wrong version of the museum: all must be caught; keeps the table in book/mutants.md
	$(QUIET) $(BIN)/python -m tools.mutants --write

notebooks: $(STAMP)  ## execute the stale notebooks (FORCE=1: all), write the pages that are lists
	$(QUIET) $(BIN)/python -m tools.execute $(if $(FORCE),--force)
	$(BIN)/python -m tools.pages

lab: $(STAMP)  ## open the chapters in JupyterLab
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --notebook-dir=book $(LAB)

lint: $(STAMP)  ## ruff, codespell and the floors of the house; how long the chapters are
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/python -m tools.measures

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

speedrun: $(STAMP)  ## ten minutes on two cores, alone: TRAIN=stories VALID=held-out; the rules are book/speedrun.md
	$(BIN)/python -m tools.speedrun --train "$(TRAIN)" --valid "$(VALID)" $(SPEEDRUN)

screenshots: $(HTML)  ## PNGs of every page: light, dark, and as wide as a phone
	@$(BIN)/python -m tools.browser
	$(BIN)/python -m tools.screenshots --out screenshots

clean:  ## remove the rendered book and the environment
	rm -rf .venv _build
