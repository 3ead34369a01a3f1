"""A server writes what `generate` writes for each alone, computes nobody who is not there, and counts what it reads."""

import random
import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moemla
from moemla import complexity
from moemla.config import ModelConfig
from moemla.errors import MoemlaError
from moemla.model import LanguageModel
from moemla.serving import Server, experts_read, step_bytes, step_flops
from moemla.serving_bench import FORMS, bench_serving, form

VARIANTS = ("mha", "gqa-rope", "mla-rope", "mla-decoupled", "moe-mla-rope")
STOP = 7


def model_of(variant: str, **changes) -> LanguageModel:
    sizes = dict(n_layers=2, d_model=32, n_heads=4, vocab_size=40, max_seq_len=32)
    if variant.startswith("moe"):
        sizes |= dict(n_experts=6, n_shared=1, top_k=2, d_expert=8)
    sizes |= {name: value for name, value in changes.items() if value != ""}
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
    server = Server(model, slots)
    wanted = {}
    for n, prompt in enumerate(asked):
        new = (3, 9, 40)[n % 3]
        wanted[server.submit(prompt, new, seed=n, stop=STOP)] = alone(model, prompt, new, n, stop=STOP)
    told = {ticket: story.tolist() for ticket, story in server.run().items()}
    assert told == wanted and list(told) == sorted(told)
    lengths = {len(story) - len(prompt) for story, prompt in zip(wanted.values(), asked, strict=True)}
    assert len(lengths) > 3 and not server.busy and "0 to be taken" in repr(server)


def test_in_float32_too_and_with_the_seeds_of_a_batch():
    """The default seed is the ticket, as `generate` counts rows; what it writes in one batch is written here."""
    model = model_of("moe-mla-rope").float()
    server = Server(model, 3)
    for prompt in prompts(6, 2):
        server.submit(prompt, 9)
    told = [story.tolist() for story in server.run().values()]
    assert told == [story.tolist() for story in moemla.generate(model, prompts(6, 2), 9)]
    again = Server(model, 2)
    for _ in range(3):
        again.submit([1, 2], 12)
    assert len({tuple(story.tolist()) for story in again.run().values()}) == 3  # no copies of one draw


def test_each_story_has_its_own_sampling():
    model, asked = model_of("mla-rope"), prompts(8, 1)
    kinds = dict(temperature=0), dict(temperature=1.3, top_k=None, top_p=0.7), dict(top_k=3), dict(stop=STOP)
    server = Server(model, 3)
    tickets = [server.submit(prompt, 8, seed=5 + n, **kinds[n % 4]) for n, prompt in enumerate(asked)]
    told = server.run()
    for n, ticket in enumerate(tickets):
        assert told[ticket].tolist() == alone(model, asked[n], 8, 5 + n, **kinds[n % 4])


@pytest.mark.parametrize("seed", range(4))
def test_requests_may_come_and_go_at_any_time(seed):
    """Submitted between steps, taken out between steps: the others do not notice, and each end is told."""
    draw, model = random.Random(seed), model_of("moe-mla-rope")
    server, asked, wanted, told, gone, over = Server(model, 3), prompts(15, seed), {}, {}, set(), {}
    while asked or server.busy:
        for _ in range(min(len(asked), draw.randint(0, 2))):
            prompt, new = asked.pop(), draw.randint(1, 15)
            ticket = server.submit(prompt, new, seed=len(asked), stop=STOP)
            wanted[ticket], told[ticket] = alone(model, prompt, new, len(asked), stop=STOP), list(prompt)
        there = [ticket for ticket in wanted if ticket not in gone and ticket not in over]
        if there and draw.random() < 0.15:
            ticket = draw.choice(there)
            gone.add(ticket)
            cut = server.cancel(ticket).tolist()
            assert cut == told[ticket] == wanted[ticket][: len(cut)]
            with pytest.raises(KeyError, match=f"ticket={ticket}"):
                server.cancel(ticket)
        for ticket, (token, end) in server.step().items():
            told[ticket].append(token)
            if end is not None:
                over[ticket] = end
                assert end == ("stop" if token == STOP else "length")
                assert server.take(ticket).tolist() == told[ticket] == wanted[ticket]
    assert gone and "length" in over.values()
    assert gone | set(over) == set(wanted) and server.run() == {}


def test_nobody_is_computed_who_is_not_there(monkeypatch):
    """Steps have a row for each story; a prompt is computed once, but for its last token, without padding."""
    model, steps, filled = model_of("mha"), [], []
    original, features = model.next_logits, model.features

    def counted(tokens, cache):
        steps.append(len(tokens))
        return original(tokens, cache)

    def counted_features(tokens, cache=None, lengths=None):
        filled.append(tokens.numel())
        return features(tokens, cache=cache, lengths=lengths)

    monkeypatch.setattr(model, "next_logits", counted)
    monkeypatch.setattr(model, "features", counted_features)
    server, asked = Server(model, 4), prompts(9)
    news = [2, 9, 3, 8, 1, 7, 2, 2, 5]
    for prompt, new in zip(asked, news, strict=True):
        server.submit(prompt, new)
    server.run()
    assert sum(steps) == sum(news) and max(steps) == 4
    assert sum(filled) == sum(steps) + sum(len(prompt) - 1 for prompt in asked)
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


# ---- when something goes wrong


@pytest.mark.parametrize("where", ["features", "next_logits", "draw"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_costs_no_story(monkeypatch, where, error):
    """In a prompt, in the pass, between two rows' draws: the step is taken again, and nobody notices."""
    model, asked = model_of("moe-mla-rope"), prompts(6, 4)
    server = Server(model, 2)
    for n, prompt in enumerate(asked):
        server.submit(prompt, 7, seed=n)
    broken, calls = {"draw": (torch, "multinomial")}.get(where, (model, where)), []
    original = getattr(*broken)

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) % 3 == 2:
            raise error("now")
        return original(*args, **kwargs)

    monkeypatch.setattr(*broken, fails)
    failed = 0
    while server.busy:
        try:
            server.step()
        except error:
            failed += 1
    monkeypatch.undo()
    assert failed > 2
    told = server.run()
    assert [told[n].tolist() for n in range(6)] == [alone(model, prompt, 7, n) for n, prompt in enumerate(asked)]


def test_a_prompt_that_was_broken_off_leaves_nothing_behind(monkeypatch):
    """Its numbers were written and are not finite, and it is cancelled before it has a row."""
    model, how = model_of("mla-rope", tie_embeddings=False), dict(temperature=0, stop=9)
    torch.nn.init.constant_(model.embedding.weight.data[9], torch.nan)
    server, features = Server(model, 2), model.features
    server.submit([1, 2], 14, **how)
    server.step()
    bad = server.submit([1] * 3 + [9] * 8, 12, **how)
    monkeypatch.setattr(model, "features", lambda *args, **kwargs: [features(*args, **kwargs), 1 / 0])
    with pytest.raises(ZeroDivisionError):
        server.step()
    monkeypatch.undo()
    server.cancel(bad)
    other = server.submit([3], 12, **how)
    assert server.run()[other].tolist() == alone(model, [3], 12, 0, **how)


@pytest.mark.parametrize("place", [0, 1])
def test_a_story_that_is_not_finite_is_named_and_leaves_nothing_behind(place):
    """The others go on when it is cancelled, also in its slot."""
    model, how = model_of("mla-rope", tie_embeddings=False), dict(temperature=0, stop=9)
    torch.nn.init.constant_(model.embedding.weight.data[9], torch.nan)
    server, asked = Server(model, 2), {1 - place: ([1, 2], 12), 2: ([3], 2), 3: ([3, 4, 5, 6, 7], 12)}
    for ticket in (0, 1):
        server.submit([1] * 3 + [9] * 8 if ticket == place else [1, 2], 12, **how)
    with pytest.raises(MoemlaError, match=rf"tickets \[{place}\] are not finite"):
        server.step()
    assert server.cancel(place).tolist() == [1] * 3 + [9] * 8
    for ticket in (2, 3):
        assert server.submit(*asked[ticket], **how) == ticket
    told = server.run()
    assert {ticket: story.tolist() for ticket, story in told.items()} == {
        ticket: alone(model, prompt, new, 0, **how) for ticket, (prompt, new) in asked.items()
    }


def test_threads_wait_and_hooks_are_refused():
    model = model_of("mha")
    server, wanted = Server(model, 3), {}

    def work():
        while server.busy:
            server.step()

    for n, prompt in enumerate(prompts(12, 6)):
        wanted[server.submit(prompt, 6, seed=n)] = alone(model, prompt, 6, n)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {ticket: story.tolist() for ticket, story in server.run().items()} == wanted

    ticket = server.submit([1], 2)
    hook = model.norm.register_forward_hook(lambda *_: server.cancel(ticket))
    with pytest.raises(RuntimeError, match="a step is under way"):
        server.step()
    hook.remove()
    assert server.run()[ticket].tolist() == alone(model, [1], 2, ticket)


def test_the_callers_model_keeps_its_mode_and_the_cache_its_size():
    model = model_of("moe-mla-rope").train()
    server = Server(model, 2, max_len=20)
    before = server.cache.nbytes
    server.submit([1, 2], 50)
    (story,) = server.run().values()
    assert model.training and server.cache.nbytes == before and len(story) == 20
    model.requires_grad_()(story[None]).sum().backward()  # what is handed out may be trained on
    with torch.inference_mode():
        waiting = server.cancel(server.submit([1, 2]))
    model(waiting[None]).sum().backward()
    assert Server(model, 1, dtype=torch.bfloat16).cache.buffers[0].dtype == torch.bfloat16
    assert moemla.Server is Server


@pytest.mark.parametrize("wrong", [dict(slots=0), dict(max_len=0), dict(max_len=1), dict(max_len=33)])
def test_what_is_no_server_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Server(model_of("mha"), **dict(slots=2) | wrong)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(prompt=[]), "at least one token"),
        (dict(prompt=[40]), "between 0 and 39"),
        (dict(prompt=[-1]), "between 0 and 39"),
        (dict(prompt=[1] * 16), "of 16 tokens leaves no room for more in max_len=16"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(seed=2**64), "seed"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(stop=40), "stop=40"),
    ],
)
def test_what_is_no_request_is_refused_and_takes_no_ticket(wrong, said):
    server = Server(model_of("mha"), 1, max_len=16)
    with pytest.raises(ValueError, match=said):
        server.submit(**dict(prompt=[1]) | wrong)
    assert not server.busy and server.submit([1]) == 0
    for call in (server.cancel, server.take):
        with pytest.raises(KeyError, match="ticket=3"):
            call(3)
    with pytest.raises(KeyError, match="ticket=0"):
        server.take(0)  # it waits
    assert server.cancel(0).tolist() == [1] and server.step() == {}


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
    for wrong, said in (((4, 2, -1), "rows=-1"), ((4, 5, 1), "top_k=5"), ((4, -1, 1), "top_k=-1")):
        with pytest.raises(ValueError, match=said):
            experts_read(*wrong)


CHANGES = (dict(), dict(tie_embeddings=False), dict(n_dense_layers=1), dict(rope_learnable=True), dict(bias=False))


@pytest.mark.parametrize("variant", [*VARIANTS, "hybrid"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_bytes_are_those_of_the_built_model(variant, changes, dtype):
    """Weights: all but experts and what is looked up line by line; the cache: as large as one that is full."""
    lacks = {"n_dense_layers": not variant.startswith("moe"), "rope_learnable": variant == "mha"}
    if any(lacks.get(name) for name in changes):
        pytest.skip("has none")
    changes = changes | (dict(cache="hybrid") if variant == "hybrid" else {})
    model = model_of("mla-rope" if variant == "hybrid" else variant, **changes).float().to(dtype)
    config, read = model.config, step_bytes(model.config, 3, 9, dtype_bytes=dtype.itemsize)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    tied = config.tie_embeddings
    looked_up = [name for name in sizes if name.startswith("position") or (name == "embedding.weight" and not tied)]
    routed = [name for name in sizes if "experts.w_" in name]
    assert bool(routed) == variant.startswith("moe")
    assert read.weights == sum(sizes.values()) - sum(sizes[name] for name in (*looked_up, *routed))
    assert read.cache == model.new_cache(3, 9).nbytes == 27 * complexity.cache_bytes_per_token(config, dtype.itemsize)
    share = 1 - (1 - 2 / 6) ** 3 if routed else 0.0
    assert read.experts == pytest.approx(share * sum(sizes[name] for name in routed))
    assert read.total == read.weights + read.experts + read.cache
    for wrong in (dict(rows=0, held=0), dict(rows=1, held=-1), dict(rows=1, held=0, dtype_bytes=0)):
        with pytest.raises(ValueError, match="must be"):
            step_bytes(config, **wrong)


@pytest.mark.parametrize("variant", ["mha", "gqa-rope", "mla-rope", "hybrid", "mla-decoupled"])
def test_step_flops_are_those_of_a_step(variant):
    """Counted by torch while it computes one; the decoupled form's mix has d_rope numbers too many, which are cut."""
    model = model_of("mla-rope" if variant == "hybrid" else variant, cache="hybrid" if variant == "hybrid" else "")
    config, seen = model.config, []
    for held in (4, 11):
        cache = model.new_cache(2, 12)
        cache.lengths = [held, held]
        with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.next_logits(torch.ones(2, 1, dtype=torch.long), cache)
        extra = config.n_heads * config.d_rope if variant == "mla-decoupled" else 0
        seen.append(counted.get_total_flops() - 4 * config.n_layers * (held + 1) * extra)
    assert seen[1] - seen[0] == step_flops(config, 2, 11) - step_flops(config, 2, 4)


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
    assert form(model_of("mla-decoupled", d_model=72, n_heads=9, d_value=16).config, "gqa-rope").n_kv_heads == 1


def test_bench_serving_measures_every_form_at_every_length():
    rows = bench_serving(model_of("moe-mla-rope").config, (3, 50), 2, seconds=0.0)
    assert [row.case for row in rows[::4]] == ["serve rows=2 held=3", "serve rows=2 held=50"]
    assert [row.program for row in rows] == 2 * list(FORMS)
    assert all(row.tokens == 2 and row.seconds > 0 and row.limit > 0 for row in rows)
    with pytest.raises(ValueError, match="lengths"):
        bench_serving(model_of("mha-rope").config, ())
