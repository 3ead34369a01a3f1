"""The whole road at the scale of a smoke test: seconds, every figure, and a result for each text."""

import json
import re
import time
from pathlib import Path

from moemla.cli import main
from moemla.config import ModelConfig, TrainConfig
from moemla.experiments import ten_minutes
from moemla.experiments.runner import Text, run
from moemla.results import load
from tests.runs import write_texts
from tools.browser import ROOT


def committed(data):
    runs = load(ROOT / "results", "ten-minutes", "cpu")
    return next(run for run in runs if run.settings["tags"]["text"] == data)


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
    shown = json.loads(out[out.index("{") :])
    assert shown["settings"] == found.settings and shown["name"] == found.name == "moe-mla-rope_lr0.01_seed0"


def test_another_text_in_the_same_folder_has_results_of_its_own(tmp_path):
    texts, folder = write_texts(tmp_path), tmp_path / "results"
    (first,) = run(ten_minutes, "smoke", folder, texts["train"], texts["valid"])
    told = texts["train"].read_text()
    texts["train"].write_text(told.replace("cat", "dog"))
    (second,) = run(ten_minutes, "smoke", folder, texts["train"], texts["valid"])
    assert second.settings["data"] != first.settings["data"] and second.name != first.name
    assert second.measures["nats_per_token"] != first.measures["nats_per_token"]
    texts["train"].write_text(told)
    assert run(ten_minutes, "smoke", folder, texts["train"], texts["valid"]) == [first]
    assert len(load(folder)) == 2
    assert not {"agreement_accuracy", "shuffled_bits_per_byte", "most_common_8_words"} & set(first.measures)


def test_it_is_what_the_command_does_by_default():
    (cell,) = ten_minutes.cells("cpu", Text("builtin", "aa"))
    assert cell.train == TrainConfig()
    assert cell.model == ModelConfig.preset("tiny", vocab_size=4096, max_seq_len=512)
