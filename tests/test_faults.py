"""Every row of book/faults.md names a test that is there."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (.*) \|$", (HERE.parent / "book/faults.md").read_text(encoding="utf-8"), re.M)[1:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(" |")[0])
def test_a_row_is_held_by_a_test(row):
    """*train*: ctrl c leaves a checkpoint, of test_train.py: test_ctrl_c_leaves_a_checkpoint."""
    file, words = re.fullmatch(r".* \| \*(\w+)\*: ([\w ]+)", row).groups()
    names = []
    for path in HERE.rglob(f"test_{file}.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names += [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    assert "test_" + words.replace(" ", "_") in names


def test_there_are_rows():
    assert len(ROWS) >= 15
