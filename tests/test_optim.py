"""Muon turns matrices into near-rotations, every parameter is trained exactly once, and the rate takes its course."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moemla.checkpoint import load, load_checkpoint, save_checkpoint
from moemla.config import ModelConfig
from moemla.generation import generate
from moemla.model import LanguageModel, unwrapped
from moemla.moe import MixtureOfExperts
from moemla.optim import Muon, learning_rate, make_optimizers, orthogonalise, parameter_groups
from moemla.routing import Router

MICRO = dict(
    vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_experts=4, n_shared=1, top_k=2, d_expert=8, max_seq_len=32
)
SHAPES = [(16, 16), (8, 32), (32, 8), (1, 12), (12, 1)]


# --- orthogonalise --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_come_near_one(shape):
    matrices = torch.randn(3, *shape)
    if shape == (16, 16):  # a random square matrix has singular values close to zero, which five steps do not lift
        matrices += 6 * torch.linalg.qr(torch.randn(16, 16)).Q
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.shape == (3, min(shape))
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)], ids=str)
def test_the_directions_of_a_matrix_stay(shape):
    """The nearest matrix with equal singular values is U V^T; the quintic steps change the values, not U and V."""
    matrix = torch.randn(1, *shape, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    rotated = u.T @ orthogonalise(matrix)[0] @ vt.T
    diagonal = rotated.diagonal()
    torch.testing.assert_close(rotated, torch.diag(diagonal), atol=1e-9, rtol=0)
    assert (diagonal > 0.6).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stack_is_each_matrix_alone(shape):
    matrices = (
        torch.randn(5, *shape, dtype=torch.float64) * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None, None]
    )
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, atol=1e-12, rtol=0)


def test_tall_is_wide_turned_round():
    matrix = torch.randn(2, 24, 6, dtype=torch.float64)
    torch.testing.assert_close(orthogonalise(matrix), orthogonalise(matrix.mT).mT, atol=1e-12, rtol=0)


def test_a_matrix_of_zeros_stays_zero():
    assert (orthogonalise(torch.zeros(2, 4, 8)) == 0).all()  # an expert that got no token


# --- Muon -----------------------------------------------------------------------------------------


def test_a_muon_step_is_the_formula():
    torch.set_default_dtype(torch.float64)
    try:
        weight = nn.Parameter(torch.randn(6, 10))
        lr, decay, beta = 0.1, 0.2, 0.95
        optimizer = Muon([weight], lr=lr, momentum=beta, weight_decay=decay)
        expected, momentum = weight.detach().clone(), torch.zeros(6, 10)
        for _ in range(3):
            weight.grad = torch.randn(6, 10)
            momentum = beta * momentum + (1 - beta) * weight.grad
            look_ahead = (1 - beta) * weight.grad + beta * momentum
            step = 0.2 * math.sqrt(10) * orthogonalise(look_ahead[None])[0]
            expected = expected * (1 - lr * decay) - lr * step
            optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_root_mean_square_of_a_step_is_adamws():
    for rows, columns in ((64, 64), (32, 128), (128, 32)):
        weight = nn.Parameter(torch.zeros(rows, columns))
        weight.grad = torch.randn(rows, columns)
        Muon([weight], lr=1.0).step()
        assert 0.12 < weight.square().mean().sqrt() < 0.28  # 0.2, and the singular values are only near one


def test_each_expert_of_a_stack_takes_a_step_of_its_own():
    stack = nn.Parameter(torch.randn(3, 4, 8))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    gradient = torch.randn(3, 4, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    stack.grad = gradient
    for parameter, part in zip(single, gradient, strict=True):
        parameter.grad = part
    Muon([stack], lr=0.1).step()
    Muon(single, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([parameter.detach() for parameter in single]))


def test_a_parameter_without_a_gradient_stays():
    quiet, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.randn(4, 4)
    Muon([quiet, moved], lr=0.1, weight_decay=0.5).step()
    assert (quiet == 1).all() and not (moved == 1).any()


def test_muon_takes_matrices_only():
    vector = nn.Parameter(torch.ones(4))
    vector.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        Muon([vector]).step()


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(attention="mha", positions="learned"), dict(attention="mla-decoupled"), dict(ffn="dense"),
     dict(tie_embeddings=False), dict(norm="rmsnorm", bias=False, activation="swiglu")],
    ids=["mla", "mha-learned", "decoupled", "dense", "untied", "no-bias"],
)  # fmt: skip
def test_every_parameter_is_in_one_group(optimizer, changes):
    model = LanguageModel(ModelConfig(**MICRO | changes))
    names = {parameter: name for name, parameter in model.named_parameters()}
    placed = {}
    for one in make_optimizers(model, optimizer, lr=1e-3, weight_decay=0.1):
        for group in one.param_groups:
            for parameter in group["params"]:
                assert parameter not in placed, names[parameter]
                placed[parameter] = (type(one), group["weight_decay"])
    assert set(placed) == set(model.parameters())
    for parameter, (kind, decay) in placed.items():
        name = names[parameter]
        assert decay == (0.1 if parameter.dim() >= 2 else 0), name  # norms and biases are not pulled to zero
        table = name.startswith(("embedding", "position", "head")) or ".router." in name
        assert (kind is Muon) == (optimizer == "muon" and parameter.dim() >= 2 and not table), name


def test_frozen_parameters_are_left_out():
    model = LanguageModel(ModelConfig(**MICRO))
    model.embedding.weight.requires_grad_(False)
    matrices, rest = parameter_groups(model, 0.1)
    assert all(p is not model.embedding.weight for p in [*matrices, *(p for g in rest for p in g["params"])])


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"'sgd'.*muon.*adamw"):
        make_optimizers(LanguageModel(ModelConfig(**MICRO)), "sgd")


# --- the rate -------------------------------------------------------------------------------------


def test_the_course_of_the_learning_rate():
    how = dict(lr=2.0, min_lr=0.5, warmup=4, steps=20)
    rates = [learning_rate(step, **how) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]  # never zero, and the full rate at the end of the warm-up
    assert rates[12] == pytest.approx((2.0 + 0.5) / 2)  # half way down
    assert rates[20:] == [0.5] * 5
    assert all(a >= b for a, b in pairwise(rates[4:]))


@pytest.mark.parametrize("warmup,steps", [(0, 1), (0, 10), (10, 10), (20, 10)])
def test_the_rate_is_defined_at_the_edges(warmup, steps):
    rates = [learning_rate(step, lr=1.0, min_lr=0.0, warmup=warmup, steps=steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


# --- wrapped models -------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As DDP and torch.compile do: the model under a name of the wrapper's."""

    def __init__(self, name, model):
        super().__init__()
        self.add_module(name, model)


def wrappings(model):
    yield Wrapped("module", model)
    yield torch.compile(model)
    yield Wrapped("module", torch.compile(model))
    yield nn.Sequential(nn.Identity(), model)  # inside something larger


def placed_by(optimizers):
    return [
        (type(one), group["weight_decay"], list(map(id, group["params"])))
        for one in optimizers
        for group in one.param_groups
    ]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_wrapping_a_model_changes_no_group(optimizer):
    model = LanguageModel(ModelConfig(**MICRO))
    wanted = placed_by(make_optimizers(model, optimizer))
    for wrapped in wrappings(model):
        assert placed_by(make_optimizers(wrapped, optimizer)) == wanted
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    assert placed_by(make_optimizers(model, optimizer)) == wanted


def test_of_a_foreign_model_muon_takes_the_experts_and_never_a_router():
    moe = MixtureOfExperts(d_model=8, n_experts=4, top_k=2, d_expert=4, n_shared=1)
    model = nn.ModuleDict(dict(embed=nn.Embedding(9, 8), layer=nn.ModuleDict(dict(mlp=moe)), lm_head=nn.Linear(8, 9)))
    model["gate"] = nn.ModuleDict(dict(blocks=Router(d_model=8, n_experts=4, top_k=2)))
    matrices, rest = parameter_groups(model, 0.1)
    experts = [moe.experts.w_in, moe.experts.w_out, moe.shared.up.weight, moe.shared.down.weight]
    assert set(map(id, matrices)) == set(map(id, experts))
    others = {model["embed"].weight, model["lm_head"].weight, moe.router.weight, model["gate"]["blocks"].weight}
    assert set(rest[0]["params"]) == others and rest[1]["params"] == [model["lm_head"].bias]


def test_what_muon_cannot_train_is_refused():
    with pytest.raises(ValueError, match=r"optimizer='muon': the model has no `blocks`.*'adamw'"):
        make_optimizers(nn.Linear(3, 3))
    flat = Wrapped("_fsdp_wrapped_module", LanguageModel(ModelConfig(**MICRO)))
    with pytest.raises(ValueError, match="FSDP1 flattens"):
        make_optimizers(flat)


def test_methods_that_a_wrapper_does_not_know(tmp_path):
    model = LanguageModel(ModelConfig(**MICRO)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    story = generate(model, tokens, 4, seed=1)
    for number, wrapped in enumerate(list(wrappings(model))[:3]):
        assert unwrapped(wrapped) is model
        unwrapped(wrapped).save(tmp_path / str(number))
        assert torch.equal(generate(load(tmp_path / str(number))[0], tokens, 4, seed=1), story)
        assert torch.equal(generate(wrapped, tokens, 4, seed=1), story)
        optimizers = make_optimizers(wrapped)
        wrapped.zero_grad()
        model(tokens, tokens.roll(1)).backward()
        for optimizer in optimizers:
            optimizer.step()
        path = save_checkpoint(tmp_path / "run", wrapped, optimizers, dict(step=number))
        twin = LanguageModel(ModelConfig(**MICRO))
        fresh = make_optimizers(twin)
        load_checkpoint(path, twin, fresh)  # a wrapper's names are in no checkpoint
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
        assert [len(optimizer.state) for optimizer in fresh] == [len(optimizer.state) for optimizer in optimizers]
        load_checkpoint(path, wrapped, optimizers)
        story = generate(model, tokens, 4, seed=1)
    with pytest.raises(TypeError, match="model: Sequential holds no LanguageModel"):
        generate(nn.Sequential(nn.Linear(2, 2)), tokens, 4)


def test_a_closure_is_called_and_its_loss_returned():
    weight = nn.Parameter(torch.eye(3))
    optimizer = Muon([weight], lr=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and not torch.equal(weight, torch.eye(3))
    assert optimizer.step() is None


def test_what_is_frozen_is_left_out():
    model = LanguageModel(ModelConfig.preset("tiny", vocab_size=64, max_seq_len=16))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    (muon,) = make_optimizers(model, "muon")
    assert isinstance(muon, Muon)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "embedding.weight")
    with pytest.raises(ValueError, match="no MixtureOfExperts to train; choose 'adamw'"):
        make_optimizers(model, "muon")
    model.requires_grad_(False)
    for optimizer in ("muon", "adamw"):
        with pytest.raises(ValueError, match="all its parameters are frozen"):
            make_optimizers(model, optimizer)
