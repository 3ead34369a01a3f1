"""Writes the pages of the book that are lists: API reference, solutions, timings, how to reproduce, the ledger ...

In the README and the preface it writes the blocks that hold numbers (`tools/facts.py`).

python -m tools.pages          write them (book/api.md, book/solutions.md and so on), and the blocks
python -m tools.pages --check  say which of them are out of date, and exit with 1 if any is
"""

import ast
import json
import re
import sys
import textwrap

import nbformat

from tools import facts, outcomes
from tools.book import BOOK, PACKAGE, ROOT, Chapter, plan

BUILT = re.compile(r"Built in chapters? (\d+)")
BUILT_SENTENCE = re.compile(r"\s*Built in chapters? \d+[^.]*\.")
FOLDERS = ("kernels", "paper", "stories")  # whose modules have their place in the reference too
FIRST = ("config", "rope", "cache", "attention", "latent_attention", "routing", "experts", "balancing", "moe", "model")


def chapter_link(chapter: Chapter) -> str:
    """A link to a chapter, or its number and title while it is not written."""
    title = f"{chapter.number}, {chapter.title}"
    return f"[{title}]({chapter.page})" if chapter.written else title


def signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Names and defaults as they stand in the source, without annotations."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if inits:
            return f"{node.name}({_arguments(inits[0].args, skip=1)})"
        held = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        names = [f"{n.target.id}={ast.unparse(n.value)}" if n.value else n.target.id for n in held]
        return f"{node.name}({', '.join(names)})"
    return f"{node.name}({_arguments(node.args)})"


def _wrapped(line: str, width: int = 76) -> str:
    if len(line) <= width:
        return line
    name, rest = line.split("(", 1)
    return f"{name}(\n" + textwrap.fill(rest[:-1], width, initial_indent="    ", subsequent_indent="    ") + "\n)"


def _arguments(args: ast.arguments, skip: int = 0) -> str:
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    shown = [_argument(a, d) for a, d in zip(plain, defaults, strict=True)][skip:]
    shown += [f"*{args.vararg.arg}"] if args.vararg else (["*"] if args.kwonlyargs else [])
    shown += [_argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return ", ".join(shown + ([f"**{args.kwarg.arg}"] if args.kwarg else []))


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def prose(docstring: str, chapters: dict[int, Chapter]) -> str:
    """A docstring as text of a page: what looks like an object becomes code, "Built in chapter N" a link."""

    def quote(line: str) -> str:
        return re.sub(r"(?<!`)\b([A-Za-z_]*\w\[[^\]]*\]|\w+_\w+(?:\.\w+)*)(?!`)", r"`\1`", line)

    kept = []
    for block in re.split(r"\n\s*\n", docstring.strip()):
        lines = block.splitlines()
        indented = all(line.startswith("    ") for line in lines)
        if indented:
            kept.append("```text\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n```")
            continue
        pieces = re.split(r"(`[^`]*`)", " ".join(line.strip() for line in lines))
        safe = [p if p.startswith("`") else _escape(quote(p)) for p in pieces]
        kept.append("".join(safe))
    text = "\n\n".join(kept)
    return BUILT.sub(lambda m: f"Built in chapter {chapter_link(chapters[int(m[1])])}", text)


def _escape(text: str) -> str:
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_$<>\[\]{}|\\])", r"\\\1", p) for p in pieces)


def api_page() -> str:
    """Every public symbol of the package: signature, docstring, and the chapter that builds it."""
    chapters = {chapter.number: chapter for chapter in plan()}
    files = {path.stem: path for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    for folder in FOLDERS:
        for path in (PACKAGE / folder).glob("*.py"):
            files[folder if path.stem == "__init__" else f"{folder}.{path.stem}"] = path
    names = sorted(files, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    out = ["# API reference", ""]
    out += [
        "What each module holds, from its docstrings. A module names the chapter in which it is built by hand, and an "
        "entry names its own where that is another.",
        "",
    ]
    for name in names:
        tree = ast.parse(files[name].read_text(encoding="utf-8"))
        public = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")]
        public = [n for n in public if ast.get_docstring(n)]
        if not public:
            continue
        label = name.replace(".", "-")
        out += [f"(module-{label})=", f"## `moemla.{name}`", "", prose(ast.get_docstring(tree) or "", chapters), ""]
        for node in public:
            anchor = f"api-{node.name}" if isinstance(node, ast.ClassDef) else f"api-{label}-{node.name}"
            out += [f"({anchor})=", f"### `{node.name}`", ""]
            out += ["```python", _wrapped(signature(node)), "```", "", prose(ast.get_docstring(node), chapters), ""]
            if isinstance(node, ast.ClassDef):
                out += _methods(node, chapters)
    return "\n".join(out).rstrip() + "\n"


def _methods(node: ast.ClassDef, chapters: dict[int, Chapter]) -> list[str]:
    rows = []
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
            summary = ast.get_docstring(method).split("\n\n")[0]
            held = {getattr(name, "id", "") for name in method.decorator_list}
            own = not held & {"staticmethod"}  # without the object or class that comes first
            shown = method.name if "property" in held else f"{method.name}({_arguments(method.args, skip=own)})"
            rows += [f"`{shown}`", f": {prose(BUILT_SENTENCE.sub('', summary), chapters)}", ""]
    return rows


def solutions_page() -> str:
    """Every exercise of the book and where its solution is."""
    out = ["# Exercises", ""]
    out += [
        "All exercises of the book. Each leads to its place; its solution is folded below it and has been executed.",
        "",
    ]
    for chapter in plan():
        if not chapter.written:
            continue
        notebook = nbformat.read(chapter.notebook, as_version=4)
        out += [f"## Chapter {chapter.number}: {chapter.title}", ""]
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        for label, body in re.findall(r"```\{exercise\}[^\n]*\n:label: (\S+)\n(.*?)```", text, flags=re.DOTALL):
            out += [f"- {{ref}}`{label}`: {' '.join(body.split())}"]
        out += [""]
    return "\n".join(out).rstrip() + "\n"


def timings_page() -> str:
    """How long each notebook took when it was last executed."""
    seconds = json.loads((BOOK / "timings.json").read_text(encoding="utf-8"))
    out = ["# Timings", ""]
    out += ["Seconds that each notebook took when its outputs were made, on one CPU core with one thread.", ""]
    out += ["| notebook | seconds |", "|---|---:|"]
    out += [
        f"| [{page}]({page}) | {took:.0f} |"
        for page, took in sorted(seconds.items())
        if (BOOK / f"{page}.ipynb").exists()
    ]
    return "\n".join(out) + "\n"


REPRODUCE = """# How to reproduce

What a chapter prints comes from its cells, and some cells read measured results from files in `results/`, which lie
there by experiment and scale, with a table of all runs beside them. A cell is
repeated by running it; this page is about the files. Each holds its settings, what was measured, and where it comes
from: the command, the commit of this project, versions, processor, threads, date and seconds.

The commands below made the files that chapters and pages show, at the commits in the tables. They are typed in the
project's folder after `source .venv/bin/activate`. A command goes on where it was cut, and what is finished is not
run again: to repeat it from the start and compare, name another folder with `--folder`. A loss comes out the same on
the same processor with the same versions and threads; elsewhere expect other digits in the third decimal or so, and the
same conclusions. Times are those of the machine that is named.

Where a command names `--train` and `--valid`, these are two text files of the TinyStories corpus with a line
`<|endoftext|>` between stories. They are not part of this project. Without them the built-in stories are used, which
anyone can make again, byte for byte.

"""


ON_A_GPU = """## On a GPU

The Triton kernels are equal to the plain functions where Triton's interpreter runs them, and they compile to machine
code for compute capability 8.0 and 9.0: that is tested on every machine. `python -m tools.on_gpu` on a machine with a
GPU runs their tests compiled, in float32, fp16 and bf16 against float64, and then every bench into `results/`."""
ON_ONE = " It was run on one at the commits above."
SINCE = " How decode cuts long caches has been changed since, and not been there again."


def _on_lines(command: str, width: int = 44) -> str:
    """A command cut before its options, so that a phone shows it whole."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        longer = f"{lines[-1]} {part}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or len(longer) <= width else [*lines, part]
    return " \\\n  ".join(lines)


def _origins(runs: list[dict]) -> list[str]:
    """How many files one command made, on what, in what time; by commit, in the order of time."""
    commits: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        commit = (
            f"`{run['git']['commit'][:7]}`{', changed' if run['git']['dirty'] else ''}" if run["git"] else "unknown"
        )
        commits.setdefault(commit, []).append(run)
    minutes, clock = sum(run["seconds"] for run in runs) / 60, facts.clock_minutes(runs)
    took = f"{minutes:.1f} minutes" + (f" of runs, {clock:.1f} by the clock" if len(runs) > 1 else "")
    machines = "; ".join(dict.fromkeys(_machine(run["machine"]) for run in runs))
    out = [f"{len(runs)} file{'s' * (len(runs) > 1)}: {took}, on {machines}.", ""]
    out += ["| files | at commit | made on |", "|---:|---|---|"]
    for commit, group in commits.items():
        days = list(dict.fromkeys(run["date"][:10] for run in group))
        out.append(f"| {len(group)} | {commit} | {' to '.join(days[:: max(1, len(days) - 1)])} |")
    return out


def _machine(machine: dict) -> str:
    on = ", ".join(machine["gpus"]) if machine["gpus"] else f"{machine['cpu']}, no GPU"
    return f"{on}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def _command(run) -> str:
    """What would make the file here and now: an experiment by its name of today, texts by theirs, wherever they lay.

    Of the queue over all experiments, the part that made this one.
    """
    from moemla.experiments import QUEUE

    command = run.provenance["command"].replace("experiment all ", f"experiment {run.experiment} ")
    if run.experiment in QUEUE and run.settings["tags"].get("text", "builtin") == "builtin":
        command = re.sub(r" --(?:train|valid)[ =]\S+", "", command)
    if run.experiment != "bench":  # which keeps nothing without a folder
        command = re.sub(r" --folder[ =]\S+", "", command)
    words = [word.rpartition("/")[2] for word in command.split()[1:]]
    if run.experiment == "speedrun":
        return " ".join(["python -m tools.speedrun", *words])
    before = run.provenance.get("before", {}).get("file", "").partition(".")[0]
    return " ".join(["moemla", *(run.experiment if word == before else word for word in words)])


def reproduce_page() -> str:
    """Each command that made files of `results/`, how many, how long it took and on what."""
    made: dict[str, list[dict]] = {}
    for run in facts.measured_here():
        made.setdefault(_command(run), []).append(run.provenance)
    out = [REPRODUCE.rstrip()]
    for command, runs in sorted(made.items(), key=lambda pair: pair[0].startswith("moemla bench")):
        out += ["", "```bash", _on_lines(command), "```", "", *_origins(runs)]
    out += [
        "",
        "Minutes of runs are summed over the files; by the clock, runs that went side by side count once.",
        '"Changed" marks files made while the package differed from the commit.',
    ]
    gpus = {run["git"]["commit"][:7] for runs in made.values() for run in runs if run["machine"]["gpus"]}
    said = ON_ONE + SINCE * bool(gpus & {*facts.BEFORE_PIECES}) if gpus else " No result here was measured on one."
    return "\n".join([*out, "", ON_A_GPU + said]) + "\n"


def progress_page() -> str:
    """How many runs of each experiment there are. Chapters speak of complete ones only."""
    from moemla import results
    from moemla.experiments import NAMES, REGISTERED, find, home
    from moemla.experiments.runner import Text, planned, tallies

    out = ["# What is measured and what is running", ""]
    out += [
        "An experiment is a set of runs that is fixed before the first of them. Chapters show it when all are",
        "there, and so does [what came out](outcomes.md); until then this page counts them.",
        "Those with a link were [registered](registrations.md), with predictions, before their first run. A pilot",
        "measures the spread of seeds. A text from files goes by the beginning of its hash.",
        "",
        "| experiment | scale | text | runs |",
        "|---|---|---|---:|",
    ]
    found = [tally for tally in tallies(results.load(facts.RESULTS, missing_ok=True)) if tally.scale != "smoke"]
    for name in NAMES:
        rows = [tally for tally in found if tally.experiment == name]
        linked = f"[{name}](#registration-{name})" if name in REGISTERED else name
        for tally in rows:
            text = "built-in stories" if tally.text.source == "builtin" else f"files, `{tally.text.data[:6]}`"
            out.append(f"| {linked} | {tally.scale} | {text} | {len(tally.done)} of {tally.total} |")
        scale = home(name)
        if not any(tally.scale == scale for tally in rows):
            out.append(f"| {linked} | {scale} | | 0 of {len(planned(find(name), scale, Text('builtin', '0' * 64)))} |")
    return "\n".join(out) + "\n"


def registrations_page() -> str:
    """What each registered experiment asks and expects, as it was committed before its first run."""
    from moemla.experiments import REGISTERED

    out = ["# Registrations", ""]
    out += [
        "What is asked, how it will be judged, and what is expected, in numbers: each was committed before the first",
        "run of its experiment and stands as it was. [What is measured](progress.md) says how far the runs are;",
        "[what came out](outcomes.md) judges the predictions when they are there. The number of seeds follows from a",
        "pilot (`synergy-large` had none); those of `shared-experts` then lay up to twice as far apart: it saw less",
        "than its registration says.",
    ]
    for name in REGISTERED:
        text = (facts.RESULTS / name / "registration.md").read_text(encoding="utf-8")
        body = text.split("\n", 1)[1].replace("\n## ", "\n### ").strip()
        out += ["", f"(registration-{name})=", f"## {name}", "", body]
        for later in sorted((facts.RESULTS / name).glob("amendment*.md"), key=lambda path: len(path.name)):
            title = later.stem.replace("-", " ").capitalize()
            out += ["", f"### {title}", "", later.read_text(encoding="utf-8").split("\n", 1)[1].strip()]
    return "\n".join(out) + "\n"


LEDGER = """# The ledger

What the paper prints, and what it comes to here. Only what is printed is written down, in
`moemla/paper/claims.yml`; the other numbers are computed from the paper's settings, or measured. `moemla claims A25`
prints a claim whole, `moemla claims "Table 2"` all that belongs to a place. [What came out](outcomes.md) has the
experiments behind what is *measured*.

"""


def ledger_page() -> str:
    """Each claim by the chapter that treats it: place, printed, ours, status, note. A row has an anchor."""
    from moemla.paper import claims

    out = [LEDGER.rstrip(), "", facts.ledger(), ""]
    out += [f"- *{status}*: {meaning}" for status, meaning in (claims.STATUSES | claims.NOT_JUDGED).items()]
    out += ["", "## By place", "", *_by_place()]
    for chapter in plan():
        rows = [row for row in facts.judged() if row[0].chapter == chapter.number]
        if not rows:
            continue
        later = "" if chapter.written else " (not written yet)"
        out += ["", f"## Chapter {chapter.number}: {chapter.title}{later}", ""]
        out += [f"[Read the chapter]({chapter.page}).", ""] if chapter.written else []
        out += ["| claim | printed | here | status | note |", "|---|---|---:|---|---|"]
        for claim, outcome in rows:
            said = textwrap.shorten(claim.printed, 60, placeholder=" ...")
            note = f"{claim.note} [{outcome.detail}]" if outcome.detail else claim.note
            cells = (claim.where, said, claims.show(claim, outcome), outcome.status, note)
            where, *rest = (_escape(cell) for cell in cells)
            out.append(f"| [`{claim.id}`]{{#{claim.id}}}<br>{where} | {' | '.join(rest)} |")
    return "\n".join(out) + "\n"


def _by_place() -> list[str]:
    """Links to what is judged of each part of the paper, the abstract and the tables first."""
    places: dict[str, list[str]] = {}
    for claim, outcome in facts.judged():
        if outcome.status not in ("input", "aside"):
            for place in dict.fromkeys(where.partition(",")[0] for where in claim.where.split(" with ")):
                places.setdefault(place, []).append(f"[{claim.id}](#{claim.id})")

    def order(place: str) -> tuple[int, str]:
        return (0 if place == "abstract" else 1 if place.startswith("Table") else 2, place)

    out = ["| place | claims |", "|---|---|"]
    return out + [f"| {place} | {', '.join(places[place])} |" for place in sorted(places, key=order)]


PAGES = {
    "api": api_page,
    "solutions": solutions_page,
    "timings": timings_page,
    "reproduce": reproduce_page,
    "progress": progress_page,
    "registrations": registrations_page,
    "outcomes": outcomes.page,
    "ledger": ledger_page,
}
UNCHECKED = ("progress",)  # may lag behind the runs, whose end must fail no test


def stale() -> list[str]:
    """Names of the pages, and of the files with blocks, that differ from what would be written."""
    files = {name: BOOK / f"{name}.md" for name in PAGES if name not in UNCHECKED}
    old = [n for n, file in files.items() if not file.exists() or file.read_text(encoding="utf-8") != PAGES[n]()]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in facts.FILES}
    return old + [name for name, text in texts.items() if facts.filled(text) != text]


def main() -> int:
    if "--check" in sys.argv:
        found = stale()
        for name in found:
            print(f"{name if '.' in name else f'book/{name}.md'} is out of date: run `make notebooks`")
        return 1 if found else 0
    for name, page in PAGES.items():
        (BOOK / f"{name}.md").write_text(page(), encoding="utf-8")
    for name in facts.FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(facts.filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
