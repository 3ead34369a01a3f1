"""`moemla judge`: whose stories are shown, what is printed and kept, and what is said before a judge is asked."""

import json
import sys

import pytest
import torch

from moemla.checkpoint import load
from moemla.cli import main
from moemla.experiments.one_run import PROMPTS
from moemla.generation import generate
from moemla.judge import CRITERIA, compare
from moemla.model import LanguageModel
from tests.chat import Chat, alone, shown
from tests.commands.shell import failed


@pytest.fixture(autouse=True)
def nothing_of_the_environment(monkeypatch):
    alone(monkeypatch)


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """A saved model that was never trained and ends its stories early, with the run's tokenizer."""
    trained, tokenizer = load(run)
    torch.manual_seed(5)
    model = LanguageModel(trained.config)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.copy_(50 * model.embedding.weight[tokenizer.eot])  # the end has one chance in five or so
    folder = tmp_path_factory.mktemp("judged") / "other"
    model.save(folder, tokenizer)
    return folder


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "1" if len(first) > len(second) else "2"


def reply(request):
    texts = shown(request)
    return longer(texts["beginning"], texts["continuation 1"], texts["continuation 2"])


@pytest.fixture
def chat():
    with Chat(reply) as chat:
        yield chat


def said(capsys, chat, *arguments) -> str:
    line = ["judge", "--model", "clerk", "--base-url", chat.url, "--max-new-tokens", "12", *map(str, arguments)]
    assert main(line) == 0
    return capsys.readouterr().out


def told(folder, prompt, seed, **sampling):
    """A continuation, written alone."""
    model, tokenizer = load(folder)
    begun = torch.tensor([[tokenizer.eot, *tokenizer.encode(prompt)]])
    story = generate(model, begun, 12, seed=seed, stop=tokenizer.eot, **sampling)[0]
    return tokenizer.decode(story[begun.shape[1] :])


def strict(text: str) -> dict:
    def no(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=no)


def test_the_stories_are_those_of_each_run_alone_with_the_same_prompts_and_seeds(run, other, chat, capsys, tmp_path):
    arguments = ["--runs", run, other, "--count", 7, "--seed", 3, "--temperature", 0.9, "--top-k", 30, "--json"]
    out = said(capsys, chat, *arguments, "--out", tmp_path / "all.json", "--criterion", "grammar")
    report = strict(out)
    assert out.count("\n") == 1 and strict((tmp_path / "all.json").read_text()) == report
    prompts = [*PROMPTS, *PROMPTS[:2]]
    sampling = dict(temperature=0.9, top_k=30)
    a, b = ([told(run, prompt, 3 + i, **sampling) for i, prompt in enumerate(prompts)] for run in (run, other))
    words = {"1": "first", "2": "second", "tie": "tie"}
    wanted = compare(lambda *texts: words[longer(*texts)], prompts, a, b).to_dict()
    assert len({*a}) == 7 and len({*b}) > 3 and wanted["wins"] and min(map(len, b)) < min(map(len, a))
    settings = dict(runs=[str(run), str(other)], model="clerk", base_url=chat.url, criterion="grammar", seed=3)
    settings |= dict(max_new_tokens=12, temperature=0.9, top_k=30, asked=7)
    assert report == settings | json.loads(json.dumps(wanted))
    assert len(chat.requests) == 14 and all(request["model"] == "clerk" for request in chat.requests)
    assert all(CRITERIA["grammar"] in request["messages"][0]["content"] for request in chat.requests)
    assert {request["max_tokens"] for request in chat.requests} == {16}


def test_what_is_printed(run, other, chat, capsys, tmp_path):
    out = said(capsys, chat, "--runs", run, other, "--out", tmp_path / "all.json")
    kept = strict((tmp_path / "all.json").read_text())
    low, high = kept["interval"]
    decided = kept["wins"] + kept["losses"]
    assert len(kept["matches"]) == 20 and decided and kept["ties"] != 20
    assert out.splitlines() == [
        f"20 stories of {run} (a) and of {other} (b), both orders judged by clerk: overall",
        f"a won {kept['wins']}, lost {kept['losses']}, tied {kept['ties']}: win rate {kept['win_rate']:.3f}",
        f"of {decided} decided a won {kept['wins'] / decided:.3f}, 95 % {low:.3f} to {high:.3f}; "
        f"sign test p {kept['p']:.2g}",
        "both orders said the same of 1.000 of the pairs",
        "of the answers that chose, 0.500 chose the text shown first (0.5: no bias)",
        "of the decided matches of unequal length the longer text won 1.000",
        "p is of stories of these two models; what is to hold of architectures needs several seeds of each.",
    ]


@pytest.mark.parametrize("answer", ["1", "tie"])
def test_a_run_beside_itself_decides_nothing(run, capsys, answer):
    with Chat(lambda _: answer) as chat:
        out = said(capsys, chat, "--runs", run, run, "--count", 4)
        report = strict(said(capsys, chat, "--runs", run, run, "--count", 4, "--json"))
    assert "a won 0, lost 0, tied 4: win rate 0.500\nno match was decided; sign test p 1\n" in out and "nan" not in out
    assert (report["interval"], report["longer_share"], report["p"]) == (None, None, 1.0)
    assert ("chose the text shown first" in out) == (answer == "1") == (report["first_share"] == 1.0)
    assert "None" not in out and "longer" not in out
    assert all(match["a"] == match["b"] != "" for match in report["matches"])


def test_prompts_of_a_file_are_taken_in_turn_and_a_judge_may_reason(run, chat, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("Tom saw\n\n  Mia and Sam \n", encoding="utf-8-sig")
    arguments = ["--prompts", tmp_path / "prompts.txt", "--count", 3, "--max-tokens", 900, "--json"]
    report = strict(said(capsys, chat, "--runs", run, run, *arguments))
    assert [match["prompt"] for match in report["matches"]] == ["Tom saw", "Mia and Sam", "Tom saw"]
    assert {request["max_tokens"] for request in chat.requests} == {900}


def test_models_with_other_tokenizers(run, chat, capsys):
    """Each reads the prompts with its own; one of them ships."""
    shipped = "pretrained/tiny-moe-mla-rope"
    report = strict(said(capsys, chat, "--runs", run, shipped, "--count", 2, "--json"))
    for number, match in enumerate(report["matches"]):
        assert (match["a"], match["b"]) == tuple(told(folder, PROMPTS[number], number) for folder in (run, shipped))


def test_greedy_stories_of_one_prompt_are_counted_once(run, other, chat, capsys, tmp_path):
    runs = ["--base-url", chat.url, "--model", "m", "--runs", run, other]
    for greedy in (["--temperature", 0], ["--top-k", 1]):
        line = failed(capsys, "judge", *runs, *greedy)
        assert line.startswith("2 moemla: --count 20: greedy stories differ by prompt alone, and there are 5")
    (tmp_path / "prompts.txt").write_text("Tom\nTom\nMia\n")
    twice = ["--temperature", 0, "--prompts", tmp_path / "prompts.txt", "--count", 2]
    assert "and there are 1" in failed(capsys, "judge", *runs, *twice) and chat.requests == []
    report = strict(said(capsys, chat, "--runs", run, other, "--temperature", 0, "--count", 5, "--json"))
    assert report["matches"][4]["a"] == told(run, PROMPTS[4], 0, temperature=0.0)


# ---- what is said before anything is asked


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--count", 0], "2 moemla: --count 0: "),
        (["--max-new-tokens", 0], "2 moemla: --max-new-tokens 0: "),
        (["--max-tokens", 0], "2 moemla: --max-tokens 0: "),
        (["--seed", 2**64 - 1], f"2 moemla: --seed {2**64 - 1}: must be between"),
        (["--temperature", "nan"], "2 moemla: --temperature nan: "),
        (["--top-k", 0], "2 moemla: --top-k 0: "),
        (["--base-url", "localhost:8080"], "2 moemla: --base-url 'localhost:8080': must begin with http"),
        (["--device", "toaster"], "2 moemla: --device 'toaster': "),
        (["--prompts", "gone.txt"], "1 moemla: gone.txt: No such file"),
        (["--prompts", "empty.txt"], "1 moemla: empty.txt is empty"),
        (["--prompts", "latin.txt"], "1 moemla: latin.txt is not UTF-8"),
        (["--out", "nowhere/all.json"], "1 moemla: cannot write nowhere/all.json: nowhere is no folder"),
        (["--runs", "{run}", "gone"], "1 moemla: gone"),
        (["--runs", "gone", "{run}"], "1 moemla: gone"),
        (["--runs", "mute", "{run}"], "1 moemla: mute has no tokenizer.json"),
        (["--runs", "{run}", "mute"], "1 moemla: mute has no tokenizer.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_a_judge_is_asked(run, chat, capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("Mädchen".encode("latin-1"))
    load(run)[0].save(tmp_path / "mute")
    settings = ["--runs", run, run, "--model", "m", "--base-url", chat.url]
    line = failed(capsys, "judge", *settings, *(str(argument).format(run=run) for argument in arguments))
    assert line.startswith(says) and chat.requests == []


def test_a_key_or_a_package_that_is_missing_is_said_first(run, chat, capsys, monkeypatch):
    line = failed(capsys, "judge", "--runs", "gone", "gone", "--model", "m")
    assert line.startswith("1") and "OPENAI_API_KEY" in line
    for package, extra in (("scipy", "stats"), ("openai", "judge")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            line = failed(capsys, "judge", "--runs", run, run, "--model", "m", "--base-url", chat.url)
        assert line == f"1 moemla: {package} is not installed: pip install 'moemla[{extra}]'\n"
    assert chat.requests == []


@pytest.mark.parametrize("runs", [[], ["--runs", "one"], ["--runs", "one", "two", "three"]], ids=str)
def test_there_are_two_runs(capsys, runs):
    with pytest.raises(SystemExit) as left:
        main(["judge", "--model", "m", *runs])
    assert left.value.code == 2 and "Traceback" not in capsys.readouterr().err


# ---- a judge that fails


def test_a_judge_that_fails_half_way_keeps_what_was_answered(run, other, capsys, tmp_path):
    def tires(request):
        return reply(request) if len(chat.requests) < 6 else "perhaps"

    settings = ["--runs", run, other, "--model", "clerk", "--max-new-tokens", 2, "--out", tmp_path / "all.json"]
    with Chat(tires) as chat:
        line = failed(capsys, "judge", *settings, "--base-url", chat.url)
    report = strict((tmp_path / "all.json").read_text())
    assert "said 'perhaps'" in line and len(report["matches"]) == 2 and report["asked"] == 20


def test_a_judge_that_fails_is_one_line_and_nothing_is_kept(run, other, capsys, tmp_path):
    settings = ["--runs", run, other, "--model", "clerk", "--max-new-tokens", 2, "--out", tmp_path / "all.json"]
    for answer, says in (("perhaps", "said 'perhaps'"), ((500, "{}"), "500"), ((200, "{}"), "no chat completion")):
        with Chat(lambda _, answer=answer: answer) as chat:
            line = failed(capsys, "judge", *settings, "--base-url", chat.url)
        assert line.startswith(f"1 moemla: {chat.url}/: ") and says in line
    assert "Connection error" in failed(capsys, "judge", *settings, "--base-url", chat.url)
    assert not (tmp_path / "all.json").exists()


def test_the_help_names_what_is_sent_where(capsys):
    with pytest.raises(SystemExit):
        main(["judge", "--help"])
    out = capsys.readouterr().out
    assert "OPENAI_API_KEY" in out and all(criterion in out for criterion in CRITERIA)
