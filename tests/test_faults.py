"""Every row of book/faults.md names a test that is there."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (.*) \|$", (HERE.parent / "book/faults.md").read_text(encoding="utf-8"), re.M)[1:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(" |")[0])
def test_a_row_is_held_by_a_test(row):
    file, _, name = row.rpartition("`")[0].rpartition("`")[2].partition("::")
    functions = [
        node.name for node in ast.walk(ast.parse((HERE / file).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions


def test_there_are_rows():
    assert len(ROWS) >= 15
