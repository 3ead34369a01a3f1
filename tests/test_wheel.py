"""The wheel alone: in an empty folder, with nothing of the repository on the path and no extra installed, all works."""

import email
import os
import re
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tools.book import ROOT
from tools.wheel import COMMANDS, EXTRAS, build, try_commands


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(sys.executable, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_every_command_from_the_wheel_in_an_empty_folder(unpacked, tmp_path):
    """A fresh process: -S reads no .pth file, so that the editable copy of the test environment is out of reach."""
    path = os.pathsep.join([str(unpacked), sysconfig.get_path("purelib")])
    done = try_commands([sys.executable, "-S"], tmp_path, {**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert Path(done.stdout.splitlines()[-1]) == unpacked / "moemla"
    assert len(COMMANDS) == 8 and "claims: " in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"data", "run", "exported", "kept"}
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert list((tmp_path / "kept").glob("ten-minutes/smoke/*.json"))


def test_what_the_wheel_holds(wheel, unpacked):
    """Every file of the package, and nothing else of the repository."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "moemla/py.typed" in names and "moemla/paper/claims.yml" in names
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "moemla").rglob("*") if path.suffix in (".py", ".yml")}
    assert all(name.startswith("moemla/") for name in names) and own <= names
    kept = {f"moemla/{path.relative_to(ROOT)}" for path in (ROOT / "pretrained").rglob("*") if path.is_file()}
    assert kept and kept == {name for name in names if name.startswith("moemla/pretrained/")}


def test_the_long_description_has_no_link_that_leads_nowhere(unpacked):
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(encoding="utf-8"))
    text = message.get_payload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "## In ten minutes on a laptop" in text and len(text) > 0.8 * len(readme)
    assert "](" in readme and "<img" in readme, "nothing to take out: the hook is not needed"
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"", text)
    assert [target for pair in targets for target in pair if target and not target.startswith("http")] == []


def test_extras_are_not_among_the_requirements(unpacked):
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(encoding="utf-8"))
    plain = {re.match(r"[\w-]+", line)[0] for line in message.get_all("Requires-Dist") if "extra ==" not in line}
    assert "torch" in plain and not plain & set(EXTRAS)
