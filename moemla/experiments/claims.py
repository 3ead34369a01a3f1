"""The ledger: each number of the paper, what it comes to here, and whether the two agree.

`claims.yml` holds what the paper prints and nothing else that is a number; what is computed comes from a
function of `recount` or `arithmetic`, or from measured files in `results/`. The status of an arithmetic
claim is not written down: it follows from the two numbers and the rounding of the printed digits.
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
from moemla.experiments import arithmetic, recount, results

KINDS = ("arithmetic", "measured", "citation", "setting")
STATUSES = ("reproduced", "contradicted", "open", "undetermined")
LEDGER = Path(__file__).with_name("claims.yml")
CHAPTERS = 19
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_EXPECT = re.compile(r"([<>=])\s*(\S+)")
# These round or count by themselves: the rounding of the printed numbers they are given is not varied.
EXACT = ("combinations", "sizes_of_one_convention", "medium_millions", "nearest_width_with_even_heads")

Number = int | float


class ClaimError(MoemlaError):
    """A claim that does not exist, or an entry of the ledger that breaks its rules. Built in chapter 19."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number of the paper. Built in chapter 19.

    `printed` begins with the number as the paper has it. What is compared with it: `computed`, a function's
    name, called with the printed numbers of the claims `of` (ID, or ID.sd for what stands after the ±) and
    the settings `given`; or `result`, a mean over files in `results/` (experiment, where, measure).
    `expect` replaces equality: "< 0.1", "> 0", "= 0", or "= NAME" with a function's name, called with
    `expect_given`. `tolerance` replaces the rounding of the printed digits: "0.6 %" of the printed value,
    or a number in its unit. `status` is given where nothing is compared: `open` (to be measured) or
    `undetermined` (the text does not say enough); a citation that was looked up may have any, with its
    `source`.
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
    source: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a claim comes to: the computed value in the printed unit, what was expected, status, detail.

    Built in chapter 19.
    """

    computed: Number | None
    expected: str
    status: str
    detail: str


def load_claims(path: Path = LEDGER) -> list[Claim]:
    """The ledger, every entry checked; `ClaimError` naming the entry that breaks a rule.

    Built in chapter 19.
    """
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
    derived = claim.kind == "arithmetic" or claim.result is not None
    looked_up = claim.kind == "citation" and claim.source
    typed = STATUSES if looked_up else ("open", "undetermined")
    rules = {
        f"kind={claim.kind!r}; it is one of {', '.join(KINDS)}": claim.kind in KINDS,
        f"chapter={claim.chapter!r}; it is 1 to {CHAPTERS}": claim.chapter in range(1, CHAPTERS + 1),
        "where and printed must say something": bool(claim.where and claim.printed),
        f"unknown function {', '.join(unknown)}": not unknown,
        f"of names no claim: {', '.join(strangers)}": not strangers,
        "an arithmetic claim is computed": claim.kind != "arithmetic" or claim.computed is not None,
        "its status follows from its numbers: leave it out": not (claim.kind == "arithmetic" and claim.status),
        f"status={claim.status!r}; without a computed one it is {', '.join(typed)}": derived or claim.status in typed,
    }
    broken = next((text for text, holds in rules.items() if not holds), None)
    if broken is None and derived and claim.expect is None:
        try:
            printed_number(claim.printed)
        except ClaimError as error:
            return str(error)
    return broken


def printed_number(text: str) -> tuple[float, float]:
    """A printed number and half a unit of its last digit: "36,288,252", "3.6e7", "1/4", "+81 %", "8.5 ± 0.1".

    Fractions are exact. `ClaimError` where the text does not begin with a number. Built in chapter 19.
    """
    text = text.strip()
    if fraction := re.match(r"(\d+)/(\d+)", text):
        return int(fraction[1]) / int(fraction[2]), 0.0
    number = _NUMBER.match(text.lstrip("±<> "))
    if not number:
        raise ClaimError(f"printed={text!r} must begin with its number")
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
def _printed_of(path: Path = LEDGER) -> dict[str, tuple[float, float]]:
    """(number, half a unit) by id, and of what stands after ± by ID.sd."""
    found = {}
    for claim in load_claims(path):
        number, _, deviation = claim.printed.lstrip("± ").partition("±")
        for name, text in ((claim.id, number), (f"{claim.id}.sd", deviation)):
            try:
                found[name] = printed_number(text)
            except ClaimError:  # a word, where nothing is computed from it
                continue
    return found


def evaluate(claim: Claim, folder: str | Path = "results") -> Outcome:
    """Compute a claim and derive its status. Built in chapter 19.

    Reproduced: the printed number, give or take half a unit of its last digit (or `tolerance`), meets the
    computed one, give or take the rounding of the printed numbers that it is computed from. A measured
    claim without a file in `folder` is open.
    """
    if claim.result is not None:
        value, detail = _measured(claim.result, folder)
        if value is None:
            return Outcome(None, claim.printed, "open", detail)
        low = high = value
    elif claim.computed is None:
        return Outcome(None, claim.printed, claim.status, "")
    else:
        value, low, high, detail = _compute(claim)
    if claim.status:  # computed to inform, not to judge
        return Outcome(value, claim.printed, claim.status, detail)
    expected, agrees = _compare(claim, low, high)
    return Outcome(value, expected, "reproduced" if agrees else "contradicted", detail)


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
    if sign == "<":
        return text, high < target
    if sign == ">":
        return text, low > target
    slack = 1e-9 * max(1.0, abs(target))  # a computed value that lies on the edge of the rounding
    return text, low - half - slack <= target <= high + half + slack


def _measured(wanted: dict[str, Any], folder: str | Path) -> tuple[Number | None, str]:
    """Mean of a measure over the results whose settings hold all of `where`."""
    where = wanted.get("where", {})
    found = [
        result.measures[wanted["measure"]]
        for result in results.load(folder, wanted["experiment"])
        if where.items() <= result.settings.items() and wanted["measure"] in result.measures
    ]
    if not found:
        return None, "not measured yet"
    return math.fsum(found) / len(found), f"mean of {len(found)} runs of {wanted['experiment']}"


# The command `moemla claims`.


def select(claims: Iterable[Claim], ids: Iterable[str]) -> list[Claim]:
    """Claims by id; A2 stands for A2 and all of A2-*. `ClaimError` for an id that finds none.

    Built in chapter 19.
    """
    claims, ids = list(claims), list(ids)
    for name in ids:
        if not any(_under(claim.id, name) for claim in claims):
            groups = dict.fromkeys(claim.id.partition("-")[0] for claim in claims)
            raise ClaimError(f"no claim {name!r}; ids begin with {', '.join(groups)}")
    return [claim for claim in claims if not ids or any(_under(claim.id, name) for name in ids)]


def _under(claim_id: str, name: str) -> bool:
    return claim_id.lower() == name.lower() or claim_id.lower().startswith(f"{name.lower()}-")


def table(rows: Iterable[tuple[Claim, Outcome]]) -> Any:
    """A rich table of claims and their outcomes. Built in chapter 19."""
    from rich.table import Table
    from rich.text import Text

    colours = {"reproduced": "green", "contradicted": "red", "open": "yellow", "undetermined": "cyan"}
    drawn = Table()
    for column in ("id", "where", "printed", "ours", "status"):
        drawn.add_column(column, overflow="fold", no_wrap=column in ("id", "status"))
    for claim, outcome in rows:
        cells = (claim.id, claim.where, claim.printed, show(claim, outcome))
        drawn.add_row(*map(Text, cells), Text(outcome.status, style=colours[outcome.status]))
    return drawn


def show(claim: Claim, outcome: Outcome) -> str:
    """The computed value with one digit more than is printed, or "-". Built in chapter 19."""
    value = outcome.computed
    if value is None:
        return "-"
    if isinstance(value, int) and abs(value) < 10**9:
        return f"{value:,}"
    if claim.expect or claim.status or (half := printed_number(claim.printed)[1]) in (0.0, 0.5):
        return f"{value:,.5g}"
    return f"{value:,.{max(0, round(-math.log10(2 * half))) + 1}f}"


def main(ids: Iterable[str] = (), as_json: bool = False, folder: str | Path = "results") -> int:
    """Print the ledger, or the claims `ids` with notes; returns the exit code 0. Built in chapter 19."""
    ids = list(ids)
    rows = [(claim, evaluate(claim, folder)) for claim in select(load_claims(), ids)]
    counts = {status: sum(outcome.status == status for _, outcome in rows) for status in STATUSES}
    if as_json:
        entries = [asdict(claim) | asdict(outcome) | {"function": claim.computed} for claim, outcome in rows]
        print(json.dumps({"claims": entries, "counts": counts}, indent=1, allow_nan=False))
        return 0
    from rich.console import Console

    console = Console()
    console.print(table(rows))
    if ids:
        for claim, outcome in rows:
            text = " ".join(t for t in (claim.note, f"[{outcome.detail}]" if outcome.detail else "") if t)
            console.print(f"{claim.id}: {text}", markup=False, highlight=False)
    console.print(f"{len(rows)} claims: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return 0
