"""The patches of the museum still fit the library; `make mutants` runs them."""

import pytest

from tools.mutants import MUSEUM, ROOT, page


@pytest.mark.parametrize("mutant", MUSEUM, ids=[mutant.name for mutant in MUSEUM])
def test_the_patch_fits(mutant):
    text = (ROOT / "moemla" / f"{mutant.module}.py").read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, (
        f"{mutant.module}.py: the text of the patch stands {text.count(mutant.old)} times"
    )
    assert mutant.new != mutant.old
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests.split())


def test_the_table_shows_every_mutant():
    kept = (ROOT / "book" / "mutants.md").read_text(encoding="utf-8")
    rows = [line.rsplit("|", 2)[0] for line in page([(mutant, True, "x") for mutant in MUSEUM]).splitlines()]
    assert len({mutant.name for mutant in MUSEUM}) == len(MUSEUM) >= 15
    assert [line.rsplit("|", 2)[0] for line in kept.splitlines()] == rows, "run `make mutants`"
