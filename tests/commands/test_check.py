"""`moemla check`: a reader's file in a process of its own, whatever it does there, and one clear line for each."""

import json
import os
import signal
import time

import pytest

from moemla.cli import main
from tests.commands.shell import SLOW_START, child, failed
from tests.readers import FILES, wrong_file

RULE = FILES[8][: FILES[8].index("def proportional_rule")].partition("def update")[2]
RULE = f"import torch\n\n\ndef update{RULE}"  # the shortest file that holds: the sign rule of chapter 8
HELD = "5 hold, 0 fail"


@pytest.fixture
def check(tmp_path, capfd):
    """Writes mine.py and checks it: exit code, what is printed, what is said on the other channel."""

    def run(source, number=8, *more):
        (tmp_path / "mine.py").write_text(source)
        code = main(["check", str(number), str(tmp_path / "mine.py"), *map(str, more)])
        out, err = capfd.readouterr()
        assert "--debug" in more or "Traceback" not in out + err
        return code, out, err

    return run


def test_a_right_file_holds_line_by_line(check, tmp_path):
    code, out, err = check(FILES[7], 7)
    first, *lines, last = out.splitlines()
    assert code == 0 and err == "" and first.startswith("chapter 7: ") and "is run" in first
    assert all(line[:9] in ("holds    ", "left out ") for line in lines)
    assert any("weights by shape experts.*.up.weight = experts.w_in" in line for line in lines)
    assert any("time of a pass with gradients: " in line and line.endswith("times the library's") for line in lines)
    assert last == "6 hold, 0 fail, 1 left out"
    assert not (tmp_path / "__pycache__").exists()


def test_kernels_are_given_float32_and_it_is_said(check):
    broken = FILES[12].replace(
        "def merge(means, logs):", "def merge(means, logs):\n    assert logs.dtype == torch.float32"
    )
    code, out, _ = check(broken, 12)
    assert code == 0 and out.splitlines()[0].endswith("is run, in float32, beside moemla's own")
    assert out.splitlines()[-1] == "12 hold, 0 fail, 0 left out"


def test_bytes_and_messages_are_told(check):
    code, out, _ = check(FILES[2], 2)
    assert code == 0 and "bytes held by the cache: 8,192 bytes\n" in out
    assert 'refuses more: it says "new (2, 4, 1, 8): room for (2, 4, 0, 8)"\n' in out


def test_a_wrong_file_fails_with_its_input(check):
    code, out, err = check(wrong_file(8, "bias + rate * torch.sign", "bias - rate * torch.sign"))
    assert code == 1 and err == ""
    assert "FAILS    update: lifts the less loaded: counts [2, 0], top 1: expert 1 of 0 tokens gets bias -0.1" in out
    assert "holds    switch_loss: equals the library's, gradients too\n" in out and " fail, " in out.splitlines()[-1]


def test_json_is_one_object(check):
    code, out, err = check(RULE + "print('hello')\n", 8, "--json")
    told = json.loads(out)
    assert code == 0 and err == "" and told["whole"] and told["error"] is None and told["chapter"] == 8
    assert (told["holds"], told["fails"]) == (len(told["lines"]) - told["left out"], 0)
    assert set(told["lines"][0]) <= {"label", "status", "said", "figures"}
    balanced = next(line for line in told["lines"] if line["label"] == "update: balances a skewed router")
    assert balanced["figures"]["after"] < balanced["figures"]["before"]
    code, out, err = check("import nowhere", 8, "--json")
    told = json.loads(out)
    assert code == 1 and err == "" and not told["whole"] and told["lines"] == []
    assert told["error"] == "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"


def test_without_a_file_it_says_what_it_looks_for(capsys):
    assert main(["check", "6"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "def route(logits, [bias], top_k, [scores])"
    assert out[1].startswith("def experts(x, w_in, w_out, index, gate") and out[1].endswith("# may be left out")


# ---- files that cannot be checked


def test_what_is_no_file_is_said_before_anything_runs(tmp_path, capsys):
    assert failed(capsys, "check", "2", tmp_path / "gone.py").endswith("gone.py: no such file\n")
    assert failed(capsys, "check", "2", tmp_path).endswith(": is no file\n")
    (tmp_path / "mine.ipynb").write_text("{}")
    assert "is a notebook; put its classes and functions into a .py file" in failed(
        capsys, "check", "2", tmp_path / "mine.ipynb"
    )
    assert failed(capsys, "check", "9", tmp_path / "gone.py").startswith("2 moemla: chapter 9: choose one of 2, 3,")
    assert failed(capsys, "check", "2", "mine.py", "--seconds", "nan") == (
        "2 moemla: --seconds nan: must be a number above 0\n"
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\ndef f(:\n", "mine.py, line 2: invalid syntax"),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: sys.exit(3) is called"),
        ("import os\nos._exit(0)\n", "mine.py: ends the process that runs it (exit code 0)"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "(signal SIGSEGV)"),
        ("input('name? ')\n", "mine.py, line 1: EOFError"),
    ],
)
def test_a_file_that_fails_as_it_is_imported_is_one_line(check, source, said):
    code, _, err = check(source)
    assert code == 1 and err.startswith("moemla: ") and err.count("\n") == 1 and said in err, err


def test_a_file_that_runs_for_ever_is_ended(check):
    began = time.monotonic()
    code, _, err = check("import time\nwhile True:\n    print('x' * 1000)\n", 8, "--seconds", 1)
    assert code == 1 and err == "moemla: mine.py, line 3: still running after 1 s\n"
    assert time.monotonic() - began < SLOW_START


@pytest.mark.parametrize("source", ["", "import torch\nfrom moemla.balancing import sign_rule\n"])
def test_a_file_with_nothing_of_its_own(check, source):
    code, out, err = check(source)
    assert code == 1 and err == "" and out.splitlines()[-1].startswith("0 hold, 1 fail, ")
    assert (
        "FAILS    sign_rule: def sign_rule(bias, counts, [top_k], rate) was expected; the file has no function" in out
    )


# ---- files that do more than define


def test_what_a_file_does_besides_changes_nothing(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    besides = f"""
import os, subprocess, sys, threading, time
print("noise"), print("noise", file=sys.stderr)
os.chdir("/")
sleeper = subprocess.Popen(["sleep", "600"])
open({str(tmp_path / "pid")!r}, "w").write(str(sleeper.pid))
os.fork()
threading.Thread(target=time.sleep, args=(600,)).start()
torch.set_grad_enabled(False), torch.set_default_dtype(torch.float16)
sys.stdout = sys.stderr = None
assert sys.stdin.read() == ""
"""
    code, out, err = check(RULE + besides)
    assert code == 0 and err == "" and "noise" not in out and out.splitlines()[-1].startswith(HELD), out
    assert os.getcwd() == str(tmp_path)
    with pytest.raises(ProcessLookupError):  # a process that has ended and is nobody's yet counts as ended
        for _ in range(200):
            if "Z" in _state(int((tmp_path / "pid").read_text())):
                raise ProcessLookupError
            time.sleep(0.05)


def _state(pid):
    os.kill(pid, 0)
    return next(line for line in open(f"/proc/{pid}/status") if line.startswith("State:"))


# ---- files whose code fails as it is called


@pytest.mark.parametrize(
    ("body", "said", "whole"),
    [
        ("    return bias.nonsense\n", "mine.py, line 5: AttributeError: 'Tensor' object has no attribute", True),
        ("    return None\n", "update gives NoneType, not a tensor", True),
        ("    import os; os._exit(7)\n", "mine.py: ends the process that runs it (exit code 7)", False),
        ("    while True: pass\n", "mine.py, line 5: still running after 2 s", False),
    ],
)
def test_code_that_fails_is_said_at_its_line(check, body, said, whole):
    code, out, err = check(
        f"import torch\n\n\ndef update(bias, counts, top_k, rate):\n{body}", 8, "--seconds", 60 if whole else 2
    )
    first = out.splitlines()[1]
    assert (
        code == 1 and err == "" and first.startswith("FAILS    update: equals the library's rule: ") and said in first
    )
    assert out.splitlines()[-1].endswith("the rest was not run") == (not whole)


def test_a_layer_that_cannot_be_built_is_said(check):
    layer = "from torch import nn\nclass Mine(nn.Module):\n    def __init__(self, d_model, n_heads):\n"
    code, out, _ = check(f"{layer}        self.p = nn.Linear(1, 1)\n", 2)
    assert (
        code == 1 and "Mine: outputs equal the library's: mine.py, line 4: AttributeError: cannot assign module" in out
    )


def test_debug_shows_the_traceback_and_what_was_printed(check):
    code, out, err = check("print('hello')\ndef update(bias, counts, top_k, rate):\n    return 1 / 0\n", 8, "--debug")
    assert code == 1 and "hello" in err and "Traceback" in err and 'mine.py", line 3, in update' in err
    assert "Traceback" not in out


def test_an_interrupt_ends_the_child_too(tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "mine.py").write_text(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    process = child("check", 8, tmp_path / "mine.py")
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=SLOW_START)[1] and process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
