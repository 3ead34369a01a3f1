"""The whole road at the scale of a smoke test: seconds, every figure, and a result for each text."""

import json
import re
import time
from pathlib import Path

from moemla.cli import main
from moemla.experiments import ten_minutes
from moemla.results import load
from tests.runs import write_texts
from tools.browser import ROOT


def committed(data):
    return next(run for run in load(ROOT / "results", ten_minutes.EXPERIMENT) if run.settings["data"] == data)


def test_smoke_takes_seconds_has_every_figure_and_leaves_results_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begin = time.process_time()
    assert main(["experiment", "ten-minutes", "--scale", "smoke"]) == 0
    assert time.process_time() - begin < 30  # 6 on an idle core; scoring as much as the full scale takes 80
    out, err = capsys.readouterr()
    assert list(tmp_path.iterdir()) == []
    folder = Path(re.search(r"results go to (\S+)", err)[1])
    (found,) = load(folder)
    assert set(found.measures) == set(committed("builtin").measures)
    assert set(found.measures["agreement_accuracy"]) == set(committed("builtin").measures["agreement_accuracy"])
    assert found.settings["min_lr"] == found.measures["training"]["min_lr"]
    assert found.settings["warmup"] == found.measures["training"]["warmup"]
    shown = json.loads(out[out.index("{") :])
    assert shown["settings"] == found.settings and found.settings["data_hash"] == found.measures["data_hash"]


def test_another_text_in_the_same_folder_has_results_of_its_own(tmp_path):
    texts = write_texts(tmp_path)
    (first,) = ten_minutes.run("smoke", tmp_path / "results", texts["train"], texts["valid"])
    told = texts["train"].read_text()
    texts["train"].write_text(told.replace("cat", "dog"))
    (second,) = ten_minutes.run("smoke", tmp_path / "results", texts["train"], texts["valid"])
    assert second.measures["data_hash"] != first.measures["data_hash"]
    assert second.measures["nats_per_token"] != first.measures["nats_per_token"]
    texts["train"].write_text(told)
    assert ten_minutes.run("smoke", tmp_path / "results", texts["train"], texts["valid"]) == [first]
    assert len(load(tmp_path / "results")) == 2
    assert not {"agreement_accuracy", "shuffled_bits_per_byte", "most_common_8_words"} & set(first.measures)
