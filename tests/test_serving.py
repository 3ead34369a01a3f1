"""A server writes what `generate` writes for each alone, computes nobody who is not there, and counts what it reads."""

import random

import pytest
import torch

import moemla
from moemla import complexity
from moemla.config import ModelConfig
from moemla.errors import MoemlaError
from moemla.model import LanguageModel
from moemla.serving import Server, experts_read, step_bytes
from moemla.serving_bench import FORMS, bench_serving, form

VARIANTS = ("mha", "gqa-rope", "mla-rope", "mla-decoupled", "moe-mla-rope")
STOP = 7


def model_of(variant: str, **changes) -> LanguageModel:
    sizes = dict(n_layers=2, d_model=32, n_heads=4, vocab_size=40, max_seq_len=32) | changes
    if variant.startswith("moe"):
        sizes |= dict(n_experts=6, n_shared=1, top_k=2, d_expert=8)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset("tiny", variant, **sizes), dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # logits far enough apart for stories of their own
    return model


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(40) for _ in range(draw.randint(1, 12))] for _ in range(n)]


def alone(model, prompt, new, seed, **chosen) -> list[int]:
    return moemla.generate(model, [prompt], new, seed=seed, **chosen)[0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_each_story_is_the_one_written_alone(variant, slots):
    """Whatever the slots, prompts of any length, stories that end at a stop token, at their number, at max_len."""
    model, asked = model_of(variant), prompts(12)
    server = Server(model, slots, stop=STOP)
    wanted = {}
    for n, prompt in enumerate(asked):
        new = (3, 9, 40)[n % 3]
        wanted[server.submit(prompt, new, seed=n)] = alone(model, prompt, new, n, stop=STOP)
    told = {ticket: story.tolist() for ticket, story in server.run().items()}
    assert told == wanted and list(told) == sorted(told)
    lengths = {len(story) - len(prompt) for story, prompt in zip(wanted.values(), asked, strict=True)}
    assert len(lengths) > 3 and not server.busy and not server.finished


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=1.3, top_k=None, top_p=0.7), dict(top_k=3)])
def test_it_samples_as_generate_does(sampling):
    model = model_of("mla-rope")
    server = Server(model, 2, **sampling)
    tickets = {server.submit(prompt, 8, seed=5 + n): n for n, prompt in enumerate(prompts(5, 1))}
    for ticket, story in server.run().items():
        n = tickets[ticket]
        assert story.tolist() == alone(model, prompts(5, 1)[n], 8, 5 + n, **sampling)


@pytest.mark.parametrize("seed", range(4))
def test_requests_may_come_and_go_at_any_time(seed):
    """Submitted between steps, taken out between steps: the others do not notice."""
    draw, model = random.Random(seed), model_of("moe-mla-rope")
    server, asked, wanted, told, gone = Server(model, 3, stop=STOP), prompts(15, seed), {}, {}, set()
    while asked or server.busy:
        for _ in range(min(len(asked), draw.randint(0, 2))):
            prompt, new = asked.pop(), draw.randint(1, 15)
            ticket = server.submit(prompt, new, seed=len(asked))
            wanted[ticket], told[ticket] = alone(model, prompt, new, len(asked), stop=STOP), list(prompt)
        if wanted and draw.random() < 0.15:
            ticket = draw.choice([t for t in wanted if t not in gone])
            gone.add(ticket)
            cut = server.cancel(ticket).tolist()
            assert cut == told[ticket] == wanted[ticket][: len(cut)]
        for ticket, token in server.step().items():
            told[ticket].append(token)
        assert len(server.rows) <= 3
    assert gone and len(gone) < 15
    finished = {ticket: story.tolist() for ticket, story in server.run().items()}
    assert finished == {ticket: story for ticket, story in wanted.items() if ticket not in gone}
    assert all(told[ticket] == wanted[ticket] for ticket in finished)


def test_nobody_is_computed_who_is_not_there(monkeypatch):
    """Steps have a row for each story; a prompt is computed once, but for its last token, and nothing twice."""
    model, steps, filled = model_of("mha"), [], []
    original, features = model.next_logits, model.features

    def counted(tokens, cache):
        steps.append(len(tokens))
        return original(tokens, cache)

    def counted_features(tokens, cache=None, lengths=None):
        if lengths is not None:
            filled.append(int(lengths.sum()))
        return features(tokens, cache=cache, lengths=lengths)

    monkeypatch.setattr(model, "next_logits", counted)
    monkeypatch.setattr(model, "features", counted_features)
    server, asked = Server(model, 4), prompts(9)
    news = [2, 9, 3, 8, 1, 7, 2, 2, 5]
    for prompt, new in zip(asked, news, strict=True):
        server.submit(prompt, new)
    server.run()
    assert sum(steps) == sum(news) and max(steps) == 4
    assert sum(filled) == sum(len(prompt) - 1 for prompt in asked)
    # As a list of free moments: each request takes the slot that is free first.
    free = [0] * 4
    for new in news:
        free.sort()
        free[0] += new
    assert len(steps) == max(free) < 2 + 9 + 8 + 5  # fewer than in groups of four, each as long as its longest


def test_a_slot_forgets_its_last_story():
    """A short story after a long one in the same slot, and no other: only lengths tell what is whose."""
    model = model_of("mla-decoupled")
    server = Server(model, 1)
    server.submit(prompts(1)[0] + [1, 2, 3], 15)
    server.submit([5], 6, seed=3)
    assert server.run()[1].tolist() == alone(model, [5], 6, 3)


def test_the_callers_model_keeps_its_mode_and_the_cache_its_size():
    model = model_of("moe-mla-rope").train()
    server = Server(model, 2, max_len=20)
    before = server.cache.nbytes
    server.submit([1, 2], 50)
    (story,) = server.run().values()
    assert model.training and server.cache.nbytes == before and len(story) == 20
    assert "0 of 2 slots taken, 0 waiting, 0 finished" in repr(server)
    model.requires_grad_()(story[None]).sum().backward()  # what is returned may be trained on
    assert Server(model, 1, dtype=torch.bfloat16).cache.buffers[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(slots=0), "slots=0"),
        (dict(max_len=0), "max_len=0"),
        (dict(max_len=33), "max_seq_len=32"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(stop=40), "stop=40"),
    ],
)
def test_what_is_no_server_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Server(model_of("mha"), **dict(slots=2) | wrong)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(prompt=[]), "at least one token"),
        (dict(prompt=[40]), "between 0 and 39"),
        (dict(prompt=[-1]), "between 0 and 39"),
        (dict(prompt=[1] * 16), "leaves no room"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(seed=2**64), "seed"),
    ],
)
def test_what_is_no_request_is_refused_and_takes_no_ticket(wrong, said):
    server = Server(model_of("mha"), 1, max_len=16)
    with pytest.raises(ValueError, match=said):
        server.submit(**dict(prompt=[1]) | wrong)
    assert not server.busy and server.submit([1]) == 0
    with pytest.raises(KeyError, match="ticket=3"):
        server.cancel(3)
    assert server.cancel(0).tolist() == [1] and server.step() == {}


def test_damaged_weights_are_named():
    model = model_of("mha")
    server = Server(model, 1)
    server.submit([1])
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(MoemlaError, match="not finite"):
        server.step()


# ---- what a step reads


def test_experts_read_is_the_mean_of_even_choices():
    draw = torch.Generator().manual_seed(0)
    for e, k, rows in ((4, 2, 3), (62, 6, 16), (5, 5, 2), (8, 1, 1)):
        chosen = torch.rand(4000, rows, e, generator=draw).topk(k).indices.flatten(1)
        seen = torch.zeros(4000, e).scatter(1, chosen, 1.0).sum(1)
        error = seen.std().item() / 4000**0.5
        assert abs(experts_read(e, k, rows) - seen.mean().item()) <= 4 * error + 1e-9
    assert [experts_read(4, 2, rows) for rows in range(4)] == [0.0, 2.0, 3.0, 3.5]
    assert experts_read(0, 0, 3) == 0.0
    with pytest.raises(ValueError, match="rows=-1"):
        experts_read(4, 2, -1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_step_bytes_are_those_of_the_built_model(variant, tied):
    """Weights: all but experts and what is looked up line by line; the cache: as large as one that is full."""
    model = model_of(variant, tie_embeddings=tied).float()
    config, read = model.config, step_bytes(model.config, 3, 9, dtype_bytes=4)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    looked_up = [name for name in sizes if name.startswith("position") or (name == "embedding.weight" and not tied)]
    routed = [name for name in sizes if "experts.w_" in name]
    assert read.weights == sum(sizes.values()) - sum(sizes[name] for name in (*looked_up, *routed))
    assert read.cache == model.new_cache(3, 9).nbytes == 27 * complexity.cache_bytes_per_token(config, 4)
    share = 1 - (1 - 2 / 6) ** 3 if routed else 0.0
    assert read.experts == pytest.approx(share * sum(sizes[name] for name in routed))
    assert read.total == read.weights + read.experts + read.cache
    for wrong in (dict(rows=-1, held=0), dict(rows=0, held=-1)):
        with pytest.raises(ValueError, match="0 or more"):
            step_bytes(config, **wrong)


# ---- the bench


def test_forms_differ_in_attention_alone():
    config = model_of("moe-mha").config
    forms = {name: form(config, name) for name in FORMS}
    held = {name: complexity.cache_bytes_per_token(c) for name, c in forms.items()}
    full = held["mha-rope"]
    assert held == {"mha-rope": full, "gqa-rope": full // 4, "mla-rope": full // 2, "mla-decoupled": full * 3 // 8}
    keep = ("d_model", "n_layers", "n_experts", "top_k", "d_expert", "n_shared", "vocab_size", "ffn")
    assert len({tuple(getattr(c, name) for name in keep) for c in forms.values()}) == 1
    with pytest.raises(ValueError, match="name='mqa'"):
        form(config, "mqa")


def test_bench_serving_measures_every_form_at_every_length():
    rows = bench_serving(model_of("moe-mla-rope").config, (3, 50), 2, seconds=0.0)
    assert [row.case for row in rows[::4]] == ["serve rows=2 held=3", "serve rows=2 held=50"]
    assert [row.program for row in rows] == 2 * list(FORMS)
    assert all(row.tokens == 2 and row.seconds > 0 and row.limit > 0 for row in rows)
