"""Sampling: filters against sorting by hand; cached = uncached; every row for itself."""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla.errors import MoemlaError
from moemla.evaluation import document_nats
from moemla.generation import filter_logits, generate
from moemla.model import LanguageModel
from tests.helpers import FORMS, config_of, model_of, shake, tokens_of


def filter_by_hand(row, temperature, top_k, top_p):
    """Probabilities as a dictionary token -> p, one row: temperature, then the k likeliest, then the nucleus."""
    scaled = [z / temperature for z in row]
    top = max(scaled)
    weight = {token: math.exp(z - top) for token, z in enumerate(scaled)}
    ranked = sorted(weight, key=lambda token: -weight[token])
    if top_k is not None:
        ranked = ranked[:top_k]
    total = sum(weight[token] for token in ranked)
    if top_p is not None:
        kept, mass = [], 0.0
        for token in ranked:
            kept.append(token)
            mass += weight[token] / total
            if mass >= top_p:
                break
        ranked = kept
    total = sum(weight[token] for token in ranked)
    return {token: weight[token] / total for token in ranked}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 15),
    st.none() | st.floats(0.01, 0.99),
    st.integers(0, 10**6),
)
def test_filters_against_sorting(vocab, temperature, top_k, top_p, seed):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    got = filter_logits(logits, temperature, top_k, top_p).exp()
    assert got.dtype == torch.float64
    for row, probabilities in zip(logits.double().tolist(), got.tolist(), strict=True):
        wanted = filter_by_hand(row, temperature, top_k, top_p)
        for token, p in enumerate(probabilities):
            assert p == pytest.approx(wanted.get(token, 0.0), abs=1e-12)


def test_filters_at_the_edges():
    logits = torch.tensor([[2.0, 2.0, 2.0, 1.0]])
    assert (filter_logits(logits, top_k=2).exp() > 0).sum() == 2  # equal logits do not widen the choice
    assert (filter_logits(logits, top_k=1).exp() > 0).sum() == 1
    assert torch.isfinite(filter_logits(logits, top_k=400)).all()
    steep = torch.tensor([[0.0, -50.0, -90.0]])
    assert torch.isfinite(filter_logits(steep, top_p=1.0)).all()  # all of the probability is everything
    assert filter_logits(steep, top_p=1e-9).exp().tolist() == [[1.0, 0.0, 0.0]]
    half = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert filter_logits(half, top_p=0.5).exp().tolist() == [[1.0, 0.0, 0.0]]
    assert filter_logits(torch.tensor([[1e30, 0.0]])).exp().tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
    ],
)
def test_wrong_filters(wrong, field):
    with pytest.raises(ValueError, match=f"{field}="):
        filter_logits(torch.zeros(1, 3), **wrong)


SAMPLING = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(temperature=0.9, top_k=12, top_p=0.9, seed=4),
    "hot": dict(temperature=2.0, top_k=None, seed=1),
    "stop": dict(temperature=1.5, top_k=5, seed=3, stop=7),
}


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("form", FORMS)
def test_cached_equals_uncached_and_each_row_alone(form, how):
    model = model_of(form)
    prompts = [tokens_of(1, length, seed=length)[0] for length in (5, 1, 9)]
    cached = generate(model, prompts, 8, **SAMPLING[how])
    plain = generate(model, prompts, 8, use_cache=False, **SAMPLING[how])
    seed = SAMPLING[how].get("seed", 0)
    for row, prompt in enumerate(prompts):
        assert torch.equal(cached[row], plain[row])
        assert torch.equal(cached[row][: len(prompt)], prompt)
        alone = generate(model, [prompt], 8, **SAMPLING[how] | dict(seed=seed + row))[0]
        assert torch.equal(alone, cached[row])


@pytest.mark.parametrize("how", SAMPLING)
def test_cached_equals_uncached_in_float32(how):
    model, prompts = model_of("mla-rope", torch.float32), tokens_of(3, 4)
    cached = generate(model, prompts, 16, **SAMPLING[how])
    assert torch.equal(cached, generate(model, prompts, 16, use_cache=False, **SAMPLING[how]))


@torch.no_grad()
def test_greedy_by_hand():
    model, text = model_of("decoupled"), tokens_of(1, 3)
    out = generate(model, text, 6, temperature=0.0)
    for _ in range(6):
        text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, text)


def test_top_k_1_is_greedy():
    model, text = model_of(), tokens_of(2, 3)
    assert torch.equal(generate(model, text, 6, top_k=1), generate(model, text, 6, temperature=0.0))


def test_a_rows_text_does_not_depend_on_its_neighbours():
    model, mine = model_of(), tokens_of(1, 4)[0]
    alone = generate(model, [mine], 8, seed=5)[0]
    for others in ([tokens_of(1, 9)[0]], [tokens_of(1, 1)[0], tokens_of(1, 2)[0]]):
        assert torch.equal(generate(model, [mine, *others], 8, seed=5)[0], alone)


def test_seeds():
    model, text = model_of(), tokens_of(1, 3).expand(2, -1)
    out = generate(model, text, 12, temperature=2.0, seed=5)
    assert not torch.equal(out[0], out[1])  # the same prompt twice: two stories
    assert torch.equal(out, generate(model, text, 12, temperature=2.0, seed=5))
    assert torch.equal(out[1], generate(model, text, 12, temperature=2.0, seed=6)[0])
    torch.rand(3)
    before = torch.get_rng_state()
    generate(model, text, 2)
    assert torch.equal(before, torch.get_rng_state())  # nobody else's random numbers are used up


def test_a_seed_for_each_row():
    model, text = model_of(), tokens_of(3, 3)
    out = generate(model, text, 8, temperature=1.5, seed=[9, 4, 9])
    for row, seed in enumerate([9, 4, 9]):
        assert torch.equal(out[row], generate(model, text[row : row + 1], 8, temperature=1.5, seed=seed)[0])
    with pytest.raises(ValueError, match=r"seed=\[1, 2\]: one number, or one for each of the 3 prompts"):
        generate(model, text, 2, seed=[1, 2])


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_in_a_cache_is_computed_once_and_serves_again(form):
    model, prefix, seen = model_of(form), tokens_of(1, 6), []
    with torch.no_grad():
        cache = model.new_cache(1, 6)  # no room for more: each call takes a copy with room
        model(prefix, cache=cache)
    prompts = [torch.cat((prefix[0], tokens_of(1, extra, seed=extra)[0])) for extra in (1, 4, 2)]
    wanted = generate(model, prompts, 6, seed=3, stop=7)
    hook = model.embedding.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[1]))
    for _ in range(2):
        out = generate(model, prompts, 6, seed=3, stop=7, cache=cache)
        assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
        assert cache.lengths == [6] and cache.max_len == 6
    hook.remove()
    assert max(seen) == 4  # never the prefix again


@torch.no_grad()
def test_a_cache_with_a_row_for_each_prompt():
    model, text = model_of("mla-rope"), tokens_of(2, 5)
    cache = model.new_cache(2, 20)
    model(text[:, :4], cache=cache, lengths=torch.tensor([4, 2]))
    assert torch.equal(generate(model, text, 6, cache=cache), generate(model, text, 6))


@torch.no_grad()
def test_prefixes_of_very_different_length():
    """The longest prefix and the longest rest stand in different rows; together they would not fit."""
    model, text = model_of("mla-rope"), tokens_of(2, 18)
    cache = model.new_cache(2, 20)
    model(text[:, :17], cache=cache, lengths=torch.tensor([17, 1]))
    assert torch.equal(generate(model, text, 6, cache=cache), generate(model, text, 6))


@torch.no_grad()
def test_a_cache_that_does_not_fit_the_prompts():
    model, text = model_of(), tokens_of(2, 5)
    cache = model.new_cache(1, 20)
    model(text[:1], cache=cache)
    with pytest.raises(ValueError, match="cache: holds 5 tokens, and the prompt must go on behind them"):
        generate(model, text, 2, cache=cache)
    with pytest.raises(ValueError, match="cache: has 3 rows for 2 prompts"):
        generate(model, text, 2, cache=model.new_cache(3, 20))


COMPILED = """
import torch, torch._dynamo, pickle, moemla
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(vocab_size=600, max_seq_len=40, n_layers=1, d_model=128, n_heads=4, n_experts=8, top_k=2, d_expert=8)
for form in (dict(attention="mla-decoupled"), dict(attention="mla"), dict(attention="mha", n_kv_heads=2)):
    model = moemla.LanguageModel(moemla.ModelConfig(**sizes, **form)).eval()
    torch._dynamo.reset()
    model.__dict__["_compiled"] = torch.compile(model.next_logits, backend="BACKEND")
    prompt = torch.randint(0, 600, (1, 5))
    wanted = moemla.generate(model, prompt, 24, temperature=0.0)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):  # a first length, any length
        assert torch.equal(moemla.generate(model, prompt, 24, temperature=0.0, compiled=True), wanted)
    assert "_compiled" not in pickle.loads(pickle.dumps(model)).__dict__
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_tokens_are_the_same_and_two_graphs_serve_all_lengths(backend):
    """In a process of its own: torch cannot look through the run-time checks of shapes that the tests install."""
    code = COMPILED.replace("BACKEND", backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_samples_follow_the_distribution():
    model, n = model_of("mha-rope", ffn="dense", vocab_size=5), 4000
    text = tokens_of(1, 2, vocab=5)
    drawn = generate(model, text.expand(n, -1), 1, temperature=1.3, top_k=3)[:, -1]
    with torch.no_grad():
        wanted = filter_logits(model(text)[:, -1], 1.3, 3).exp()[0]
    share = torch.bincount(drawn, minlength=5) / n
    assert (share - wanted).abs().max() < 4 * 0.5 / n**0.5
    assert (share[wanted == 0] == 0).all()


def favourite_after(model, text):
    """A token that greedy generation meets, and at which step it first does."""
    new = generate(model, text, 10, temperature=0.0)[0, text.shape[1] :].tolist()
    return new[3], new.index(new[3])


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop(use_cache):
    model, text = model_of("mla-rope"), tokens_of(1, 3)
    stop, step = favourite_after(model, text)
    out = generate(model, text, 10, temperature=0.0, stop=stop, use_cache=use_cache)
    assert out.shape == (1, 3 + step + 1)
    assert out[0, -1] == stop
    prompts = [text[0], tokens_of(1, 5, seed=11)[0]]
    both = generate(model, prompts, 10, temperature=0.0, stop=stop, use_cache=use_cache)
    assert torch.equal(both[0], out[0])
    for row, prompt in zip(both, prompts, strict=True):
        new = row[len(prompt) :].tolist()
        assert stop not in new[:-1]
        assert len(new) == 10 or new[-1] == stop
    again = tokens_of(2, 3)
    filled = generate(model, torch.cat((text, again)), 10, temperature=0.0, stop=stop, use_cache=use_cache)
    assert (filled[0, 3 + step :] == stop).all()  # a tensor is filled up with the stop token


@pytest.mark.parametrize("stop", [None, 7])
def test_on_token_tells_every_token_as_it_comes(stop):
    model, prompts, told = model_of(), [tokens_of(1, 4)[0], tokens_of(1, 2)[0]], []
    out = generate(model, prompts, 9, temperature=1.5, seed=3, stop=stop, on_token=told.append)
    for row, prompt in enumerate(prompts):
        assert [step[row] for step in told if step[row] is not None] == out[row][len(prompt) :].tolist()
    assert len(told) == max(len(row) - len(prompt) for row, prompt in zip(out, prompts, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_at_max_seq_len(use_cache):
    model = model_of("mha-learned")
    assert generate(model, tokens_of(2, 20), 50, use_cache=use_cache).shape == (2, 24)
    with pytest.raises(ValueError, match=r"25 tokens .* max_seq_len=24"):
        generate(model, tokens_of(1, 25), 1, use_cache=use_cache)
    with pytest.raises(ValueError, match="24 tokens leaves no room"):
        generate(model, tokens_of(1, 24), 1, use_cache=use_cache)


def test_no_new_tokens():
    model, text = model_of(), tokens_of(2, 24)
    assert torch.equal(generate(model, text, 0), text)
    assert torch.equal(generate(model, [text[0]], 0)[0], text[0])


def test_tensor_in_tensor_out_list_in_list_out():
    model, text = model_of(), tokens_of(2, 3)
    tensor, listed = generate(model, text, 4), generate(model, list(text), 4)
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(listed, list)
    assert torch.equal(tensor, torch.stack(listed))
    assert tensor.dtype == torch.int64
    assert generate(model, text.int(), 4).tolist() == tensor.tolist()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = model_of(dropout=0.3).train(training)
    out = generate(model, tokens_of(2, 3), 4)
    assert model.training == training
    assert torch.equal(out, generate(model.eval(), tokens_of(2, 3), 4))  # no dropout while it writes
    assert all(block.feedforward.router.load.sum() == 0 for block in model.blocks)
    model.train()
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, tokens_of(1, 2), 4, on_token=lambda step: (_ for _ in ()).throw(RuntimeError("stop here")))
    assert model.training
    model(tokens_of(1, 4), tokens_of(1, 4)).backward()  # and training goes on after inference mode


@pytest.mark.parametrize("prompts", [tokens_of(2, 3), [tokens_of(1, 2)[0], tokens_of(1, 4)[0]]], ids=["tensor", "list"])
def test_what_is_written_can_be_trained_on(prompts):
    model = model_of().train()
    for text in generate(model, prompts, 4):
        text = text[None] if text.dim() == 1 else text
        model(text[:, :-1], text[:, 1:]).backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_a_cache_that_was_filled_in_16_bits_is_this_models():
    model, prompt = model_of(dtype=torch.float32).eval(), tokens_of(1, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(1, 20)
        with torch.no_grad():
            model(prompt[:, :4], cache=cache)
        whole = generate(model, prompt, 4, temperature=0)
        assert generate(model, prompt, 4, temperature=0, cache=cache).shape == whole.shape


def test_no_memory_is_not_another_models_cache(monkeypatch):
    model, prompt = model_of().eval(), tokens_of(1, 6)
    cache = model.new_cache(1, 20)
    with torch.no_grad():
        model(prompt[:, :4], cache=cache)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "features", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        generate(model, prompt, 4, cache=cache)


@pytest.mark.parametrize(
    ("tokens", "how", "words"),
    [
        ([], {}, "at least one token"),
        ([torch.tensor([], dtype=torch.long)], {}, "at least one token"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], {}, "at least one token"),
        ([torch.tensor([37])], {}, "between 0 and 36"),
        ([torch.tensor([-1])], {}, "between 0 and 36"),
        ([torch.tensor([1])], dict(max_new_tokens=-1), "max_new_tokens=-1"),
        ([torch.tensor([1])], dict(temperature=-0.5), "temperature=-0.5"),
        ([torch.tensor([1])], dict(top_k=0), "top_k=0"),
        ([torch.tensor([1])], dict(top_p=2.0), "top_p=2.0"),
    ],
)
def test_wrong_arguments(tokens, how, words):
    with pytest.raises(ValueError, match=words):
        generate(model_of(), tokens, **how)


def test_a_prompt_may_be_a_list_of_ids():
    """As `Tokenizer.encode` returns it."""
    model = model_of()
    told = generate(model, [[1, 2, 3], [4]], 5, seed=3)
    expected = generate(model, [torch.tensor([1, 2, 3]), torch.tensor([4])], 5, seed=3)
    assert [row.tolist() for row in told] == [row.tolist() for row in expected]
    assert all(isinstance(row, torch.Tensor) for row in told)


def test_one_dimensional_tokens():
    with pytest.raises(ValueError, match=r"tokens\.shape=\(2,\): give \(B, T\)"):
        inspect.unwrap(generate)(model_of(), torch.tensor([1, 2]))  # as users have it, without the tests' type checks


def test_bfloat16_model_generates():
    model = LanguageModel(config_of(), dtype=torch.bfloat16)
    assert generate(model, tokens_of(2, 3), 5).shape == (2, 8)


# --- a cache that is another's --------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_cache_of_another_text_is_refused(form):
    model, text = model_of(form), tokens_of(2, 8)
    other = text[:, :5].clone()
    other[1, 3] = (other[1, 3] + 1) % 37
    cache = model.new_cache(2, 12)
    model(other[:, :2], cache=cache)
    model(other[:, 2:5], cache=cache)
    with pytest.raises(ValueError, match="cache: row 1 holds other tokens than prompt 1 begins with; fill it with "):
        generate(model, text, 2, cache=cache)
    cache.crop(3)  # the other token is forgotten
    assert torch.equal(generate(model, text, 2, cache=cache), generate(model, text, 2))


@torch.no_grad()
def test_a_cache_knows_its_tokens_through_all_that_is_done_to_it():
    model, text = model_of(), tokens_of(3, 9)
    cache = model.new_cache(3, 12)
    model(text[:, :5], cache=cache, lengths=torch.tensor([5, 2, 4]))
    model(text[:, 5:7].int(), cache=cache)
    rows = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 5, 6], [0, 1, 2, 3, 5, 6]]

    def known(cache, order=(0, 1, 2)):
        for row, source in enumerate(order):
            assert cache.tokens[row, : cache.lengths[row]].tolist() == text[source, rows[source]].tolist()

    known(cache)
    twin = cache.copy(20)
    twin.select([2, 0, 2])
    known(twin, (2, 0, 2))
    known(cache)
    twin.reset()
    model(tokens_of(3, 2, seed=9), cache=twin)
    known(cache)
    assert torch.equal(twin.tokens[:, :2], tokens_of(3, 2, seed=9)) and twin.tokens.shape == (3, 20)
    prompts = [torch.cat((text[row, rows[row]], tokens_of(1, 1)[0])) for row in range(3)]
    for got, wanted in zip(generate(model, prompts, 3, cache=cache), generate(model, prompts, 3), strict=True):
        assert torch.equal(got, wanted)
    layers_only = model.new_cache(1, 12)
    model.blocks[0].attention(torch.randn(1, 3, 16, dtype=torch.float64), layers_only[0])
    layers_only.advance(3)  # what was appended, nobody has told
    with pytest.raises(ValueError, match="holds other tokens"):
        generate(model, text[:1], 2, cache=layers_only)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_cache_of_another_model_is_refused(dtype):
    model, text = model_of("mla-rope", dtype), tokens_of(1, 6)

    def filled(by):
        cache = by.new_cache(1, 6)
        by(text[:, :5], cache=cache)
        return cache

    others = [
        shake(LanguageModel(config_of("mla-rope"), dtype=dtype), seed=7).eval(),
        model_of("mla-rope", dtype, n_layers=3),
        model_of("mla-rope", dtype, n_layers=1),
        model_of("mla-rope", dtype, latent_dim=6),
        model_of("mha-rope", dtype),
        model_of("decoupled", dtype),
    ]
    for other in others:
        with pytest.raises(ValueError, match="cache: filled by another model, or by this one before its weights chang"):
            generate(model, text, 2, cache=filled(other))
    again = model_of("mla-rope", dtype)
    assert torch.equal(generate(model, text, 2, cache=filled(again)), generate(model, text, 2))  # the same weights


def test_a_cache_from_before_a_step_of_training_is_refused():
    model, text = model_of("mla-rope", torch.float32), tokens_of(1, 8)
    for frozen in (False, True):  # the lower layer too may have stood still
        model.embedding.requires_grad_(not frozen)
        model.blocks[0].requires_grad_(not frozen)
        with torch.no_grad():
            cache = model.new_cache(1, 8)
            model(text[:, :6], cache=cache)
        assert torch.equal(generate(model, text, 2, cache=cache), generate(model, text, 2))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(ValueError, match="before its weights changed"):
            generate(model, text, 2, cache=cache)


# --- what is no number ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", SAMPLING)
def test_logits_that_are_no_numbers_are_refused(how, number):
    model = model_of()
    with torch.no_grad():
        model.head.weight = torch.nn.Parameter(model.head.weight.clone())
        model.head.weight[5] = number
    with pytest.raises(MoemlaError, match=r"^the model's logits are not finite: the weights are damaged, or [a-z ]+$"):
        generate(model, tokens_of(2, 3), 4, **SAMPLING[how])


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -math.inf])
def test_a_temperature_that_is_no_number(temperature):
    with pytest.raises(ValueError, match=f"^temperature={temperature}: must be a number"):
        generate(model_of(), tokens_of(1, 2), 2, temperature=temperature)


# --- modes and compiled code ----------------------------------------------------------------------


def test_frozen_blocks_stay_in_eval_mode():
    model = model_of(dropout=0.3).train()
    model.blocks[0].eval()
    model.embedding.eval()
    before = [module.training for module in model.modules()]
    generate(model, tokens_of(2, 3), 4)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, tokens_of(1, 2), 4, on_token=lambda step: (_ for _ in ()).throw(RuntimeError("stop here")))
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


ENDING = """
import torch, torch._dynamo, moemla
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(vocab_size=10, max_seq_len=30, n_layers=1, d_model=32, n_heads=4, n_experts=8, top_k=2, d_expert=8)
for form in (dict(attention="mla", positions="learned"), dict(attention="mla-decoupled"))[:CALLS]:
    model = moemla.LanguageModel(moemla.ModelConfig(**sizes, **form)).double().eval()
    graphs = []
    model.__dict__["_compiled"] = torch.compile(model.next_logits, backend=lambda g, _: graphs.append(g) or g.forward)
    calls = (  # lengths of prompts, most graphs: a first length and any length, then rows of unequal length
        ([5, 5, 5, 5, 5], 2),
        ([3, 7, 5, 12, 4], 2),
        ([3, 29, 5, 28, 4], 2),  # rows that end at max_seq_len, and are computed along for twenty steps
    )[:CALLS]
    torch._dynamo.reset()
    for lengths, most in calls:
        prompts, told, steps = [torch.randint(0, 10, (length,)) for length in lengths], [], []
        for seed in (0, 1):
            how = dict(max_new_tokens=25, temperature=2.0, top_k=None, seed=seed, stop=7)
            wanted = moemla.generate(model, prompts, on_token=told.append, **how)
            before = len(graphs)
            found = moemla.generate(model, prompts, on_token=steps.append, compiled=True, **how)
            assert len(graphs) - before <= (0 if seed else most), (form, lengths, len(graphs) - before)
            assert all(map(torch.equal, found, wanted)) and steps == told
            assert len({len(row) - length for row, length in zip(found, lengths)}) > 1  # ended at different steps
"""


@pytest.mark.parametrize("calls", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_rows_that_end_make_no_new_graph(calls):
    code = ENDING.replace("CALLS", calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_are_made_of_the_last_place_alone(use_cache):
    """A prompt's own logits, (T, V) for each row, are never needed."""
    model, seen = model_of(), []
    model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    generate(model, [tokens_of(1, length)[0] for length in (9, 4)], 3, use_cache=use_cache)
    generate(model, tokens_of(2, 7), 3, use_cache=use_cache)
    assert set(seen) == {(2, 37)}


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, [1, 2**70]])
def test_a_seed_that_no_generator_takes(seed):
    with pytest.raises(ValueError, match=r"^seed=.*: must be between"):
        generate(model_of(), tokens_of(2, 3), 2, seed=seed)


def test_a_model_inside_another_module_is_taken_out_and_a_foreign_one_refused():
    model, text = model_of(), tokens_of(2, 3)
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(generate(wrapped, text, 4), generate(model, text, 4))
    assert torch.equal(document_nats(wrapped, [[1, 2, 3]]), document_nats(model, [[1, 2, 3]]))
    with pytest.raises(TypeError, match=r"^model: Linear holds no LanguageModel"):
        generate(torch.nn.Linear(2, 2), text, 4)
