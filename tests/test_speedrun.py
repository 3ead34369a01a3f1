"""The speedrun keeps what it measures, says what does not count, and compares by the rule."""

from dataclasses import replace

import pytest
import torch

from moemla import results
from tests.runs import write_texts
from tools import speedrun
from tools.speedrun import MINUTES, RECIPES, Recipe, main, pairs, table

SMALL = Recipe("moe-mla-rope", dict(ten=3), batch_size=2, seq_len=16, warmup=1, vocab_size=300)


def kept(arm: str, scores: list[float], **changes) -> list[results.Result]:
    """Results of an arm with these scores, as `run` would keep them."""
    found = []
    for seed, score in enumerate(scores):
        cell = SMALL.cell(arm, "ten", seed, "0" * 64)
        measures = dict(bits_per_byte=score, seconds=590.0, processor_seconds=1170.0, in_time=True, calm=True) | changes
        found.append(results.of(cell, measures, results.provenance(1.0)))
    return found


def test_a_run_is_kept_with_its_clock_and_the_processors(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "moe", SMALL)
    monkeypatch.setitem(MINUTES, "ten", 1e-9)
    texts = write_texts(tmp_path)
    files = [f"--{name}={path}" for name, path in texts.items()]
    assert main([*files, "--seeds", "0", "1", "--folder", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert said.count("too late for 1e-09 minutes") == 2 and "bits per byte after" in said
    first, second = results.load(tmp_path / "results", "speedrun", "cpu")
    assert [r.settings["train"]["seed"] for r in (first, second)] == [0, 1]
    assert first.settings["tags"]["arm"] == "moe-ten" and first.settings["train"]["steps"] == 3
    assert 0 < first.measures["bits_per_byte"] != second.measures["bits_per_byte"]
    assert first.measures["threads"] == torch.get_num_threads() and first.measures["processor_seconds"] > 0
    assert main(["--table", "--folder", str(tmp_path / "results")]) == 0
    assert "| moe-ten | 2 |" in (board := capsys.readouterr().out) and board.rstrip().endswith("| no |")


@pytest.mark.parametrize("changes", [dict(in_time=False), dict(calm=False)])
def test_what_was_late_or_disturbed_does_not_count(changes):
    five = [0.9, 0.91, 0.92, 0.9, 0.91]
    assert "| yes |" in table(kept("moe", five))
    assert "| no |" in table(kept("moe", five, **changes))
    assert "| no |" in table(kept("moe", five[:4])) and "| no |" in table(kept("moe", five[:1]))


def test_two_recipes_are_no_row():
    runs = kept("moe", [0.9, 0.91])
    runs[1].settings["train"]["lr"] = 0.02
    with pytest.raises(results.ResultError, match=r"train\.lr=0\.007 and train\.lr=0\.02 are no runs of one kind"):
        table(runs)


def test_what_is_kept_is_not_run_again_and_another_recipe_is_refused_before_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "moe", SMALL)
    texts = write_texts(tmp_path)
    files = [f"--{name}={path}" for name, path in texts.items()]
    arguments = [*files, "--folder", str(tmp_path / "results")]
    main(arguments)
    (first,) = results.load(tmp_path / "results", "speedrun")
    monkeypatch.setattr(speedrun, "run", None)  # not called
    capsys.readouterr()
    main(arguments)
    assert capsys.readouterr().out.startswith("seed 0 is kept in ")
    monkeypatch.setitem(RECIPES, "moe", replace(SMALL, model=dict(d_expert=12)))
    with pytest.raises(results.ResultError, match="d_expert"):
        main(arguments)
    assert results.load(tmp_path / "results", "speedrun") == [first]


def test_arms_differ_by_welch():
    near, far = [0.900, 0.904, 0.896, 0.902, 0.898], [0.950, 0.954, 0.946, 0.952, 0.948]
    said = table(kept("moe", near) + kept("dense", far))
    assert "`dense-ten` differs from `moe-ten`: +0.0500 ± " in said
    same = table(kept("moe", near) + kept("dense", near[::-1]))
    assert "`dense-ten` is not told apart from `moe-ten`: +0.0000 ± " in same


def test_tracks_are_compared_with_themselves_only():
    assert pairs(["a-ten", "a-twenty", "b-ten"]) == [("a-ten", "b-ten")]


def test_recipes_fit_their_tracks(capsys):
    for arm, recipe in speedrun.RECIPES.items():
        for track in recipe.steps:
            assert recipe.cell(arm, track, 0, "0" * 64).train.steps == recipe.steps[track]
    with pytest.raises(SystemExit):
        main(["--arm", "dense", "--track", "twenty", "--train", "a", "--valid", "b"])
    assert "dense has no recipe for --track twenty" in capsys.readouterr().err
