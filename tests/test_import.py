"""`import moemla` costs little, brings nothing heavy along, and has every name that it promises."""

import ast
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import moemla
from moemla.errors import MoemlaError, optional

HEAVY = ("datasets", "transformers", "matplotlib", "triton", "tokenizers", "scipy", "openai", "rich", "tyro", "pandas")
CORE = "import moemla; moemla.LanguageModel, moemla.generate, moemla.Balancer, moemla.ModelConfig"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def seconds(code: str) -> float:
    """Processor time of a fresh interpreter: on a busy machine it is steadier than the clock on the wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_takes_at_most_1_3_times_as_long_as_torch():
    codes = ("import torch", "import moemla", CORE)
    for code in codes:  # once for the disk cache and the .pyc files
        run(code)
    rounds = [[seconds(code) for code in codes] for _ in range(3)]  # interleaved
    torchs, bare, core = (statistics.median(column) for column in zip(*rounds, strict=True))
    assert bare <= 1.3 * torchs, rounds
    assert core <= 1.3 * torchs, rounds


@pytest.mark.parametrize("code", ["import moemla", CORE])
def test_nothing_heavy_comes_along(code):
    """triton is a part of torch's own import where it is installed: what counts is what we add to that."""
    look = f"import sys, torch; before = set(sys.modules); {code}; print(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run(look).split()}
    assert not loaded & set(HEAVY), loaded & set(HEAVY)


def test_settings_need_no_torch():
    run("import sys, moemla; moemla.ModelConfig.preset('M'); moemla.complexity; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("name", [name for name in moemla.__all__ if name != "__version__"])
def test_every_promised_name_is_there(name):
    assert callable(getattr(moemla, name))
    assert name in dir(moemla)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Mistake'"):
        moemla.Mistake  # noqa: B018
    run("from moemla import LanguageModel, experts; assert callable(experts.experts)")


def test_type_checkers_see_the_same_names():
    """Under `if TYPE_CHECKING:` stand the names of _HOME, from the modules that have them, and the modules."""
    tree = ast.parse(Path(moemla.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    names, modules = {}, set()
    for node in block.body:
        for name in node.names:
            assert name.asname == name.name, "without `as` a type checker takes it for private"
            if node.module == "moemla":
                modules.add(name.name)
            else:
                names[name.name] = node.module.removeprefix("moemla.")
    assert names == moemla._HOME and modules == set(moemla._MODULES)
    assert (Path(moemla.__file__).parent / "py.typed").is_file()


def hub():
    from moemla.text import hub_stories

    next(hub_stories("train", 1))


def interval():
    from moemla.evaluation import mean_interval

    mean_interval([1.0, 2.0])


def seeds_apart():
    from moemla.statistics import difference

    difference([1.0, 2.0], [2.0, 4.0])


def chat_judge():
    from moemla.judge import ChatJudge

    ChatJudge("m", "http://localhost/v1")


def sign_test():
    from moemla.judge import Comparison, Match

    _ = Comparison((Match("p", "a", "b", ("first", "second")),)).p


def picture():
    from moemla.plots import style

    with style():
        pass


@pytest.mark.parametrize(
    ("use", "package", "extra"),
    [
        (hub, "datasets", "hub"),
        (interval, "scipy", "stats"),
        (seeds_apart, "scipy", "stats"),
        (sign_test, "scipy", "stats"),
        (picture, "matplotlib", "plots"),
        (chat_judge, "openai", "judge"),
    ],
)
def test_without_an_extra_one_line_names_it(monkeypatch, use, package, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MoemlaError) as error:
        use()
    assert str(error.value) == f"{package} is not installed: pip install 'moemla[{extra}]'"


def test_a_package_that_is_there_and_broken_says_so_itself(monkeypatch, tmp_path):
    (tmp_path / "half.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        optional("half", "hub")
