"""The patches of the museum still fit the library; `make mutants` runs them."""

import ast
import shlex

import pytest

from tools.book import BOOK, ROOT
from tools.mutants import mutants, page

MUSEUM = mutants()


@pytest.mark.parametrize("mutant", MUSEUM, ids=[mutant.name for mutant in MUSEUM])
def test_the_patch_fits(mutant):
    text = (ROOT / mutant.module).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.module}: the text of the patch stands {text.count(mutant.old)} times"
    assert mutant.new != mutant.old
    compile(text.replace(mutant.old, mutant.new), mutant.module, "exec")
    words = shlex.split(mutant.tests)
    for file, _, test in [word.partition("::") for word in words if word.startswith("tests/")]:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert not test or test.partition("[")[0] in {node.name for node in tree.body if hasattr(node, "name")}
    assert words[0].startswith("tests/") and mutant.story.endswith(".")


def test_the_table_shows_every_mutant():
    kept = (BOOK / "mutants.md").read_text(encoding="utf-8")
    rows = [line.rsplit("|", 2)[0] for line in page([(mutant, True, "x") for mutant in MUSEUM]).splitlines()]
    assert len({mutant.name for mutant in MUSEUM}) == len(MUSEUM) >= 15
    assert [line.rsplit("|", 2)[0] for line in kept.splitlines()] == rows, "run `make mutants`"


MUSEUM_OF_ONE = """
moemla/losses.py

name-of-one
Something goes wrong.
  def f(x):
-     return x
+     return 2 * x
+     # twice
tests/test_losses.py -k 'one or other'
"""


def test_an_entry_is_read_as_a_patch():
    (mutant,) = mutants(MUSEUM_OF_ONE)
    assert (mutant.name, mutant.module) == ("name-of-one", "moemla/losses.py")
    assert mutant.old == "def f(x):\n    return x" and mutant.new == "def f(x):\n    return 2 * x\n    # twice"
    assert mutant.tests == "tests/test_losses.py -k 'one or other'"
