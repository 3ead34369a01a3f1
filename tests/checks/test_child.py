"""What the process of a reader's file does with it: runs it as a module, and says in a line where it went wrong."""

import json
import os
import sys

import pytest
import torch

from moemla.checks import child
from moemla.checks.chapters import Todo
from moemla.checks.compare import CheckFailed


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes mine.py and loads it; the interpreter's own settings come back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setitem(sys.modules, child.NAME, None)

    def load(source):
        (tmp_path / "mine.py").write_bytes(source.encode() if isinstance(source, str) else source)
        return child.load(tmp_path / "mine.py")

    return load


def test_a_file_is_a_module_beside_its_folder(mine, tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    module = mine(
        "from dataclasses import dataclass\nfrom beside import NAME\n"
        "@dataclass\nclass Sizes:\n    d: int = 3\nif __name__ == '__main__':\n    raise SystemExit\n"
    )
    assert module.NAME == "beside" and module.Sizes().d == 3
    assert module.__file__ == str(tmp_path / "mine.py") and not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\ndef f(:\n", "mine.py, line 2: invalid syntax"),
        ("x = 1\n\nx / 0\n", "mine.py, line 3: ZeroDivisionError: division by zero"),
        ("def f():\n    g()\n\n\nf()\n", "mine.py, line 2: NameError: name 'g' is not defined"),
        ("import sys\nsys.exit()\n", "mine.py, line 2: sys.exit() is called"),
        ("import sys\nsys.exit('bye')\n", "mine.py, line 2: sys.exit('bye') is called"),
        ("raise KeyboardInterrupt\n", "mine.py, line 1: KeyboardInterrupt"),
        ("raise ValueError('a\\nb')\n", "mine.py, line 1: ValueError: a b"),
        ("raise ValueError(400 * 'a')\n", f"mine.py, line 1: ValueError: {300 * 'a'} ..."),
        ("import torch\ntorch.ones(2) @ torch.ones(3)\n", "mine.py, line 2: RuntimeError: "),
        ("import nowhere\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        (
            "raise ModuleNotFoundError(\"No module named 'triton'\")\n",
            "'triton' (Triton is for Linux; loops over tiles",
        ),
        (
            "raise RuntimeError('0 active drivers ([]). One.')\n",
            "One. (without a GPU, os.environ['TRITON_INTERPRET'] =",
        ),
        ("class A:\n    return\n", "mine.py, line 2: 'return' outside function"),
        ("x = '\x00'\n", "null bytes"),
        (b"x = '\xff'\n", "codec can't decode byte 0xff"),
    ],
)
def test_what_goes_wrong_is_one_line_with_its_place(mine, tmp_path, source, said):
    with pytest.raises(BaseException) as wrong:
        mine(source)
    line = child.explain(wrong.value, tmp_path / "mine.py")
    assert said in line and "\n" not in line and str(tmp_path) not in line


def test_a_check_holds_or_fails_or_is_not_run(tmp_path):
    def run(check=None, said="", missing=False):
        return child.outcome(Todo("a line", check, said, missing), tmp_path / "mine.py")

    def fails():
        raise CheckFailed("x (1, 2): 3, wanted 4")

    assert run(lambda: None) == dict(status="holds", figures={})
    assert run(lambda: {"bytes": 3}) == dict(status="holds", figures={"bytes": 3})
    assert run(fails) == dict(status="fails", said="x (1, 2): 3, wanted 4")
    assert run(said="it takes no lengths") == dict(status="left out", said="it takes no lengths")
    assert run(said="no class", missing=True) == dict(status="fails", said="no class")
    for end in (SystemExit(2), KeyboardInterrupt(), ZeroDivisionError("division by zero")):
        told = run(lambda end=end: (_ for _ in ()).throw(end))
        assert told["status"] == "fails" and "Traceback" in told["trace"] and "\n" not in told["said"]


def test_settings_of_the_file_are_taken_back():
    before = torch.get_default_dtype()
    try:
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")
        child.settings()
        assert torch.ones(1).dtype == torch.float64 and torch.ones(1).device.type == "cpu"
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def test_only_the_process_itself_reports(tmp_path):
    report = child.Report(tmp_path / "report")
    report.write(label="a")
    copy = os.fork()
    if copy == 0:
        report.write(label="b")
        os._exit(7)  # not reached: the write ended the copy
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 0
    report.write(done=True)
    assert [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()] == [
        {"label": "a"},
        {"done": True},
    ]
