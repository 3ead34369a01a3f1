"""Two processes (gloo, CPU) do together what one does alone: loads, weights, runs; and the router stays float32."""

import pytest
import torch
from torch import multiprocessing

import moemla
from moemla.balancing import Balancer
from moemla.routing import Router
from moemla.runs import read_metrics
from tests import ranks
from tests.helpers import close
from tests.runs import files_in, make_data


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """(folder, what each rank found); the processes run once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    make_data(folder)
    multiprocessing.spawn(ranks.work, (request.param, str(folder)), nprocs=request.param)
    return folder, [torch.load(folder / f"rank-{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    return ranks.train(ranks.fresh(), "muon", "sign")


def test_loads_and_histograms_of_all_ranks_and_micro_batches(run):
    """Under DDP's defaults, which broadcast buffers: each rank's sums stay its own until they are added up."""
    found = [rank["sums"] for rank in run[1]]
    model = ranks.fresh()
    balancer = Balancer(model, "quantile")
    tokens, targets = next(ranks.batches())
    for rank, own in enumerate(found):
        before = [router.load.clone() for router in balancer.routers]
        histograms = [router.margins.clone() for router in balancer.routers]
        model(tokens.chunk(len(found))[rank], targets.chunk(len(found))[rank])
        for layer, router in enumerate(balancer.routers):
            assert torch.equal(own["own"][layer], router.load - before[layer])
            assert torch.equal(own["margins"][layer], router.margins - histograms[layer])
    assert not torch.equal(found[0]["own"], found[1]["own"])
    balancer.step()
    for own in found:
        assert torch.equal(own["all"], torch.stack(balancer.counts))
        close(own["biases"], torch.stack([router.bias for router in balancer.routers]), 1e-14)
        assert torch.equal(own["biases"], found[0]["biases"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training_in_ranks_and_parts_is_training_alone(run, alone, how):
    """Muon, the bias, Switch loss and z-loss: in float64, two steps, the same weights."""
    found = [rank[how] for rank in run[1]]
    for own in found:
        assert torch.equal(own["loads"], alone["loads"]) and torch.equal(own["biases"], alone["biases"])
        close(own["weights"], alone["weights"], 1e-9)
    close(torch.stack([own["losses"] for own in found]).mean(0), alone["losses"], 1e-12)


@pytest.mark.parametrize("own", ["own group", "own world"])
def test_a_group_of_its_own_balances_alone(run, own):
    for rank, found in enumerate(run[1]):
        wanted = ranks.train(ranks.fresh(), "muon", "sign", rank, len(run[1]))
        for name in ("loads", "biases", "losses", "weights"):
            close(found[own][name].double(), wanted[name].double(), 1e-12)
    assert not torch.equal(run[1][0][own]["loads"], run[1][1][own]["loads"])


def test_what_ranks_save_can_be_loaded(run, alone):
    folder, found = run
    for name in ("fsdp", *(f"ddp-{rank}" for rank in range(len(found)))):
        model, _ = moemla.load(folder / name)
        close(torch.cat([p.detach().flatten() for p in model.parameters()]).double(), alone["weights"], 1e-6)
        routers = [module for module in model.modules() if isinstance(module, Router)]
        close(torch.stack([router.bias for router in routers]).double(), alone["biases"], 1e-6)
    story = found[0]["story"]
    assert story.shape == (1, 7) and all(torch.equal(rank["story"], story) for rank in found)
    assert found[0]["refused"] == (
        "model: sharded by FSDP2; call model.save(folder) on every rank and moemla.load(folder) it"
    )


def test_the_router_is_float32_under_mixed_precision(run):
    """Exact where routers are sharded first; as they come, with FSDP's rounded weight and one line that says so."""
    for rank in run[1]:
        for how, rounded in (("routers first", False), ("as it comes", True)):
            found = rank[how]
            assert found["given"].dtype == torch.bfloat16
            kinds = {found[name].dtype for name in ("logits", "gates", "weights", "grads", "biases")}
            assert kinds == {torch.float32}
            weights = found["weights"].bfloat16() if rounded else found["weights"]
            exact = torch.einsum("lbtd,led->lbte", found["given"].double(), weights.double()).flatten(1, 2)
            close(found["logits"].double(), exact, 1e-5)
            assert found["grads"].abs().amax((1, 2)).min() > 0
            assert bool(found["said"]) == rounded


# --- a world, and what takes one ------------------------------------------------------------------


def test_what_ranks_hear_of_each_other(run):
    size = len(run[1])
    for rank, found in enumerate(run[1]):
        found = found["together"]
        assert found["ranks"] == [rank, size] and found["mesh"] == [size, rank]
        assert found["sum"].tolist() == [size, sum(10**other for other in range(size))]
        assert found["alone"].tolist() == [1, 10**rank]
        assert found["any"] == [True, True, False] and found["alike"] == [True, False]


@pytest.mark.parametrize("idle", [0, 1], ids=["all work", "rank 0 has no token"])
def test_experts_spread_over_ranks_are_experts_here(run, idle):
    """All to all between dispatch and compute, and back: output and gradients of the layer that has them all."""
    found = [rank["spread"][idle] for rank in run[1]]
    whole = ranks.passed(*ranks.layer())
    for name in ("out", "x", "w_in", "w_out"):
        close(torch.cat([part[name] for part in found]), whole[name], 1e-12)
    close(sum(part["router"] for part in found), whole["router"], 1e-12)
    assert len(found[0]["out"]) == 0 or not idle


@pytest.fixture(scope="module")
def trained_alone(run):
    return ranks.trained(run[0] / "data", run[0] / "alone")


def test_a_run_over_ranks_is_the_run_of_one(run, trained_alone):
    """Rows of the log and weights, with micro-batches, both losses of the routing, clipping and validation."""
    folder, found = run
    rows = found[0]["trained"]["rows"]
    assert [row["step"] for row in rows] == [2, 4, 6] and max(row["grad_norm"] for row in rows) > 0.5
    for mine, alone in zip(rows, trained_alone["rows"], strict=True):
        for name in ("step", "tokens", "lr", "load_cv", "load_cv_floor", "load_window"):
            assert mine[name] == alone[name], name
        for name in ("loss", "grad_norm", "valid_loss"):
            assert mine[name] == alone[name] or mine[name] == pytest.approx(alone[name], rel=1e-9, abs=0), name
    for rank in found:
        close(rank["trained"]["weights"], trained_alone["weights"], 1e-9)
    mine, alone = ({name for name in files_in(folder / one) if "step-" not in name} for one in ("run-all", "alone"))
    assert mine == alone


def test_rank_0_reports_and_writes_the_log_alone(run):
    folder, found = run
    for rank in found[1:]:
        assert rank["trained"]["rows"] == rank["resumed"]["rows"] == []
    assert [row.step for row in read_metrics(folder / "run-all")] == [2, 4, 6]


def test_a_signal_to_one_rank_ends_all_and_they_go_on(run, trained_alone):
    folder, found = run
    assert [rank["stopped"] for rank in found] == ["stopped after step 3; --resume continues"] * len(found)
    for rank in found:
        close(rank["resumed"]["weights"], trained_alone["weights"], 1e-9)
    losses = [row.loss for row in read_metrics(folder / "run")]
    assert losses == pytest.approx([row["loss"] for row in trained_alone["rows"]], rel=1e-9, abs=0)
