"""`moemla generate`: the prompt and its story, token by token."""

import io
import sys
from itertools import pairwise

import pytest
import torch

from moemla import generation
from moemla.checkpoint import load
from moemla.cli import main
from moemla.model import LanguageModel
from tests.commands.shell import failed


def said(capsys, run, *arguments) -> str:
    assert main(["generate", "--run", str(run), "--max-new-tokens", "30", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_prints_the_prompt_and_a_story(run, capsys):
    out = said(capsys, run, "--prompt", "Tom saw", "--seed", "3")
    model, tokenizer = load(run)
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode("Tom saw")]])
    tokens = generation.generate(model, prompt, 30, seed=3, stop=tokenizer.eot)[0]
    assert out == tokenizer.decode(tokens) + "\n" and out.startswith("Tom saw") and len(out) > 12
    assert said(capsys, run, "--prompt", "Tom saw", "--seed", "3") == out
    assert said(capsys, run, "--prompt", "Tom saw", "--seed", "4") != out


def test_a_prompt_without_room_is_refused_before_it_is_shown(run, capsys):
    assert main(["generate", "--run", str(run), "--prompt", "Tom saw Mia. " * 400]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "leaves no room for more in max_seq_len" in shown.err


@pytest.mark.parametrize("sampling", [["--temperature", "0"], ["--top-p", "0.9"], ["--top-k", "5", "--seed", "9"]])
def test_the_cache_changes_nothing(run, capsys, monkeypatch, sampling):
    cached = said(capsys, run, *sampling)
    monkeypatch.setattr(LanguageModel, "new_cache", None)
    assert cached == said(capsys, run, *sampling, "--no-cache")


def test_several_stories_have_their_own_seeds(run, capsys):
    first, second = said(capsys, run, "--count", "2", "--seed", "5").split("\n\n---\n\n")
    assert first + "\n" == said(capsys, run, "--seed", "5") and second == said(capsys, run, "--seed", "6")


def test_a_story_is_streamed(run, monkeypatch):
    """Each token is written and flushed before the next one is made; the prompt before all."""

    class Screen(io.StringIO):
        shown = ""

        def flush(self):
            self.shown = self.getvalue()

    screen, seen = Screen(), []
    real = generation._draw

    def draw(*args):
        seen.append(screen.shown)
        return real(*args)

    monkeypatch.setattr(generation, "_draw", draw)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", "--run", str(run), "--max-new-tokens", "20", "--prompt", "Mia"]) == 0
    assert seen[0] == "Mia" and len(set(seen)) > 10  # (a character may need more than one token)
    assert all(after.startswith(before) for before, after in pairwise(seen))


def test_a_prompt_that_is_no_text_is_named(run, capsys):
    line = failed(capsys, "generate", "--run", run, "--prompt", "Tom \udcff")
    assert line.startswith("2") and "surrogate" in line
