"""Two processes (gloo, CPU) do together what one does alone: loads, losses, weights; and the router stays float32."""

import pytest
import torch
from torch import multiprocessing

import moemla
from moemla.balancing import Balancer
from moemla.routing import Router
from tests import ranks
from tests.helpers import close


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """(folder, what each rank found); the processes run once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
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


def test_a_group_of_its_own_balances_alone(run):
    for rank, found in enumerate(run[1]):
        wanted = ranks.train(ranks.fresh(), "muon", "sign", rank, len(run[1]))
        for name in ("loads", "biases", "losses", "weights"):
            close(found["own group"][name].double(), wanted[name].double(), 1e-12)
    assert not torch.equal(run[1][0]["own group"]["loads"], run[1][1]["own group"]["loads"])


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
