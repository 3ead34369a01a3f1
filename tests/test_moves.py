"""Whatever moves, copies, loads or assigns: one table stays one, two stay two, and what is no weight comes along."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from moemla.attention import MultiHeadAttention
from moemla.checkpoint import load
from moemla.config import ModelConfig
from moemla.devices import same_storage
from moemla.errors import MoemlaError
from moemla.files import read_json
from moemla.model import Block, LanguageModel
from moemla.moe import MixtureOfExperts
from moemla.rope import RotaryEmbedding
from tests.helpers import FORMS, close, config_of, model_of, shake, tokens_of

HOWS = {
    "moe": {},
    "moe swiglu": dict(activation="swiglu", scores="softmax", n_shared=0),
    "dense": dict(ffn="dense"),
    "untied rmsnorm": dict(ffn="dense", norm="rmsnorm", tie_embeddings=False, bias=False),
}


def on_meta(config, **like):
    with torch.device("meta"):
        return LanguageModel(config, **like)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model):
    twin = on_meta(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def assigned_from_apart(model):
    twin = on_meta(model.config)
    twin.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return twin


def emptied_and_loaded(model):
    twin = on_meta(model.config).to_empty(device="cpu")
    twin.load_state_dict(model.state_dict())
    return twin


def overwriting_moves(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return copy.deepcopy(model).double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "to and back": lambda model: copy.deepcopy(model).to(torch.float64).to(torch.float32),
    "new parameters": overwriting_moves,
    "in a wrapper": lambda model: nn.Sequential(copy.deepcopy(model)).double().float()[0],
    "assign": assigned,
    "assign from apart": assigned_from_apart,
    "assign in a wrapper": lambda model: in_a_wrapper(model),
    "to_empty": emptied_and_loaded,
}


def in_a_wrapper(model):
    twin = nn.Sequential(on_meta(model.config))
    twin.load_state_dict(nn.Sequential(model).state_dict(), assign=True)
    return twin[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_one_table_stays_one_and_two_stay_two(way, tied):
    model = model_of("mla-rope", torch.float32, tie_embeddings=tied)
    twin, text = WAYS[way](model).eval(), tokens_of(2, 6)
    assert twin.tied == (twin.head.weight is twin.embedding.weight) == tied
    assert not same_storage(twin.embedding.weight, model.embedding.weight) or way.startswith("assign")
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert torch.equal(twin(text), model(text))
    loss = twin(text[:, :-1], text[:, 1:])
    loss.backward()
    rows = twin.embedding.weight.grad.abs().sum(-1) > 0
    assert rows.all() if tied else (twin.head.weight.grad is not None and not rows.all())


def train_head(model, text):
    """As after `to_empty` without a tie: two parameters, and steps that make them differ."""
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        model(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
    return model(text[:, :-1], text[:, 1:]).item()


def test_a_head_that_is_no_longer_the_embedding_is_saved(tmp_path):
    model, text = model_of("mla-rope", torch.float32), tokens_of(2, 9)
    loss = train_head(model, text)
    assert model.config.tie_embeddings and not model.tied
    model.save(tmp_path)
    again, _ = load(tmp_path)
    assert not again.tied and not again.config.tie_embeddings
    assert read_json(tmp_path / "config.json")["tie_embeddings"] is False
    assert torch.equal(again.head.weight, model.head.weight)
    assert again(text[:, :-1], text[:, 1:]).item() == pytest.approx(loss, rel=1e-6)


def test_an_embedding_that_the_user_assigns(tmp_path):
    model, text = model_of("mla-rope", torch.float32), tokens_of(2, 9)
    model.embedding.weight = nn.Parameter(torch.randn_like(model.embedding.weight))
    model.double().float()
    assert not model.tied
    model.save(tmp_path)
    assert torch.equal(load(tmp_path)[0](text), model(text))


def test_tables_that_the_user_ties(tmp_path):
    model, text = model_of("mla-rope", torch.float32, tie_embeddings=False), tokens_of(2, 9)
    model.head.weight = model.embedding.weight
    model.save(tmp_path)
    again, _ = load(tmp_path)
    assert again.tied and again.config.tie_embeddings
    assert torch.equal(again(text), model(text))


def test_two_parameters_over_one_storage_are_one_after_a_move():
    model = model_of("mla-rope", torch.float32)
    model.head.weight = nn.Parameter(model.embedding.weight.detach())
    assert model.tied and model.head.weight is not model.embedding.weight
    model.double()
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("assign", [True, False])
def test_a_head_that_differs_is_not_loaded_into_a_tied_model(assign, tmp_path):
    model = model_of("mla-rope", torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["head.weight"] += 1
    with pytest.raises(RuntimeError, match=r"head.weight: differs from embedding.weight; .*tie_embeddings=False"):
        model.load_state_dict(weights, assign=assign)
    other = model_of("mla-rope", torch.float32, tie_embeddings=False)
    other.load_state_dict(weights, assign=assign)
    assert torch.equal(other.head.weight, weights["head.weight"])
    del weights["head.weight"]  # as a file has it
    assert torch.equal(weights["embedding.weight"], model.embedding.weight)
    model.load_state_dict(weights, assign=assign)
    assert model.tied
    with pytest.raises(RuntimeError, match=r"Missing key.*head.weight"):
        other.load_state_dict(weights, assign=assign)


def test_a_config_that_says_tied_over_a_file_with_another_head_is_refused_in_one_line(tmp_path):
    model = model_of("mla-rope", torch.float32, tie_embeddings=False)
    model.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_embeddings": false', '"tie_embeddings": true'))
    with pytest.raises(MoemlaError, match=r"head.weight: differs from embedding.weight") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("form", FORMS)
def test_reset_parameters_is_the_constructor_with_the_same_seed(form, how):
    config = config_of(form, **HOWS[how])
    torch.manual_seed(3)
    plain = LanguageModel(config)
    after = torch.rand(1)
    used = shake(LanguageModel(config))
    for name, buffer in used.named_buffers():
        if name.endswith(("bias", "load")):
            buffer += 7
    for model in (used, on_meta(config).to_empty(device="cpu")):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(torch.nan if tensor.is_floating_point() else 7)  # what `to_empty` may leave
        model = model.to_empty(device="cpu")
        torch.manual_seed(3)
        model.reset_parameters()
        assert torch.equal(torch.rand(1), after)  # as many numbers were drawn
        ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, plain))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
        for ours, theirs in zip(model.modules(), plain.modules(), strict=True):  # counts are no buffers everywhere
            if hasattr(theirs, "load"):
                assert torch.equal(ours.load, theirs.load)
        text = tokens_of(2, 6)
        assert torch.equal(model.eval()(text), plain.eval()(text))
        assert model.tied == config.tie_embeddings


LAYERS = {
    "attention": lambda: MultiHeadAttention(d_model=12, n_heads=4, d_head=6, rope=RotaryEmbedding(6, 9)),
    "experts": lambda: MixtureOfExperts(d_model=12, n_experts=5, top_k=2, d_expert=4, n_shared=1),
    "block": lambda: Block(config_of("decoupled"), RotaryEmbedding(4, 24)),
    "frequencies": lambda: RotaryEmbedding(6, 9, learnable=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_alone_reset_too(name):
    torch.manual_seed(3)
    plain = LAYERS[name]()
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (layer, plain))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_weights_assigned_to_a_model_without_any(form, dtype):
    """No `to_empty`: tables that no state dict holds come back by themselves, as exact as the weights are."""
    source, text = model_of(form, dtype), tokens_of(2, 7)
    model = on_meta(source.config).eval()
    assert model.load_state_dict(source.state_dict(), assign=True) == ([], [])
    with torch.inference_mode():
        assert torch.equal(model(text), source(text))
    loss = model(text[:, :-1], text[:, 1:])  # tables made during inference serve training
    loss.backward()
    close(loss, source(text[:, :-1], text[:, 1:]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_weights_assigned_and_then_moved(form):
    source, text = model_of(form, torch.float32), tokens_of(2, 7)
    model = on_meta(source.config).eval()
    model.load_state_dict(source.state_dict(), assign=True)
    model.to("cpu").to(torch.float64)
    close(model(text), copy.deepcopy(source).double()(text), 1e-12)
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_frequencies_that_are_assigned_stay_wide():
    rope = RotaryEmbedding(8, 9, learnable=True)
    rope.load_state_dict({"inv_freq": rope.inv_freq.detach().bfloat16()}, assign=True)
    assert rope.inv_freq.dtype == torch.float32


def test_a_table_follows_its_settings():
    x = torch.randn(1, 2, 5, 8)
    rope = RotaryEmbedding(8, 4)
    rope.theta, rope.layout, rope.max_seq_len = 500.0, "interleaved", 9
    assert torch.equal(rope(x), RotaryEmbedding(8, 9, 500.0, "interleaved")(x))
    for name, value in dict(theta=0.0, layout="thirds", max_seq_len=0).items():
        with pytest.raises(ValueError, match=f"{name}={value!r}: "):
            setattr(rope, name, value)


def test_targets_that_are_the_tokens_are_said_once():
    from moemla.model import _warn_of_copying

    model, text = model_of("mla-rope"), tokens_of(2, 9)
    tokens, targets = text[:, :-1], text[:, 1:]
    masked = tokens.clone()
    masked[0, :3] = -100
    quiet = [targets, tokens.roll(1, 1), torch.full_like(tokens, -1)]
    same = [(tokens, tokens), (tokens, tokens.clone()), (tokens, text[:, :-1]), (tokens, masked)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for right in quiet:
            model(tokens, right)
        ones = torch.full((2, 9), 5)
        model(ones[:, :-1], ones[:, 1:])  # the token that follows is the same, and rightly so
    for wrong in same:
        _warn_of_copying.cache_clear()
        with pytest.warns(UserWarning, match=r"the model learns to copy: shift them by one"):
            model(*wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(*wrong)


def test_the_right_targets_are_those_of_the_next_token():
    """What the warning asks for is the loss of a language model."""
    model, text = model_of("mla-rope"), tokens_of(3, 9)
    wanted = nn.functional.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    close(model(text[:, :-1], text[:, 1:]), wanted, 1e-12)


def test_config_of_a_copy_is_the_config():
    assert copy.deepcopy(model_of()).config == model_of().config == ModelConfig.from_dict(model_of().config.to_dict())
