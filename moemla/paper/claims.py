"""The ledger: each claim of the paper that is looked at, what it comes to here, and whether the two agree.

`claims.yml` holds what the paper prints and nothing else that is a number; what is computed comes from a
function of `recount` (from the paper's settings) or `arithmetic` (from numbers that it prints), or from measured
files in `results/`. The status of an arithmetic claim is not written down: it follows from the two numbers, the
rounding of the printed digits, and whether the paper states what the computation assumes. Built in chapter 19.
"""

import inspect
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from moemla.errors import MoemlaError
from moemla.paper import arithmetic, recount
from moemla.paper.measured import measured
from moemla.paper.places import cells, is_place

KINDS = ("arithmetic", "measured", "citation", "setting", "aside")
STATUSES = {
    "computed": "follows from settings that the paper states",
    "consistent": "agrees with other numbers that the paper prints; nothing was run",
    "measured": "was run here, at the scale that the row names; whether it agrees is judged at the paper's scale only",
    "contradicted": "disagrees with the paper's own settings or numbers, or with a public record",
    "undetermined": "the text does not say enough; what holds only under a reading that it does not state is here",
    "not run": "needs a run that has not been made here",
}
NOT_JUDGED = {
    "input": "a setting, taken as it is printed",
    "aside": "a number of ours beside the paper's, which does not claim it",
}
LEDGER = Path(__file__).with_name("claims.yml")
CHAPTERS = 19
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_EXPECT = re.compile(r"([<>=])\s*(\S+)")

Number = int | float


class ClaimError(MoemlaError):
    """A claim that does not exist, or an entry of the ledger that breaks its rules."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number or statement of the paper.

    `where` is a place ("Table 2, ROW, COLUMN", "section 3.1", "eq. 7", "Theorem 3.2", "Algorithm 1", "abstract") or
    several, joined by "with"; a cell of a table is the `where` of one claim. `printed` begins with the number as the
    paper has it. What is compared with it: `computed`, a function's name, called with the printed numbers of the
    claims `of` (ID, or ID.sd for what stands after the ±) and the settings `given`; or `result`, what files in
    `results/` say (see `measured.measured`). `expect` replaces equality:
    "< 0.1", "> 0", "= 0", or "= NAME" with a function's name, called with `expect_given`. `tolerance` replaces the
    rounding of the printed digits: "1 %" of the printed value, or a number in its unit; `because` is its reason.
    `reading` is an assumption that the paper does not state. `status` is given where nothing is compared: `not run`
    or `undetermined`; a citation that was looked up may be `consistent` or `contradicted`, with its `source`. A
    setting without a status is an input. The kind `aside` has a value of ours that the paper does not claim.
    """

    id: str
    where: str
    printed: str
    kind: str
    chapter: int
    note: str = ""
    status: str | None = None
    computed: str | None = None
    of: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    expect: str | None = None
    expect_given: dict[str, Any] = field(default_factory=dict)
    tolerance: str | Number | None = None
    because: str | None = None
    reading: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a claim comes to: the computed value in the printed unit, what was expected, status, detail."""

    computed: Number | None
    expected: str
    status: str
    detail: str


def load_claims(path: Path = LEDGER) -> list[Claim]:
    """The ledger, every entry checked; `ClaimError` naming the entry that breaks a rule."""
    import yaml

    known = {f.name for f in fields(Claim)}
    claims: dict[str, Claim] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        name = entry.get("id", entry)
        unknown = sorted(set(entry) - known)
        if unknown:
            raise ClaimError(f"claim {name}: no such field: {', '.join(unknown)}")
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise ClaimError(f"claim {name}: {error}") from error
        if claim.id in claims:
            raise ClaimError(f"claim {name}: the id stands twice")
        claims[claim.id] = claim
    for claim in claims.values():
        problem = _problem(claim, claims)
        if problem:
            raise ClaimError(f"claim {claim.id}: {problem}")
    return list(claims.values())


def _problem(claim: Claim, claims: dict[str, Claim]) -> str | None:
    functions = [name for name in (claim.computed, _expected_function(claim)) if name]
    unknown = [name for name in functions if name not in FUNCTIONS]
    strangers = [name for name in claim.of if name.removesuffix(".sd") not in claims]
    derived = claim.kind in ("arithmetic", "aside") or claim.result is not None
    typed = ("undetermined", "not run")
    if claim.kind == "citation" and claim.source:
        typed += ("consistent", "contradicted")
    free = derived or (claim.kind == "setting" and claim.status is None)
    places = [place for place in claim.where.split(" with ") if not is_place(place)]
    aside, reason = claim.kind == "aside", claim.because is not None
    rules = (
        (claim.kind in KINDS, f"kind={claim.kind!r}: choose one of {', '.join(KINDS)}"),
        (claim.chapter in range(1, CHAPTERS + 1), f"chapter={claim.chapter!r}: must be 1 to {CHAPTERS}"),
        (claim.where and claim.printed, "where and printed must say something"),
        (not places, f"where={', '.join(places)!r}: no place of the paper"),
        (not unknown, f"function={', '.join(unknown)!r}: there is none of that name"),
        (not strangers, f"of={', '.join(strangers)!r}: no such claim"),
        (claim.kind != "arithmetic" or claim.computed is not None, "an arithmetic claim is computed"),
        (not aside or (claim.computed and not claim.expect), "an aside is computed and expects nothing"),
        (not (derived and claim.status), f"status={claim.status!r}: follows from the numbers; leave it out"),
        (free or claim.status in typed, f"status={claim.status!r}: if none is computed, one of {', '.join(typed)}"),
        ((claim.tolerance is not None) == reason, "a tolerance has its reason, `because`"),
        (claim.reading is None or claim.kind == "arithmetic", "a reading belongs to what is computed"),
        (claim.result is None or "scale" in claim.result, "a result names its scale"),
    )
    for holds, text in rules:
        if not holds:
            return text
    if derived and not aside and claim.expect is None:
        try:
            printed_number(claim.printed)
        except ClaimError as error:
            return str(error)
    return None


def missing_cells(claims: Iterable[Claim]) -> list[str]:
    """Cells of the paper's tables that no claim has as its place."""
    there = {claim.where for claim in claims}
    return [cell for cell in cells() if cell not in there]


def printed_number(text: str) -> tuple[float, float]:
    """A printed number and half a unit of its last digit: "36,288,252", "3.6e7", "1/4", "+81 %", "8.5 ± 0.1".

    Fractions are exact. `ClaimError` where the text does not begin with a number.
    """
    text = text.strip()
    if fraction := re.match(r"(\d+)/(\d+)", text):
        return int(fraction[1]) / int(fraction[2]), 0.0
    number = _NUMBER.match(text.lstrip("±<> "))
    if not number:
        raise ClaimError(f"printed={text!r}: must begin with its number")
    mantissa, _, exponent = number[0].replace(",", "").partition("e")
    decimals = len(mantissa.partition(".")[2])
    scale = 10.0 ** int(exponent or 0)
    return float(mantissa) * scale, 0.5 * 10.0**-decimals * scale


FUNCTIONS = {
    name: function
    for module in (recount, arithmetic)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and name != "preset"
}


@cache
def _ledger() -> dict[str, Claim]:
    return {claim.id: claim for claim in load_claims()}


@cache
def _printed_of() -> dict[str, tuple[float, float]]:
    """(number, half a unit) by id, and of what stands after ± by ID.sd."""
    numbers = {}
    for claim in _ledger().values():
        number, _, deviation = claim.printed.lstrip("± ").partition("±")
        for name, text in ((claim.id, number), (f"{claim.id}.sd", deviation)):
            try:
                numbers[name] = printed_number(text)
            except ClaimError:  # a word, where nothing is computed from it
                continue
    return numbers


def evaluate(claim: Claim, folder: str | Path = "results") -> Outcome:
    """Compute a claim and derive its status.

    The two agree where the printed number, give or take half a unit of its last digit (or `tolerance`), meets the
    computed one, give or take the rounding of the printed numbers that it is computed from. Agreement is `computed`
    where all of it rests on settings, else `consistent`; disagreement is `contradicted`. Under a `reading` that the
    paper does not state either is `undetermined`, and the detail says whether it holds. What was run is `measured`;
    only runs at the paper's own scale can contradict, where none of their interval agrees. Without a file in `folder` a
    measured claim is `not run`.
    """
    if claim.result is not None:
        interval, detail = measured(claim.result, folder)
        if interval is None:
            return Outcome(None, claim.printed, "not run", detail)
        value, low, high = interval
        expected = _compare(claim, low, high)[0]
        agrees = any(_compare(claim, *span)[1] for span in ((low, high), (low, low), (high, high)))  # some of it
        at_scale = claim.result["scale"] == "paper"
        return Outcome(value, expected, "contradicted" if at_scale and not agrees else "measured", detail)
    if claim.computed is None:
        return Outcome(None, claim.printed, claim.status or "input", "")
    value, low, high, detail = _compute(claim)
    if claim.kind == "aside" or claim.status:  # computed to inform, not to judge
        return Outcome(value, claim.printed, claim.status or "aside", detail)
    expected, agrees = _compare(claim, low, high)
    if claim.reading:
        holds = f"{'holds' if agrees else 'does not hold'} if {claim.reading}"
        return Outcome(value, expected, "undetermined", "; ".join(text for text in (holds, detail) if text))
    if not agrees:
        return Outcome(value, expected, "contradicted", detail)
    return Outcome(value, expected, "computed" if _rests_on_settings(claim) else "consistent", detail)


def _rests_on_settings(claim: Claim) -> bool:
    """Whether nothing but settings goes into it: a formula of `recount`, or arithmetic on inputs."""
    if FUNCTIONS[claim.computed].__module__ == recount.__name__:
        return True
    return claim.id not in claim.of and all(_is_setting(_ledger()[name.removesuffix(".sd")]) for name in claim.of)


def _is_setting(claim: Claim) -> bool:
    """An input, or arithmetic on inputs; a printed total or result is none, whatever it would follow from."""
    computed = claim.computed and FUNCTIONS[claim.computed].__module__ == arithmetic.__name__
    return claim.kind == "setting" or bool(computed and _rests_on_settings(claim))


# These round or count by themselves: the rounding of the printed numbers they are given is not varied.
EXACT = ("combinations", "sizes_of_one_convention", "medium_millions", "nearest_width_with_even_heads")


def _compute(claim: Claim) -> tuple[Number, Number, Number, str]:
    """Value, its lowest and highest over the rounding of the numbers it is computed from, and detail."""
    function, printed = FUNCTIONS[claim.computed], _printed_of()
    numbers = [printed[name] for name in claim.of]
    value, detail = function(*(number for number, _ in numbers), **claim.given)
    spans = [(n - half, n + half) if half else (n,) for n, half in numbers]
    corners = [value]
    if claim.computed not in EXACT:
        corners += [function(*corner, **claim.given)[0] for corner in product(*spans)]
    return value, min(corners), max(corners), detail


def _expected_function(claim: Claim) -> str | None:
    match = _EXPECT.fullmatch(claim.expect or "")
    return match[2] if match and not _NUMBER.fullmatch(match[2]) else None


def _compare(claim: Claim, low: Number, high: Number) -> tuple[str, bool]:
    """What was expected, and whether [low, high] meets it."""
    if claim.expect is None:
        target, half = printed_number(claim.printed)
        sign, text = "=", claim.printed
    else:
        sign, goal = _EXPECT.fullmatch(claim.expect).groups()
        if goal in FUNCTIONS:
            target = FUNCTIONS[goal](**claim.expect_given)[0]
            text = f"{target:.4g}"
        else:
            target, text = float(goal), claim.expect
        half = 1e-9 * max(1.0, abs(target))
    if isinstance(claim.tolerance, str) and claim.tolerance.endswith("%"):
        half = abs(target) * float(claim.tolerance.rstrip("% ")) / 100
    elif claim.tolerance is not None:
        half = float(claim.tolerance)
    if sign == "<":  # as with any interval: a part of it that agrees is enough
        return text, low < target
    if sign == ">":
        return text, high > target
    slack = 1e-9 * max(1.0, abs(target))  # a computed value that lies on the edge of the rounding
    return text, low - half - slack <= target <= high + half + slack


# The command `moemla claims`.


def select(claims: Iterable[Claim], ids: Iterable[str]) -> list[Claim]:
    """Claims by id or place: A2 is A2 and all of A2-*, "Table 2" all that it has. `ClaimError` where there is none."""
    claims, ids = list(claims), list(ids)
    for name in ids:
        if not any(meant_by(claim, name) for claim in claims):
            groups = sorted({claim.id.partition("-")[0] for claim in claims}, key=lambda g: (g[0], len(g), g))
            raise ClaimError(f"no claim {name!r}; ids begin with {', '.join(groups)}")
    return [claim for claim in claims if not ids or any(meant_by(claim, name) for name in ids)]


def meant_by(claim: Claim, name: str) -> bool:
    """Whether a name stands for this claim: its id or the start of it, "A2", or one of its places, "table 2"."""
    claim_id, places, name = claim.id.lower(), claim.where.lower().split(" with "), name.lower()
    return (
        claim_id == name
        or claim_id.startswith(f"{name}-")
        or any(place == name or place.startswith(f"{name}, ") for place in places)
    )


def table(rows: Iterable[tuple[Claim, Outcome]]) -> Any:
    """A rich table of claims and their outcomes."""
    from rich.table import Table
    from rich.text import Text

    rows, drawn = list(rows), Table()
    readings = any(claim.reading for claim, _ in rows)
    for column in ("id", "where", "printed", "ours", *(["reading"] if readings else ())):
        drawn.add_column(column, overflow="fold", no_wrap=column == "id")
    for claim, outcome in rows:
        texts = [claim.id, claim.where, claim.printed, show(claim, outcome)]
        drawn.add_row(*map(Text, texts), *([Text(outcome.detail.split(" if ")[0])] if claim.reading else ()))
    return drawn


def counts(rows: Iterable[tuple[Claim, Outcome]]) -> dict[str, int]:
    """How many claims have each status, then inputs and asides."""
    each = [outcome.status for _, outcome in rows]
    return {status: each.count(status) for status in (*STATUSES, *NOT_JUDGED)}


def summary(rows: Iterable[tuple[Claim, Outcome]]) -> str:
    """One sentence: how many claims, and how many of each status."""
    counted = counts(rows)
    judged = {status: counted[status] for status in STATUSES}
    of_each = ", ".join(f"{count} {status}" for status, count in judged.items())
    return f"{sum(judged.values())} claims: {of_each}; besides, inputs {counted['input']}, asides {counted['aside']}"


def show(claim: Claim, outcome: Outcome) -> str:
    """The computed value with one digit more than is printed, or "-"."""
    value = outcome.computed
    if value is None:
        return "-"
    if isinstance(value, int) and abs(value) < 10**9:
        return f"{value:,}"
    judged = not (claim.expect or claim.status or claim.kind == "aside")
    if not judged or (half := printed_number(claim.printed)[1]) in (0.0, 0.5):
        return f"{value:,.5g}"
    return f"{value:,.{max(0, round(-math.log10(2 * half))) + 1}f}"


def main(ids: Iterable[str] = (), as_json: bool = False, folder: str | Path = "results") -> int:
    """Print the ledger by status, or the claims `ids` with notes; returns the exit code 0."""
    ids = list(ids)
    rows = [(claim, evaluate(claim, folder)) for claim in select(load_claims(), ids)]
    if as_json:
        entries = [asdict(claim) | asdict(outcome) | {"function": claim.computed} for claim, outcome in rows]
        print(json.dumps({"claims": entries, "counts": counts(rows)}, indent=1, allow_nan=False))
        return 0
    from rich.console import Console

    console = Console()
    for status, meaning in (STATUSES | NOT_JUDGED).items():
        group = [row for row in rows if row[1].status == status]
        if group:
            console.print(f"{status}: {meaning}", style="bold", highlight=False, soft_wrap=True)
            console.print(table(group))
        for claim, outcome in group if ids else ():
            parts = [claim.note]
            parts += [f"[{outcome.detail}]"] if outcome.detail else []
            parts += [f"Judged at {claim.tolerance}: {claim.because}"] if claim.because else []
            parts += [f"See {claim.source}."] if claim.source else []
            console.print(f"{claim.id}: {' '.join(parts)}", markup=False, highlight=False)
    console.print(summary(rows), highlight=False, soft_wrap=True)
    return 0
