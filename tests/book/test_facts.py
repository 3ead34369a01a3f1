"""Sentences with numbers outside the chapters are written from the contents, the ledger and results/, and are true."""

import json
import re
import tomllib

import pytest

from moemla import ModelConfig, complexity
from moemla.experiments import REGISTERED, find, home, latent_cost, ten_minutes
from moemla.experiments.runner import Text, complete
from moemla.paper import claims
from moemla.results import of, write
from tests.test_results import ORIGIN
from tools import facts, pages
from tools.book import ROOT

README, PREFACE, SPEEDRUN = ((ROOT / name).read_text(encoding="utf-8") for name in facts.FILES)


def test_the_blocks_are_there():
    assert facts.blocks_of(README) == ["chapters", "ten-minutes", "benches", "gpu", "ledger", "latent-cost", "outcomes"]
    assert facts.blocks_of(PREFACE) == ["chapters", "ledger", "outcomes", "machines"]
    assert facts.blocks_of(SPEEDRUN) == ["speedrun"]
    for text in (README, PREFACE):
        assert text.count("written by tools/pages.py -->") == text.count("<!-- end of ") == len(facts.blocks_of(text))


@pytest.mark.parametrize("name", ["chapters", "ten-minutes", "benches", "ledger", "latent-cost", "outcomes"])
def test_a_number_changed_by_hand_is_noticed(name):
    block = (
        README[README.index(f"<!-- {name}, written") : README.index(f"<!-- end of {name}")] + f"<!-- end of {name} -->"
    )
    digit = re.search(r"\d", block)
    wrong = block[: digit.start()] + str((int(digit[0]) + 1) % 10) + block[digit.end() :]
    assert wrong != block and facts.filled(wrong) == block


def test_the_pages_check_covers_readme_and_preface(monkeypatch):
    monkeypatch.setitem(facts.BLOCKS, "chapters", lambda: "20 of 19 chapters are written.")
    monkeypatch.setattr(pages, "PAGES", {})
    assert pages.stale() == ["README.md", "book/preface.md"]


def test_nothing_is_claimed_of_every_number_or_part():
    """What is complete is counted by a block; prose does not say "every" of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["description"]
    names = ("CITATION.cff", "CONTRIBUTING.md", "moemla/__init__.py", "moemla/paper/claims.py")
    pages_of_the_book = ("setup", "notation", "glossary", "reproduce", "timings")
    texts = {name: (ROOT / name).read_text() for name in names}
    texts |= {f"{name}.md": (ROOT / "book" / f"{name}.md").read_text() for name in pages_of_the_book}
    for name, text in {"README": README, "preface": PREFACE, "description": project, **texts}.items():
        text = re.sub(r"<!-- chapters,.*?<!-- end of chapters -->", "", text, flags=re.S)  # a title may say it
        said = re.search(r"\b(every|all)( \w+)? (numbers?|parts?|claims?)\b", " ".join(text.split()), re.I)
        assert said is None, f"{name}: {said[0]}"
        assert not re.search(r"\breproduced\b", text), name


def test_the_ledgers_sentence_has_its_counts():
    rows = [(claim, claims.evaluate(claim, facts.RESULTS)) for claim in claims.load_claims()]
    found = claims.counts(rows)
    said = " ".join(facts.ledger().split())
    assert said.startswith(
        f"The ledger has {len(rows) - found['input'] - found['aside']} claims and {found['input']} settings"
    )
    assert f"{found['contradicted']} are contradicted" in said and f"{found['not run']} need a run" in said


def test_chapters_are_counted(tmp_path):
    plan = [{"number": 1, "slug": "one", "title": "One"}, {"number": 2, "slug": "two", "title": "Two"}]
    (tmp_path / "chapters.yml").write_text(json.dumps(plan))
    (tmp_path / "01-one.ipynb").touch()
    assert facts.chapters(tmp_path) == "1 of 2 chapters are written. To come: Two."
    (tmp_path / "02-two.ipynb").touch()
    assert facts.chapters(tmp_path) == "All 2 chapters are written."


def test_the_ten_minutes_are_quoted(tmp_path, monkeypatch):
    def run(data, bits, dirty, scale="cpu"):
        origin = ORIGIN | {"git": {"commit": "a" * 40, "dirty": dirty}}
        measures = {"bits_per_byte": bits, "seconds": 60 * bits, "stories": 600, "counted_bits_per_byte": {"4": 1.5}}
        (cell,) = ten_minutes.cells(scale, Text(data, "ab"[data == "files"] * 64))
        write(of(cell, measures, origin), tmp_path)

    monkeypatch.setattr(facts, "RESULTS", tmp_path)
    run("builtin", 0.25, True)
    run("files", 0.91, False)
    run("builtin", 3.0, False, "smoke")
    assert "0.250 bits per byte" in facts.ten_minutes() and "differed from its commit" in facts.ten_minutes()
    run("builtin", 0.24, False)
    said = facts.ten_minutes()
    assert "0.240 bits per byte" in said and "0.910 bits" in said and "4-gram has 1.500" in said
    assert "differed" not in said


def test_a_run_that_ends_in_the_night_makes_no_page_stale(tmp_path, monkeypatch):
    """Pages and blocks speak of complete experiments; what is running is counted on a page that is not checked."""
    for path in facts.RESULTS.glob("[!.]*/*/*.json"):
        copy = tmp_path / path.relative_to(facts.RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())

    def told():
        return [facts.ten_minutes(), facts.latent_cost(), facts.machines(), facts.gpu(), pages.reproduce_page()]

    monkeypatch.setattr(facts, "RESULTS", tmp_path)
    before, counted = told(), pages.progress_page()
    for cell in latent_cost.cells("cpu", Text("files", "ab" * 32))[:5]:
        write(of(cell, {"nats_per_token": 1.0, "seconds": 1e6}, ORIGIN), tmp_path)
    assert told() == before
    new = set(pages.progress_page().splitlines()) - set(counted.splitlines())
    assert new == {"| latent-cost | cpu | files, `ababab` | 5 of 17 |"}
    monkeypatch.setattr(pages, "PAGES", {"progress": lambda: "another"})
    assert "progress" not in pages.stale()


def test_what_is_measured_is_counted():
    page = pages.progress_page()
    assert "| latent-cost | cpu | built-in stories | 65 of 65 |" in page
    assert page.count("| latent-cost | cpu | files, `") == page.count(" | 17 of 17 |") == 1


def test_two_runs_side_by_side_count_once_by_the_clock():
    runs = [
        {"date": "2026-01-01T00:10:00+00:00", "seconds": 600},
        {"date": "2026-01-01T00:12:00+00:00", "seconds": 600},
        {"date": "2026-01-01T01:00:00+00:00", "seconds": 60},
    ]
    assert facts.clock_minutes(runs) == pytest.approx(13)
    assert facts.clock_minutes([]) == 0


def test_how_to_reproduce_names_every_commit_of_the_results():
    page = (ROOT / "book" / "reproduce.md").read_text()
    origins = [run.provenance for run in facts.measured_here()]
    rows = re.findall(r"^\| (\d+) \| `(\w{7})`(, changed)? \| (\S+)", page, re.M)
    assert sum(int(count) for count, *_ in rows) == len(origins)
    assert sum(int(count) for count in re.findall(r"^(\d+) files?: ", page, re.M)) == len(origins)
    minutes = sum(float(n) for n in re.findall(r"^\d+ files?: ([\d.]+) minutes", page, re.M))
    assert minutes == pytest.approx(sum(run["seconds"] for run in origins) / 60, abs=1)
    wanted = {(run["git"]["commit"][:7], ", changed" if run["git"]["dirty"] else "") for run in origins}
    assert {(commit, changed) for _, commit, changed, _ in rows} == wanted
    assert {day for *_, day in rows} <= {run["date"][:10] for run in origins}


def test_each_command_there_is_one_that_exists():
    page = (ROOT / "book" / "reproduce.md").read_text()
    commands = re.findall(r"^```bash\n(.*?)\n```$", page, re.M | re.S)
    assert len(commands) > 5
    for command in commands:
        assert re.match(r"moemla (experiment|bench) |python -m tools\.speedrun ", command), command


def test_every_reference_is_cited():
    keys = re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(), re.M)
    pages_of_the_book = [*(ROOT / "book").glob("*.ipynb"), *(ROOT / "book").glob("*.md")]
    cited = set(re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", "".join(path.read_text() for path in pages_of_the_book)))
    cited = {key.strip() for keys in cited for key in keys.split(",")}
    assert set(keys) == cited
    assert "eprint    = {2508.01261}" in (ROOT / "book" / "references.bib").read_text()


def test_the_readmes_other_figures():
    """Those that follow from a config alone."""
    tiny = ModelConfig.preset("tiny", "moe-mla-rope", vocab_size=4096)
    assert f"tiny moe-mla-rope, {complexity.parameters(tiny).total / 1e6:.2f} million parameters" in README
    total = complexity.parameters(ModelConfig.preset("M", "mha-rope")).total
    assert f"{total:,} parameters for M, printed as {total / 1e6:.1f} M" in README
    kept = {
        "multi-head": complexity.cache_bytes_per_token(ModelConfig.preset("M", "mha-rope")),
        "the paper's latent": complexity.cache_bytes_per_token(ModelConfig.preset("M", "mla-rope")),
        "DeepSeek-V2's joint": complexity.cache_bytes_per_token(ModelConfig.preset("M", "mla-decoupled")),
    }
    for name, size in kept.items():
        numbers = size // (2 * 9)  # two bytes a number, nine layers
        assert re.search(rf"^\| {name}.*\| {numbers:,} \|$", README, re.M), name


def test_a_chapter_takes_under_two_minutes():
    seconds = json.loads((ROOT / "book" / "timings.json").read_text())
    assert "under two minutes" in PREFACE and max(seconds.values()) < 120


def test_each_registered_experiment_has_its_answer_in_one_line():
    """Named here before it is complete, so that the line appears with the last run."""
    assert [*facts.ANSWERS] == sorted(facts.ANSWERS, key=REGISTERED.index) and set(facts.ANSWERS) == set(REGISTERED)
    for name, (question, *asked) in facts.ANSWERS.items():
        known = {one.name for one in (*find(name).asked, *find(name).beside)}
        assert question.endswith("?") and asked and set(asked) <= known, name
        told = f"*{name}*: {question}" in facts.outcomes()
        assert told == bool(complete(name, home(name), facts.RESULTS)), name
