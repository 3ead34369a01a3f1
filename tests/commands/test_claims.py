"""`moemla claims`: an entry whole, and near ones for a name that is none."""

import json

from moemla.cli import main
from tests.commands.shell import failed


def test_claims_prints_an_entry_whole(capsys):
    from moemla.paper import claims

    (claim,) = [claim for claim in claims.load_claims() if claim.id == "A1"]
    outcome = claims.evaluate(claim)
    assert main(["claims", "a1"]) == 0
    out = capsys.readouterr().out
    entry = " ".join(out.split("A1-")[0].split())
    for part in (claim.where, claim.printed, claims.show(claim, outcome), outcome.status, claim.note):
        assert " ".join(part.split()) in entry
    assert entry.startswith("A1 where") and entry.endswith(f"chapter {claim.chapter}")
    assert main(["claims", "A1", "A2", "--json"]) == 0
    ids = [one["id"] for one in json.loads(capsys.readouterr().out)["claims"]]
    assert ids[0] == "A1" and all(one.split("-")[0] in ("A1", "A2") for one in ids)


def test_an_unknown_claim_suggests_near_ones(capsys):
    line = failed(capsys, "claims", "A1", "a9-heds")
    assert line.startswith("1") and "no claim 'a9-heds'; near: A9-heads" in line
    assert "see moemla claims" in failed(capsys, "claims", "pudding")
