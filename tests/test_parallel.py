"""DDP, FSDP2, experts over ranks, and both: two processes (gloo, CPU) learn what one learns; checkpoints fit all."""

import json
import shutil

import pytest
import torch
from torch import multiprocessing

import moemla
from moemla.checkpoint import checkpoints
from moemla.distributed import World
from moemla.errors import MoemlaError
from moemla.model import LanguageModel
from moemla.parallel import wrap
from tests import layouts
from tests.helpers import close
from tests.layouts import LAYOUTS
from tests.runs import make_data, micro


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data, and the runs that two ranks left at step 3, one for each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    make_data(folder)
    multiprocessing.spawn(layouts.work, (2, str(folder), False), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found-2-False.pt")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process learns: trainings, and the run that was never stopped."""
    return dict(
        double=layouts.train(torch.float64, 50, 1e-2, "muon"),
        adamw=layouts.train(torch.float64, 10, 1e-2, "adamw"),
        single=layouts.train(torch.float32, 25, 3e-4, "muon"),
        run=layouts.run(folder / "data", folder / "alone"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("training", "tolerance"), [("double", 1e-9), ("adamw", 1e-9), ("single", 1e-5)])
def test_two_ranks_learn_what_one_learns(found, alone, layout, training, tolerance):
    """Fifty steps in float64 in two micro-batches against one; every rule of balancing, both losses of the routing."""
    mine, wanted = found[layout][training], alone[training]
    for name in ("losses", "norms", "weights"):
        close(mine[name].double(), wanted[name].double(), tolerance)
    assert wanted["norms"].max() > 1  # some are clipped


@pytest.mark.parametrize("layout", ["ddp", "experts"])
def test_copies_speak_once_a_step_and_not_once_a_part(found, layout):
    once, in_parts = found[layout]["heard"]
    assert once == in_parts >= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_near(found, alone, layout, precision):
    """The same course in every layout, with FSDP2's own mixed precision too; weights stay float32."""
    mine, wanted = found[layout][precision], alone["single"]
    close(mine["losses"].double(), wanted["losses"][:6].double(), 1e-2)
    assert mine["losses"].isfinite().all() and mine["losses"][-1] < mine["losses"][0]
    assert not torch.equal(mine["losses"], wanted["losses"][:6])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_two_ranks_saved_one_can_read_and_go_on_with(folder, found, alone, layout):
    path = checkpoints(folder / layout)[-1]
    assert path.name == "step-00000003" and len(list(path.glob("shard-*.safetensors"))) == 2
    assert not any(file.suffix in (".pt", ".pkl", ".distcp", ".metadata") for file in path.rglob("*"))
    model, tokenizer = moemla.load(folder / layout)
    assert tokenizer is not None and model.config.n_experts == len(model.blocks[0].feedforward.experts.w_in) == 5
    copy = folder / f"{layout}-on-1"
    shutil.copytree(folder / layout, copy)
    close(layouts.run(folder / "data", copy, resume=True), alone["run"], 1e-9)


def test_what_two_ranks_saved_four_go_on_with(folder, found, alone):
    multiprocessing.spawn(layouts.work, (4, str(folder), True), nprocs=4)
    on_four = torch.load(folder / "found-4-True.pt")
    for layout in LAYOUTS:
        close(on_four[layout], alone["run"], 1e-9)
        one = folder / f"{layout}-on-4" / "best" / "best.json"
        assert json.loads(one.read_text())["step"] == json.loads((folder / "alone/best/best.json").read_text())["step"]


@pytest.mark.parametrize("layout", ["ddp", "experts-fsdp"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "shard-00002-.*cannot be read: No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "shard-00002-.*is damaged: its checksum does not fit"),
    ],
    ids=["missing", "cut"],
)
def test_a_shard_that_is_missing_or_cut_is_named_in_one_line(folder, found, tmp_path, layout, spoil, message):
    run = tmp_path / "run"
    shutil.copytree(folder / layout, run)
    spoil(next(checkpoints(run)[-1].glob("shard-00002-*")))
    with pytest.raises(MoemlaError, match=message) as error:
        moemla.load(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_room_is_told_once_and_nothing_is_lost(folder, found, layout):
    said = found[layout]["full"]
    (told,) = [line for line in said if not line.startswith("Elsewhere")]
    assert "step-00000009 could not be written" in told and "File too large" in told and "\n" not in told
    assert [path.name for path in checkpoints(folder / layout)] == ["step-00000003"]
    assert not list((folder / layout / "checkpoints").glob(".*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_rank_0_does_not_see_makes_no_checkpoint(folder, found, layout):
    """Nodes that do not share a folder: a tensor without its last rows would be a smaller whole one."""
    said = found[layout]["gone"]
    assert said[0].startswith("MoemlaError") and said[1].startswith("Elsewhere")
    assert "step-00000009 could not be written" in said[0] and "all ranks must see one folder" in said[0]
    assert [path.name for path in checkpoints(folder / layout)] == ["step-00000003"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_behind_a_score_that_is_no_better(folder, found, layout):
    """FSDP2's outermost module is whole after a pass without gradient; a better score's model.save hid it."""
    end = found[layout]["worse"]
    assert isinstance(end, int) and 0 < end < 30, end
    assert checkpoints(folder / f"{layout}-worse")[-1].name == f"step-{end:08d}"
    assert json.loads((folder / f"{layout}-worse/best/best.json").read_text())["step"] == end - 1


@pytest.mark.parametrize("layout", ["experts", "experts-fsdp"])
def test_the_rank_with_the_gradient_to_blame_speaks(found, layout):
    said = found[layout]["spoilt"]
    assert said[0].startswith("Elsewhere") and "blocks.0.feedforward.experts.w_in are nan or inf" in said[1]


def test_experts_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match="expert_parallel=2: the model has no experts"):
        wrap(LanguageModel(micro(ffn="dense")), World(0, 2, expert_parallel=2))
    with pytest.raises(ValueError, match=r"expert_parallel=3: must divide the number of ranks, 4"):
        World(0, 4, expert_parallel=3)
    with pytest.raises(ValueError, match=r"expert_parallel=2: must divide the number of ranks, 1 \(torchrun starts"):
        World(expert_parallel=2)
    with pytest.raises(ValueError, match="parallel='zero': choose 'ddp' or 'fsdp'"):
        World(0, 2, parallel="zero")
