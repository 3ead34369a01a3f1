"""A checkpoint is whole or not there: whatever kills the process, wherever the disk ends, the last can be loaded."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moemla import complexity, training
from moemla.checkpoint import checkpoints, load, load_checkpoint, newest, read_json, save_checkpoint, write_json
from moemla.config import ModelConfig
from moemla.errors import MoemlaError
from moemla.evaluation import evaluate
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.runs import read_metrics
from moemla.tokenizer import Tokenizer
from moemla.training import train
from tests.runs import STORIES, code_of, files_in, fork, make_data, micro, quick, wait_for

ROOT = Path(__file__).parents[1]
CHECKPOINT = {"model.safetensors", "optimizer.safetensors", "config.json", "state.json"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_measuring(monkeypatch):
    """Half a second less for each run."""
    monkeypatch.setattr(training, "matmul_rate", lambda *_, **__: 1e10)


def trained(steps: int = 3, optimizer: str = "muon"):
    """A model and its optimizers after some steps on nonsense."""
    torch.manual_seed(steps)
    model = LanguageModel(micro())
    optimizers = make_optimizers(model, optimizer, lr=1e-2)
    for _ in range(steps):
        model(torch.randint(300, (2, 8)), torch.randint(300, (2, 8))).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    for number, block in enumerate(model.blocks):
        block.feedforward.router.bias += torch.randn(4) + number
    return model, optimizers


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_everything_comes_back(tmp_path, optimizer):
    model, optimizers = trained(3, optimizer)
    state = dict(step=3, seconds=1.25, losses=[0.1, 2.5], window=[[[1, 2]]])
    path = save_checkpoint(tmp_path, model, optimizers, state)
    expected = torch.rand(5)  # drawn after the random state was saved

    assert path == tmp_path / "checkpoints" / "step-00000003" and files_in(path) == CHECKPOINT
    again = LanguageModel(micro())
    fresh = make_optimizers(again, optimizer, lr=1e-2)
    assert load_checkpoint(path, again, fresh) == state
    assert torch.equal(torch.rand(5), expected)
    assert same_weights(model, again)
    assert again.blocks[1].feedforward.router.bias.abs().sum() > 0
    for old, new in zip(optimizers, fresh, strict=True):
        twins = dict(zip(model.parameters(), again.parameters(), strict=True))
        assert old.state and {twins[parameter] for parameter in old.state} == set(new.state)
        for parameter, fields in old.state.items():
            assert fields.keys() == new.state[twins[parameter]].keys()
            for name, value in fields.items():
                assert torch.equal(value, new.state[twins[parameter]][name]), name


def test_only_the_last_checkpoints_are_kept(tmp_path):
    model, optimizers = trained(1)
    for step in (9, 10, 100, 1000):
        save_checkpoint(tmp_path, model, optimizers, dict(step=step), keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000100", "step-00001000"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        path.name for path in checkpoints(tmp_path)
    ]


def test_a_later_one_that_could_not_be_read_is_none_of_the_last(tmp_path):
    """After step 1000 was found damaged a run goes on from 800: what it writes at 900 must not cost 800."""
    for step in (800, 1000, 900):
        save_checkpoint(tmp_path, *trained(1), dict(step=step), keep=2)
    assert [path.name[-4:] for path in checkpoints(tmp_path)] == ["0800", "0900", "1000"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in (".step-00000007.part", ".step-00000002.old"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, *trained(1), dict(step=1))
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_load_from_a_saved_model_and_from_a_run(tmp_path):
    model, optimizers = trained(2)
    tokenizer = Tokenizer.train(STORIES, 300)
    model.save(tmp_path / "saved", tokenizer)
    found, words = load(tmp_path / "saved")
    assert same_weights(model, found) and not found.training and words.hash == tokenizer.hash

    save_checkpoint(tmp_path / "run", *trained(1), dict(step=1))
    save_checkpoint(tmp_path / "run", model, optimizers, dict(step=2))
    found, words = load(str(tmp_path / "run"))
    assert same_weights(model, found) and words is None
    tokens = torch.randint(300, (1, 6))
    torch.testing.assert_close(found(tokens), model.eval()(tokens))


@pytest.mark.parametrize(
    "changes",
    [dict(tie_embeddings=False), dict(ffn="dense"), dict(attention="mha", positions="learned"), dict(norm="rmsnorm")],
    ids=str,
)
def test_every_kind_of_model_comes_back(tmp_path, changes):
    model = LanguageModel(micro(**changes))
    model.save(tmp_path)
    found, _ = load(tmp_path)
    assert found.config == model.config and same_weights(model, found)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"x": 0.1})
    assert read_json(path) == {"x": 0.1}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoemlaError, match="no space left") as error:
        write_json(path, {"x": 2})
    assert one_line(error) and read_json(path) == {"x": 0.1} and files_in(tmp_path) == {"a.json"}


# --- damage ---------------------------------------------------------------------------------------


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "cut": halve,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, name, damage):
    model, optimizers = trained(1)
    path = save_checkpoint(tmp_path, model, optimizers, dict(step=1))
    DAMAGE[damage](path / name)
    if name == "state.json" and damage == "gone":
        assert checkpoints(tmp_path) == []
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(MoemlaError) as error:
            load(tmp_path)
        assert str(tmp_path) in one_line(error)
    if name != "config.json":  # which the caller has read
        with pytest.raises(MoemlaError) as error:
            load_checkpoint(path, *trained(1))
        assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("content", ["[]", "null", '{"d_model": "wide"}', '{"no_such_field": 1}', '{"dropout": "x"}'])
def test_a_config_that_is_none_is_one_clear_line(tmp_path, content):
    LanguageModel(micro()).save(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MoemlaError, match=r"config\.json") as error:
        load(tmp_path)
    one_line(error)


def test_weights_of_another_model_are_one_clear_line(tmp_path):
    LanguageModel(micro()).save(tmp_path)
    other = tmp_path / "other"
    LanguageModel(micro(d_model=32, n_layers=3)).save(other)
    shutil.copy(other / "model.safetensors", tmp_path)
    with pytest.raises(MoemlaError, match="cannot be loaded") as error:
        load(tmp_path)
    one_line(error)
    path = save_checkpoint(tmp_path / "run", *trained(1), dict(step=1))
    (path / "optimizer.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(MoemlaError, match="is damaged"):
        load_checkpoint(path, *trained(1))
    write_json(path / "state.json", dict(step=1))  # as before there were checksums
    with pytest.raises(MoemlaError, match="cannot be read") as error:
        load_checkpoint(path, *trained(1))
    one_line(error)


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(MoemlaError, match="holds no model") as error:
        load(tmp_path)
    one_line(error)


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path, data, no_measuring):
    small, other = Tokenizer.train(STORIES, 280), Tokenizer.train([story.upper() for story in STORIES], 300)
    LanguageModel(micro()).save(tmp_path / "saved")
    small.save(tmp_path / "saved" / "tokenizer.json")
    with pytest.raises(MoemlaError, match=r"280 tokens.*300 tokens") as error:
        load(tmp_path / "saved")
    one_line(error)

    train(micro(), quick(1), data, tmp_path / "run")
    assert other.vocab_size == 300 and load(tmp_path / "run")
    other.save(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(MoemlaError, match="is not the tokenizer") as error:
        load(tmp_path / "run")
    assert other.hash[:12] in one_line(error) and Tokenizer.load(data / "tokenizer.json").hash[:12] in one_line(error)


# --- kills ----------------------------------------------------------------------------------------

OPERATIONS = ("replace", "fsync", "open", "mkdir", "unlink", "rmdir")


def trip_at(number: int, act) -> None:
    """Lets `act` happen instead of file operation `number` (counted from 1) of this process; a file of tensors is cut
    in the middle.
    """
    left = [number]

    def counted(function, half=None):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*args, **kwargs)
                act()
            return function(*args, **kwargs)

        return call

    def half_file(tensors, path, **kwargs):
        write(tensors, path, **kwargs)
        halve(Path(path))

    write = safetensors.torch.save_file
    safetensors.torch.save_file = counted(write, half_file)
    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with checkpoints 1 and 2, the models of steps 1 to 3, and the last one's optimizers."""
    run = tmp_path_factory.mktemp("two") / "run"
    save_checkpoint(run, *trained(1), dict(step=1))
    save_checkpoint(run, *trained(2), dict(step=2))
    return run, trained(1)[0], trained(2)[0], *trained(3)


def last_is_whole(run: Path, models: dict) -> int:
    """The last checkpoint can be loaded and resumed, and holds the weights of its step. Returns the step."""
    found, _ = load(run)
    model, optimizers = trained(1)
    step = load_checkpoint(checkpoints(run)[-1], model, optimizers)["step"]
    assert same_weights(found, models[step]) and same_weights(model, models[step])
    return step


@pytest.mark.parametrize("target", [3, 2], ids=["a new step", "the same step again"])
def test_killed_before_any_file_operation(tmp_path, two_steps, target):
    """The child dies before its first, second, ... operation on files, until it has none left."""
    origin, first, before, after, optimizers = two_steps
    steps, number, code = [], 0, 9
    while code:
        number += 1
        run = tmp_path / f"run-{number}"
        shutil.copytree(origin, run)

        def save(number=number, run=run):
            trip_at(number, lambda: os._exit(9))
            save_checkpoint(run, after, optimizers, dict(step=target))

        code = code_of(fork(save))
        assert code in (0, 9)
        if target == 2:  # the older weights until the rename, the newer after it, and step 1 while 2 is exchanged
            steps.append(len(checkpoints(run)))
            found, _ = load(run)
            assert any(same_weights(found, model) for model in (first, before, after))
        else:
            steps.append(last_is_whole(run, {2: before, 3: after}))
        save_checkpoint(run, after, optimizers, dict(step=target))  # the next attempt tidies up
        assert same_weights(load(run)[0], after)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == [f"step-0000000{step}" for step in ((2, 3) if target == 3 else (1, 2))]
        shutil.rmtree(run)
    assert number > 15  # the operations were counted at all
    if target == 3:
        assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == 3


def test_any_file_operation_that_fails_is_one_clear_line(tmp_path, two_steps, monkeypatch):
    origin, _, before, after, optimizers = two_steps
    raised, number = 0, 0

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    while True:
        number += 1
        run = tmp_path / f"run-{number}"
        shutil.copytree(origin, run)
        with monkeypatch.context() as patched:
            for name in OPERATIONS:
                patched.setattr(os, name, getattr(os, name))
            patched.setattr(safetensors.torch, "save_file", safetensors.torch.save_file)
            tripped = []
            trip_at(number, lambda tripped=tripped: (tripped.append(1), full()))
            try:
                save_checkpoint(run, after, optimizers, dict(step=3))
                step = 3
            except MoemlaError as error:
                assert "\n" not in str(error) and "step-00000003" in str(error)
                raised, step = raised + 1, None
        assert last_is_whole(run, {2: before, 3: after}) in ((step,) if step else (2, 3))
        assert not list((run / "checkpoints").glob(".*.part"))
        shutil.rmtree(run)
        if not tripped:
            break
    assert raised > 10


@pytest.mark.parametrize("limit", [0, 100, 4_000, 40_000])
def test_no_space_left_keeps_the_earlier_checkpoint(tmp_path, two_steps, limit, capfd):
    origin, _, before, after, optimizers = two_steps
    run = tmp_path / "run"
    shutil.copytree(origin, run)
    largest = max(path.stat().st_size for path in origin.rglob("*.safetensors"))
    assert limit < largest

    def save():
        print("", end="", flush=True)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_checkpoint(run, after, optimizers, dict(step=3))
        except MoemlaError as error:  # standard output is a file here, and limited too
            os._exit(1 if "\n" not in str(error) else 2)

    assert code_of(fork(save)) == 1
    assert files_in(run) == files_in(origin)
    assert last_is_whole(run, {2: before, 3: after}) == 2


def killed_and_continued(tmp_path: Path, data: Path, kills: int, steps: int) -> None:
    """A run that checkpoints every step, killed again and again, ends as one that was left alone."""
    chance = random.Random(kills)
    run, config, settings = tmp_path / "run", micro(dropout=0.1), quick(steps)
    last = killed = 0
    for _ in range(kills):
        child = fork(lambda: train(config, settings, data, run, resume=True, checkpoint_every=1))
        try:
            wait_for(lambda last=last: checkpoints(run) and int(checkpoints(run)[-1].name[5:]) > last)
            time.sleep(chance.uniform(0, 0.08))
        finally:
            os.kill(child, signal.SIGKILL)
            code = code_of(child)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        load(run)
        step = read_json(checkpoints(run)[-1] / "state.json")["step"]
        assert step > last or step == steps
        assert [row.step for row in read_metrics(run)][: step - 1] == list(range(1, step))
        last = step
        if step == steps:
            break
    assert killed > kills // 2  # else this machine needs more steps
    model = train(config, settings, data, run, resume=True, checkpoint_every=None)
    straight = train(config, settings, data, tmp_path / "straight", checkpoint_every=None)
    assert same_weights(model, straight)
    assert [row.loss for row in read_metrics(run)] == [row.loss for row in read_metrics(tmp_path / "straight")]
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [path.name for path in checkpoints(run)] and len(left) == 2


def test_sigkill_at_random_moments(tmp_path, data, no_measuring):
    killed_and_continued(tmp_path, data, kills=8, steps=200)


@pytest.mark.slow
def test_sigkill_at_many_random_moments(tmp_path, data, no_measuring):
    killed_and_continued(tmp_path, data, kills=40, steps=1500)


# --- no pickle ------------------------------------------------------------------------------------


def test_a_run_holds_safetensors_and_json_only(tmp_path, data, no_measuring):
    train(micro(), quick(4), data, tmp_path / "run", checkpoint_every=2)
    steps = {f"checkpoints/step-0000000{step}/{name}" for step in (2, 4) for name in CHECKPOINT}
    assert files_in(tmp_path / "run") == {"config.json", "train.json", "tokenizer.json", "metrics.jsonl", *steps}
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".json", ".jsonl"):
            for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
                json.loads(text)
        elif path.is_file():
            content = path.read_bytes()  # an 8-byte length, a JSON header, numbers
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            assert all(set(entry) == {"dtype", "shape", "data_offsets"} for k, entry in header.items() if k[0] != "_")


# --- what enters: numbers of a floating type ------------------------------------------------------


def rewrite(folder: Path, change, name: str = "model.safetensors") -> None:
    """The tensors of a file after `change`; the checkpoint's checksums go, as in one from before there were any."""
    tensors = safetensors.torch.load_file(folder / name)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / name)
    if (folder / "state.json").is_file():
        write_json(folder / "state.json", dict(step=read_json(folder / "state.json")["step"]))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("tensor", ["embedding.weight", "blocks.1.feedforward.router.bias"])
def test_weights_that_are_no_numbers_are_refused_where_they_enter(tmp_path, tensor, number):
    model, optimizers = trained(1)
    model.save(tmp_path / "saved")
    path = save_checkpoint(tmp_path / "run", model, optimizers, dict(step=1))
    for folder in (tmp_path / "saved", path):
        rewrite(folder, lambda tensors: tensors[tensor].view(-1)[-1:].fill_(number))
    for enter in (
        lambda: load(tmp_path / "saved"),
        lambda: load(tmp_path / "run"),
        lambda: load_checkpoint(path, *trained(1)),
    ):
        with pytest.raises(MoemlaError, match=rf"{tensor} holds NaN or inf") as error:
            enter()
        one_line(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
@pytest.mark.parametrize("tensor", ["head_or_table", "blocks.0.feedforward.router.bias"])
def test_weights_of_no_floating_type_are_refused(tmp_path, dtype, tensor):
    tensor = tensor.replace("head_or_table", "embedding.weight")
    trained(1)[0].save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({tensor: tensors[tensor].to(dtype)}))
    with pytest.raises(MoemlaError, match=rf"{tensor} holds {str(dtype).removeprefix('torch.')}\b") as error:
        load(tmp_path)
    one_line(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_another_floating_type_are_taken(tmp_path, dtype):
    model, _ = trained(1)
    model.save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    found, _ = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(dtype).float()), name


def test_a_number_too_large_for_the_model_is_refused(tmp_path):
    trained(1)[0].save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"norm.weight": torch.full((16,), 1e300, dtype=torch.float64)}))
    with pytest.raises(MoemlaError, match=r"norm\.weight holds a number too large for float32"):
        load(tmp_path)


@pytest.mark.parametrize("wrong", ["nan", "int"])
def test_a_state_of_the_optimizer_that_is_no_numbers_is_refused(tmp_path, wrong):
    path = save_checkpoint(tmp_path, *trained(1), dict(step=1))
    name = "1/exp_avg/embedding.weight"

    def change(tensors):
        tensors[name] = tensors[name].int() if wrong == "int" else tensors[name] * float("nan")

    rewrite(path, change, "optimizer.safetensors")
    with pytest.raises(MoemlaError, match=rf"{name} holds"):
        load_checkpoint(path, *trained(1))


# --- a damaged checkpoint beside a good one -------------------------------------------------------


def flip(path: Path, place: float = 0.9) -> None:
    """One bit, where numbers stand."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def change_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize("damage", [*DAMAGE, "flip"])
@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_the_older_checkpoint_is_taken_where_the_newest_is_damaged(tmp_path, two_steps, name, damage):
    origin, first, second, *_ = two_steps
    shutil.copytree(origin, tmp_path / "run")
    path = checkpoints(tmp_path / "run")[-1]
    act = change_a_number if name == "state.json" and damage == "flip" else (DAMAGE | {"flip": flip})[damage]
    act(path / name)
    if name != "optimizer.safetensors":
        with pytest.warns(UserWarning, match=rf"step-00000002.*{name}.*step-00000001 is taken instead") as warned:
            found, _ = load(tmp_path / "run")
        assert same_weights(found, first) and len(warned) == 1 and "\n" not in str(warned[0].message)
    if name != "config.json":
        model, optimizers = trained(3)
        with pytest.warns(UserWarning, match="step-00000002"):
            state = newest(tmp_path / "run", lambda folder: load_checkpoint(folder, model, optimizers))
        assert state == dict(step=1) and same_weights(model, first) and not same_weights(model, second)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_resume_goes_on_from_the_older_checkpoint(tmp_path, data, no_measuring, name):
    straight = train(micro(), quick(6), data, tmp_path / "straight")
    run = tmp_path / "run"
    train(micro(), quick(6), data, run, checkpoint_every=3)
    flip(run / "checkpoints" / "step-00000006" / name, 0.5)
    with pytest.warns(UserWarning, match=r"step-00000006.*step-00000003 is taken instead"):
        resumed = train(micro(), quick(6), data, run, resume=True, checkpoint_every=3)
    assert same_weights(resumed, straight) and same_weights(load(run)[0], straight)
    assert [row.step for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]

    for path in checkpoints(run):
        flip(path / name, 0.5)
    with pytest.raises(MoemlaError, match="step-00000006") as error:
        train(micro(), quick(6), data, run, resume=True)
    one_line(error)


def test_every_bit_of_the_state_counts(tmp_path):
    """A flipped bit in state.json is noticed, or changes nothing."""
    state = dict(step=1, seconds=2.5, losses=[0.125], window=[[3, 4]])
    path = save_checkpoint(tmp_path, *trained(1), state) / "state.json"
    content, model = path.read_bytes(), trained(1)
    for place in range(len(content)):
        for bit in (0, 1, 3):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert load_checkpoint(path.parent, *model) == state
            except MoemlaError:
                continue


# --- the caller's settings ------------------------------------------------------------------------


def test_load_leaves_the_callers_random_numbers_alone(tmp_path):
    trained(1)[0].save(tmp_path)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    load(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(4)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MoemlaError):
        load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


# ---- the model that ships


SHIPPED = "pretrained/tiny-moe-mla-rope"
TOLD = (  # of our own, in the manner of what it was trained on
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. "
    'One day, she saw a big dog. The dog was very happy. Lily said, "Hello, dog! Do you want to play with me?"'
)


def test_the_model_that_ships_loads_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load(SHIPPED)
    assert model.config == ModelConfig.preset("tiny", "moe-mla-rope", vocab_size=4096, max_seq_len=512)
    score = evaluate(model, tokenizer, [TOLD])
    assert score.bits_per_byte < 0.75 and score.load_cv < 1  # an untrained one has 3
    (tmp_path / SHIPPED).mkdir(parents=True)
    with pytest.raises(MoemlaError, match="tiny-moe-mla-rope"):
        load(SHIPPED)  # a path comes first
    with pytest.raises(MoemlaError, match="pretrained/other"):
        load("pretrained/other")


def test_its_card_says_what_its_config_says():
    folder = ROOT / SHIPPED
    card = (folder / "README.md").read_text(encoding="utf-8")
    model, tokenizer = load(folder)
    counted = complexity.parameters(model.config)
    assert f"{counted.total:,}, of which {counted.active:,}" in card and f"{tokenizer.vocab_size:,} pieces" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_200_000
    kept = safetensors.torch.load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for name, tensor in kept.items() if ".router." not in name} == {"torch.bfloat16"}
    assert {str(tensor.dtype) for name, tensor in kept.items() if ".router." in name} == {"torch.float32"}
