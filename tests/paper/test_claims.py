"""The ledger keeps its rules, its values are what an independent computation gives, and its statuses follow."""

import dataclasses
import json
import math
import re

import pytest
from scipy import stats

from moemla.errors import MoemlaError
from moemla.experiments import find, ten_minutes
from moemla.experiments.runner import Text
from moemla.paper import claims
from moemla.paper.claims import Claim, ClaimError, evaluate, load_claims, printed_number, select
from moemla.paper.measured import measured
from moemla.results import ResultError, of, write
from tests.test_results import ORIGIN, cell, result

LEDGER = {claim.id: claim for claim in load_claims()}


def outcome(name: str):
    return evaluate(LEDGER[name])


def test_every_item_of_the_paper_stands_in_the_ledger():
    groups = {claim.partition("-")[0] for claim in LEDGER}
    assert {f"A{n}" for n in range(1, 37)} <= groups
    assert all(re.fullmatch(r"[ASTM]\d+(-[A-Za-z0-9-]+)?", name) for name in LEDGER)


def test_every_cell_of_the_tables_has_one_row():
    assert len(claims.cells()) == 135 and claims.missing_cells(LEDGER.values()) == []
    places = [claim.where for claim in LEDGER.values() if claim.where in claims.cells()]
    assert len(places) == len(set(places))


def test_a_cell_without_a_row_is_named():
    rest = [claim for name, claim in LEDGER.items() if name != "T8-mha-grammar"]
    assert claims.missing_cells(rest) == ["Table 8, MHA, Grammar"]


def test_neighbours_are_judged_alike():
    """Computed cells of one column have one tolerance, and so have all totals counted from a model."""
    columns: dict[tuple[str, str], set] = {}
    for claim in LEDGER.values():
        if claim.where in claims.cells() and claim.computed:
            table, row, column = claim.where.split(", ")
            columns.setdefault((table, row if table == "Table 6" else column), set()).add(claim.tolerance)
    assert all(len(tolerances) == 1 for tolerances in columns.values()), columns
    totals = [c for c in LEDGER.values() if c.computed in ("dense_millions", "total_millions")]
    assert len(totals) > 10 and {claim.tolerance for claim in totals} == {"1 %"}


def test_agreement_under_a_reading_is_not_called_computed():
    under = [claim for claim in LEDGER.values() if claim.reading]
    assert len(under) >= 12
    for claim in under:
        found = evaluate(claim)
        assert found.status == "undetermined" and f"if {claim.reading}" in found.detail
        assert re.match("holds if|does not hold if", found.detail)
    assert outcome("A11-mha").detail.startswith("holds if") and outcome("A12-rise").detail.startswith("does not hold")


def test_no_row_speaks_of_a_run_that_does_not_exist():
    """What is said to be run here is said of a file in results/, or of the chapter that shows it."""
    for claim in LEDGER.values():
        assert claim.result or not re.search(r"\b(is|are|was|were) (run|trained|measured) here", claim.note), claim.id


@pytest.mark.parametrize("name", LEDGER)
def test_each_claim_is_evaluated(name, tmp_path):
    claim = LEDGER[name]
    found = evaluate(claim, tmp_path)
    assert found.status in claims.STATUSES | claims.NOT_JUDGED and claim.note.endswith(".")
    if claim.computed:
        assert math.isfinite(found.computed)
    allowed = {
        "arithmetic": {"computed", "consistent", "contradicted", "undetermined"},
        "measured": {"measured", "not run", "undetermined"},
        "setting": {"input", "not run", "undetermined"},
        "citation": {"consistent", "contradicted", "undetermined"},
        "aside": {"aside"},
    }
    assert found.status in allowed[claim.kind]
    if claim.kind == "arithmetic":
        assert (found.status == "undetermined") == (claim.reading is not None)


def test_no_function_stands_idle():
    used = {claim.computed for claim in LEDGER.values() if claim.computed}
    assert set(claims.FUNCTIONS) == used


# Values from computations that share nothing with the library.

C = 50257
DENSE = {s: 12 * n * d * d + C * d for s, (n, d) in {"XS": (6, 256), "M": (9, 512), "XL": (12, 1024)}.items()}
EXPECTED = {
    "A1": 61_474_519,
    "A2-M": 54.104064,
    "A3-T2": 54.1,
    "A4-share": 1 / 64,
    "A5-capacity": 2,
    "A6-share": 100 * (53.9 - 31.4) / 53.9,
    "A8": 512 / math.sqrt(64 / 6),
    "A8-routed": 512 / math.sqrt(62 / 6),
    "A8-all": 512 / math.sqrt(8),
    "A9-rule": 512 * math.sqrt(6 / 64),
    "A9-inverse": 512 * math.sqrt(64 / 6),
    "A9-cube": 512 * 2 ** (1 / 3),
    "A10-abstract": 50,
    "A10-joint": 68.75,
    "A11-mha": 2 * 12 * 1024 * 16 * 512 * 2 / 2**20,
    "A11-mla": 2 * 12 * 512 * 16 * 512 * 2 / 2**20,
    "A12-parameters": 405.4e6 / 2**20,
    "A12-mha": 406e6 / 2**20 + 384 + 48,
    "A12-rise": 100 * ((1784e6 / 2**20 + 192 + 68) / (406e6 / 2**20 + 384 + 48) - 1),
    "A13-eight": 892 / 203,
    "A14-moe-mla-rope": 1152,
    "A14-mla-rope-change": 100 * (447 / 635 - 1),
    "A15-mha": 384 * 16,
    "A15-saving": 100 * (1 - 8 * 256 / 512),
    "A16-width": 256 / 64,
    "A17-rebuilt-512": 1,
    "A17-absorbed-512": 2,
    "A17-absorbed-2048": 3,
    "A17-absorbed-8192": 11 / 3,
    "A17-proof": 5 / 6,
    "A18-active": (6 * 2 + 2) / 64,
    "A19-ffn": 8,
    "A19-block": 12,
    "A19-cost": 2 * 1.5 - 4,
    "A19-matched-512": 14 / (6 + 1 + 62 / 512),
    "A19-quarter-8192": 44 / (36 + 16 + 62 / 512),
    "A21-loss": 100 * (math.log(8.542) - math.log(7.388)) / math.log(8.542),
    "A21-flops-loss": 100 * (math.log(8.542) - math.log(7.012)) / math.log(8.542),
    "A21-degradation": 100 * (7.388 - 7.347) / 7.347,
    "A23-sum": 100 * (7.388 - 8.971 - 8.092 + 8.542) / 8.542,
    "A42-scaling": 100 * ((5.12 - 4.44) / 5.12 - (6.23 - 5.12) / 6.23),
    "A42-larger": 5.51 - 5.12,
    "A25-tokens": 3.2768,
    "A27-target": 6 / 62,
    "A27-drift": -5 / 62,
    "A27-ratio": 62 / 6,
    "A27-cv": math.sqrt((1 - 6 / 62) / (65536 * 6 / 62)),
    "A28": (g := math.exp(1) / (math.exp(1) + math.exp(0.5))) * (1 - g),
    "A30-spread": math.sqrt(0.8**2 + 1.2**2 + 1.1**2) / 3,
    "A34-XL": 100 * (4.44 / 5.12 - 1),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_computed_values(name):
    tolerance = {"A4-share": 0.03, "A12-mha": 1e-3, "A12-parameters": 1e-3}.get(name, 1e-4)
    assert outcome(name).computed == pytest.approx(EXPECTED[name], rel=tolerance)


@pytest.mark.parametrize("size", DENSE)
def test_table_1_without_the_library(size):
    """12 L d^2 and the token table; norms and biases add less than half a percent."""
    assert 0 < outcome(f"A2-{size}").computed - DENSE[size] / 1e6 < 5e-3 * DENSE[size] / 1e6


@pytest.mark.parametrize(("r", "attention"), [(512, 6), (256, 4), (128, 3), (64, 2.5)])
def test_latent_width_moves_the_total(r, attention):
    """Projections take 2d^2 + 4dr a layer, the experts 8d^2 and the router 62d."""
    bare = (9 * ((attention + 8) * 512**2 + 62 * 512) + C * 512) / 1e6
    assert outcome(f"A7-r{r}").computed == pytest.approx(bare, rel=1e-3)


def test_quarter_experts_without_the_library():
    bare = (9 * (4 * 512**2 + 64 * 2 * 512 * 512 + 62 * 512) + C * 512) / 1e6
    active = (9 * (4 * 512**2 + 8 * 2 * 512 * 512 + 62 * 512) + C * 512) / 1e6
    assert outcome("A4-quarter").computed == pytest.approx(bare, rel=1e-3)
    assert outcome("A5-active").computed == pytest.approx(100 * (1 - active / 54.104), rel=5e-3)


def test_flops_at_645_without_the_library():
    def macs(d, ffn):
        return 9 * (4 * d * d + 2 * 512 * d + ffn) + C * d

    dense = macs(512, 8 * 512**2)
    assert outcome("A9-flops-quarter").computed == pytest.approx(macs(645, 16 * 645**2 + 62 * 645) / dense, rel=1e-6)
    fine = macs(645, 16 * 645 * 40 + 62 * 645) / dense
    assert outcome("A9-flops-moe-mha").computed == pytest.approx(fine, rel=1e-6)


@pytest.mark.parametrize(("name", "rho"), [("moe-mha", 0), ("moe-mla", -1), ("moe-mla-rope", -1), ("mla-rope", 0)])
def test_p_values_against_scipy(name, rho):
    (a, sd_a), (b, sd_b) = [[float(x) for x in LEDGER[f"T2-{model}"].printed.split(" ± ")] for model in ("mha", name)]
    t = abs(a - b) / math.sqrt((sd_a**2 + sd_b**2 - 2 * rho * sd_a * sd_b) / 3)
    assert outcome(f"A29-{name}").computed == pytest.approx(2 * stats.t.sf(t, 2), rel=1e-6)


def test_interval_against_scipy():
    relative = 7.388 / 8.542 * math.hypot(0.021 / 8.542, 0.015 / 7.388) / math.sqrt(3)
    assert outcome("A29-interval").computed == pytest.approx(100 * stats.t.ppf(0.975, 2) * relative, rel=1e-6)


STATUSES = {
    "computed": [
        "A5-capacity",
        "A15-ratio",
        "A10-r256",
        "A17-mha",
        "A25-batch",
        "A25-tokens",
        "A26-relative",
        "T5-fine-space",
    ],
    "consistent": [
        "A6-share",
        "A23-sum",
        "A14-mha",
        "A21-ppl",
        "A23-combination",
        "A34-XS",
        "T3-mha",
        "T8-mha-overall",
    ],
    "contradicted": [
        "A1",
        "A1-rounded",
        "A3-T7",
        "A4-quarter",
        "A10-abstract",
        "A17-rebuilt-512",
        "A19-limit",
    ],
    "not run": ["T2-mha", "A23-cells", "A24-moe-mla-rope"],
    "undetermined": [
        *(
            "A3-T2",
            "T2-moe-mla-active",
            "A2-M",
            "A4-matched",
            "A10-joint",
            "A11-mha",
            "A22",
            "A31",
            "A35",
            "A20-guarantees",
        ),
        *("A7-r512", "A8-routed", "A12-parameters", "A13-quarter", "A21-degradation", "A28", "T7-M-moe"),
        *("A42-scaling", "A42-larger"),  # under readings that are ours
    ],
    "input": ["A25-sequences", "A25-length", "A25-warmup-steps", "T1-M-heads"],
    "aside": [
        "A15-saving",
        "A16-width",
        "A18-routing",
        "A17-rebuilt-2048",
        "A2-convention",
        "A17-absorbed-512",
        "A19-quarter-512",
        "A27-drift",
        "A27-ratio",
    ],
}


@pytest.mark.parametrize(("status", "name"), [(s, name) for s, names in STATUSES.items() for name in names])
def test_statuses(status, name):
    assert outcome(name).status == status


# The status follows from the numbers.


@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        ("A1", {"printed": "61,474,519 combinations"}, "computed"),
        ("A1", {"printed": "61,474,520 combinations"}, "contradicted"),
        ("A1-rounded", {"printed": "6.1e7"}, "computed"),
        ("A1-rounded", {"printed": "6.2e7"}, "contradicted"),
        ("A2-M", {"reading": None}, "computed"),
        ("A2-M", {"reading": None, "printed": "55.1 M"}, "contradicted"),
        ("A2-XS", {"reading": None, "tolerance": None}, "contradicted"),  # 17.60 is not 17.5 to the digit
        ("A2-M", {"reading": None, "tolerance": None}, "computed"),
        ("A3-T2", {"reading": None}, "contradicted"),
        ("A3-T2", {"reading": None, "printed": "54.1 M"}, "consistent"),
        ("T2-moe-mla-active", {"reading": None}, "contradicted"),
        ("A4-share", {"printed": "1/64 of the FFN", "tolerance": "5 %"}, "computed"),
        ("A10-joint", {"reading": None, "tolerance": None}, "contradicted"),  # 68.75 rounds to 69
        ("A21-loss", {"printed": "6.8 %"}, "consistent"),
        ("A14-net", {"expect": "> 0"}, "consistent"),
        ("A19-cost", {"expect": "< 0"}, "computed"),
        ("A19-factor", {"given": {"form": "proof"}}, "computed"),
        ("A17-mha", {"given": {"n": 513}}, "contradicted"),
        ("A23-combination", {"of": ["T2-mha", "T2-moe-mla"]}, "contradicted"),  # 9.4 % without rotary positions
        ("A23-sum", {"expect": "< -13.26"}, "consistent"),  # -13.288 to -13.240: numbers that round so may meet either
        ("A23-sum", {"expect": "> -13.26"}, "consistent"),
        ("A23-sum", {"expect": "> -13.23"}, "contradicted"),
        ("A25-batch", {"of": ["A25-sequences", "T2-mha"]}, "contradicted"),
        ("A34-L", {"printed": "-11.8 %"}, "contradicted"),
        ("A34-L", {"printed": "11.5 %"}, "contradicted"),
        ("T2-mha", {"status": "undetermined"}, "undetermined"),
    ],
)
def test_another_number_another_status(name, changes, status):
    claim = LEDGER[name]
    assert evaluate(dataclasses.replace(claim, **changes)).status == status


def test_the_rounding_of_what_goes_in_counts():
    """-11.557 from two-decimal perplexities: -11.5 is within their rounding, though not within its own digit."""
    claim = LEDGER["A34-L"]
    assert abs(evaluate(claim).computed - -11.5) > 0.05 and evaluate(claim).status == "consistent"


@pytest.mark.parametrize(
    ("text", "value", "half"),
    [
        ("36,288,252 ways", 36288252, 0.5),
        ("3.6e7", 3.6e7, 0.05e7),
        ("1/4 of it", 0.25, 0),
        ("+81 %", 81, 0.5),
        ("-5.3 %", -5.3, 0.05),
        ("8.542 ± 0.021", 8.542, 0.0005),
        ("± 0.3 %", 0.3, 0.05),
        ("4nd^2", 4, 0.5),
    ],
)
def test_printed_numbers(text, value, half):
    assert printed_number(text) == pytest.approx((value, half))


def test_measured_claims_follow_the_results_folder(tmp_path):
    wanted = {"experiment": "table2", "where": {"tags.arm": "mha"}, "measure": "perplexity", "scale": "paper"}
    claim = dataclasses.replace(LEDGER["T2-mha"], status=None, result=wanted, tolerance="1 %")
    assert evaluate(claim, tmp_path).status == "not run"
    for scale in ("paper", "cpu"):
        for variant, seed, value in [("mha", 0, 8.50), ("mha", 1, 8.60), ("mla", 0, 99.0)]:
            write(result(cell(variant, seed=seed, scale=scale), {"perplexity": value}), tmp_path)
    found = evaluate(claim, tmp_path)
    assert found.computed == pytest.approx(8.55) and found.status == "measured"
    assert found.detail == "mean of 2 runs of table2 at scale paper"
    strict = dataclasses.replace(claim, tolerance=None)
    assert evaluate(strict, tmp_path).status == "contradicted"
    small = evaluate(dataclasses.replace(strict, result=wanted | {"scale": "cpu"}), tmp_path)
    assert small.status == "measured" and "at scale cpu" in small.detail  # another scale contradicts nothing
    write(result(cell("mha", seed=2, scale="paper", warmup=6), {"perplexity": 8.5}), tmp_path)
    with pytest.raises(ResultError, match=r"train.warmup"):
        evaluate(claim, tmp_path)


def test_an_unfinished_experiment_is_not_run(tmp_path, monkeypatch):
    """A mean over the seeds that happen to be there would be another one tomorrow."""
    wanted = {"experiment": "ten-minutes", "measure": "perplexity", "scale": "cpu"}
    claim = dataclasses.replace(LEDGER["T2-mha"], status=None, result=wanted, tolerance="1 %")
    (first,) = ten_minutes.cells("cpu", Text("builtin", "aa" * 32))
    second = dataclasses.replace(first, train=dataclasses.replace(first.train, seed=1))
    monkeypatch.setattr(ten_minutes, "cells", lambda scale, text: [first, second])
    write(result(first, {"perplexity": 8.5}), tmp_path)
    found = evaluate(claim, tmp_path)
    assert (found.status, found.detail) == ("not run", "not finished yet")
    write(result(second, {"perplexity": 8.6}), tmp_path)
    assert evaluate(claim, tmp_path).computed == pytest.approx(8.55)


def test_a_ratio_and_a_contrast_are_read_from_finished_experiments(tmp_path):
    experiment = find("flops")
    text = Text("builtin", "aa" * 32)
    runs = []

    def made(cells, losses, seconds):
        for one in cells:
            arm = one.tags["arm"]
            held = dict(nats_per_token=losses[arm] + 0.01 * (one.train.seed % 2), cpu_seconds=seconds[arm])
            runs.append(of(one, held | dict(loads=dict(batch=dict(cv=0.5))), ORIGIN))

    losses = {"mha-rope": 1.0, "mla-rope": 1.1, "moe-mha-rope": 1.2, "moe-mla-rope": 1.0 + math.log(1.25)}
    seconds = {"mha-rope": 100, "mla-rope": 100, "moe-mha-rope": 100, "moe-mla-rope": 130}
    made(experiment.cells("cpu", text), losses, seconds)
    made(experiment.measure("cpu", text, experiment.choose(runs)), losses, seconds)
    gain = {"experiment": "flops", "scale": "cpu", "contrast": "moe-mla-rope - mha-rope"}
    arms = dict(where={"tags.arm": "moe-mla-rope"}, over={"tags.arm": "mha-rope"})
    longer = {"experiment": "flops", "scale": "cpu", "measure": "cpu_seconds", **arms}
    for run in runs[:-1]:
        write(run, tmp_path)
    assert measured(gain, tmp_path) == measured(longer, tmp_path) == (None, "not finished yet")
    write(runs[-1], tmp_path)
    (value, low, high), detail = measured(gain, tmp_path)
    assert (
        value == pytest.approx(25.0)
        and low < value < high
        and detail.startswith("moe-mla-rope - mha-rope: +0.2231 ± 0.0")
    )
    assert measured(longer, tmp_path)[0] == pytest.approx((30.0, 30.0, 30.0))
    claim = dataclasses.replace(LEDGER["M2-flops"], result=gain, expect="< 0")
    assert evaluate(claim, tmp_path).computed == value
    cv = {"experiment": "flops", "scale": "cpu", "measure": "loads.batch.cv", "where": {"train.seed": 11}}
    with pytest.raises(ResultError, match="no runs of one kind"):
        measured(cv, tmp_path)  # arms in one mean
    assert measured(cv | {"where": {"tags.arm": "mla-rope", "train.seed": 11}}, tmp_path)[0] == (0.5, 0.5, 0.5)
    assert measured(gain | {"contrast": "none of these"}, tmp_path)[0] is None


@pytest.mark.parametrize(
    ("expect", "interval", "status"),
    [
        ("< 0", (0.1, -1.0, 1.2), "measured"),  # some of the interval agrees: nothing is contradicted
        ("< 0", (1.1, 0.1, 2.1), "contradicted"),
        ("> 0", (-0.1, -1.2, 1.0), "measured"),
        ("> 0", (-1.1, -2.1, -0.1), "contradicted"),
        ("= 0", (0.5, -0.5, 1.5), "measured"),
        ("= 0", (1.5, 0.5, 2.5), "contradicted"),
    ],
)
def test_an_interval_contradicts_where_none_of_it_agrees(monkeypatch, expect, interval, status):
    monkeypatch.setattr("moemla.paper.claims.measured", lambda wanted, folder: (interval, ""))
    result_ = LEDGER["M2-flops"].result | {"scale": "paper"}
    claim = dataclasses.replace(LEDGER["M2-flops"], result=result_, expect=expect)
    found = evaluate(claim)
    assert (found.status, found.computed) == (status, interval[0])


def test_every_claim_of_an_experiment_names_what_it_has():
    """A comparison that is registered, an arm, a measure that its runs hold: or the row would stay empty for ever."""
    wanted = [claim for claim in LEDGER.values() if claim.result]
    assert len(wanted) >= 8
    for claim in wanted:
        experiment = find(claim.result["experiment"])
        arms = {arm.name for arm in experiment.arms(experiment.SCALES[claim.result["scale"]])}
        for side in ("where", "over"):
            assert claim.result.get(side, {}).get("tags.arm", next(iter(arms))) in arms
        if name := claim.result.get("contrast"):
            assert name in {asked.name for asked in (*experiment.asked, *experiment.beside)}, claim.id


# The rules of the ledger.

GOOD = dict(
    id="A1", where="section 3.1", printed="6 %", kind="arithmetic", computed="equals", of=["A1"], chapter=1, note="N."
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guess"}, "kind='guess'"),
        ({"chapter": 20}, "chapter=20"),
        ({"computed": "magic"}, "function='magic'"),
        ({"of": ["A9"]}, "of='A9': no such claim"),
        ({"status": "computed"}, "leave it out"),
        ({"computed": None}, "an arithmetic claim is computed"),
        ({"printed": "six"}, "must begin with its number"),
        ({"expect": "= nothing"}, "function='nothing'"),
        ({"kind": "measured", "status": "measured"}, "one of undetermined, not run"),
        ({"kind": "citation", "status": "contradicted"}, "one of undetermined, not run"),
        ({"where": "the second page"}, "no place of the paper"),
        ({"where": "Table 2, MHA, Speedup"}, "no place of the paper"),
        ({"where": "section 3.1 with Table 9"}, "no place of the paper"),
        ({"tolerance": "1 %"}, "a tolerance has its reason"),
        ({"kind": "aside", "expect": "> 1"}, "an aside is computed and expects nothing"),
        ({"kind": "setting", "reading": "it rains"}, "a reading belongs to what is computed"),
        ({"kind": "measured", "result": {"experiment": "table2", "measure": "perplexity"}}, "names its scale"),
        ({"colour": "red"}, "no such field: colour"),
        ({"where": ""}, "must say something"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_named(tmp_path, changes, message):
    path = tmp_path / "claims.yml"
    path.write_text(json.dumps([GOOD]))  # JSON is YAML
    assert load_claims(path) == [Claim(**GOOD)]
    path.write_text(json.dumps([GOOD | changes]))
    with pytest.raises(ClaimError, match=message) as error:
        load_claims(path)
    assert str(error.value).startswith("claim A1: ")


def test_an_id_stands_once(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(json.dumps([GOOD, GOOD]))
    with pytest.raises(ClaimError, match="stands twice"):
        load_claims(path)


# The command.


def test_select_takes_an_item_with_its_parts():
    chosen = [claim.id for claim in select(LEDGER.values(), ["a2"])]
    assert chosen == ["A2-XS", "A2-S", "A2-M", "A2-L", "A2-XL", "A2-convention"]
    assert [claim.id for claim in select(LEDGER.values(), ["A1"])] == ["A1", "A1-rounded"]
    assert len(select(LEDGER.values(), [])) == len(LEDGER)
    of_table = select(LEDGER.values(), ["table 2"])
    assert {"T2-mha", "A6-active", "A29-moe-mla", "A3-T2"} <= {claim.id for claim in of_table}
    assert all("Table 2" in claim.where for claim in of_table)
    assert {"A21-loss", "A5-active"} <= {claim.id for claim in select(LEDGER.values(), ["abstract"])}
    with pytest.raises(MoemlaError, match="no claim 'section 3'"):  # is no part of section 3.1's name
        select(LEDGER.values(), ["section 3"])
    with pytest.raises(MoemlaError, match="no claim 'A99'; ids begin with A1, A2"):
        select(LEDGER.values(), ["A99"])


def test_main_prints_the_ledger(capsys, tmp_path):
    assert claims.main(folder=tmp_path) == 0
    text = capsys.readouterr().out
    assert "A17-rebuilt-512" in text
    for status, meaning in (claims.STATUSES | claims.NOT_JUDGED).items():
        assert (f"{status}: {meaning}"[:40] in text) == (status != "measured")
    counted = [int(n) for n in re.findall(r"\d+", text.splitlines()[-1])]
    assert re.match(r"\d+ claims: \d+ computed, \d+ consistent, \d+ measured, \d+ contradicted", text.splitlines()[-1])
    assert sum(counted[1:]) == len(LEDGER) and counted[0] == sum(counted[1:7])
    assert claims.main(["A1"], folder=tmp_path) == 0
    text = capsys.readouterr().out
    assert (
        "61,474,519" in text
        and "C(57, 6)" in text
        and "2 claims: 0 computed, 0 consistent, 0 measured, 2 contradicted" in text
    )
    assert claims.main(["A2-M", "A32-12"], folder=tmp_path) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "[holds if the head is tied" in said and "Judged at 1 %: Norms" in said and "See arXiv:2408.15664." in said
    assert "contradicted: disagrees" in text and "not run" not in text.partition("2 claims")[0]


def test_main_as_json(capsys):
    assert claims.main(["A2-M", "T2-moe-mla-rope-ratio", "A24-training"], as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert [c["id"] for c in data["claims"]] == ["A2-M", "T2-moe-mla-rope-ratio", "A24-training"]
    assert data["claims"][0]["computed"] == 54.104064 and data["claims"][0]["function"] == "dense_millions"
    assert {status: n for status, n in data["counts"].items() if n} == {"undetermined": 1, "not run": 1, "input": 1}
    assert "reproduced" not in data["counts"]


def test_shown_with_one_digit_more_than_printed():
    shown = {name: claims.show(LEDGER[name], outcome(name)) for name in ("A1", "A2-M", "A21-ppl", "T2-mha")}
    assert shown == {"A1": "61,474,519", "A2-M": "54.10", "A21-ppl": "13.51", "T2-mha": "-"}
