"""What is checked of each chapter: what its class takes, what it has to equal, and the lines it goes through.

The tests run these lines on the library's own layers and on the chapters', `moemla check` on a reader's file. A line is
a label and a check; where its subject has nothing for it, it is no line of that subject, or left out with a reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from moemla.attention import MultiHeadAttention
from moemla.cache import HybridCache, JointLatentCache, KVCache, LatentCache
from moemla.checks import attention, balancing, building, experts, model, rope, tiles
from moemla.checks.building import TIMED, WIDE, Kind, Wanted, turning
from moemla.checks.compare import normal, time_ratio
from moemla.checks.finding import Missing, Reader
from moemla.checks.subjects import Function, there_and_back
from moemla.experts import loop
from moemla.latent_attention import DecoupledLatentAttention, MultiHeadLatentAttention
from moemla.rope import RotaryEmbedding


@dataclass(frozen=True)
class Line:
    """A label and the check behind it.

    unless(subject): "" where there is something to check, else why the line is left out, or None where it is no line.
    """

    label: str
    check: Callable
    unless: Callable[..., str | None] = lambda subject: ""


def needs(name: str, otherwise: str | None = None) -> Callable:
    """Only for subjects that have something under a name."""
    return lambda subject: "" if getattr(subject, name) else otherwise


def is_not(*keys: str) -> Callable:
    """Only for functions of another key."""
    return lambda subject: None if subject.key in keys else ""


def only(name: str, wanted: bool) -> Callable:
    """Only for subjects of which something is true, or false."""
    return lambda subject: "" if getattr(subject, name) is wanted else None


EQUAL = (
    Line("outputs equal the library's", lambda s: s.equals("outputs"), needs("oracles")),
    Line("gradients equal the library's", lambda s: s.equals("gradients"), needs("oracles")),
)
TIME = (Line("time of a pass with gradients", lambda s: s.time(), needs("oracles")),)

ATTENTION = (
    *EQUAL,
    Line("no output sees a later input", lambda s: attention.causal(s.filled(), s.width)),
    Line("rows of a batch do not meet", lambda s: attention.rows_apart(s.filled(), s.width)),
    Line("the past is a set", lambda s: attention.past_is_a_set(s.filled(), s.width), only("rotary", False)),
    Line("order and distance count", lambda s: rope.order_and_distance(s.filled(), s.width), only("rotary", True)),
)

STEPS = (
    Line("a prompt and steps equal one pass", lambda s: attention.steps_equal_one_pass(*s.going(), s.width)),
    Line(
        "rows of unequal length equal each alone",
        lambda s: attention.unequal_rows(*s.going(), s.width),
        needs("ragged", "it takes no lengths"),
    ),
    Line("a full cache refuses more", lambda s: attention.refuses_when_full(s.going()[1], s.width), needs("numbers")),
    Line("a cache refuses other rows", lambda s: attention.refuses_other_rows(*s.going(), s.width), needs("numbers")),
    Line(
        "bytes held by the cache",
        lambda s: attention.bytes_held(s.going()[1], s.width, s.numbers),
        needs("numbers"),
    ),
    Line(
        "a step copies no past",
        lambda s: attention.copies_no_past(s.going()[1], s.width, s.absorbed, past=400),
        needs("absorbed"),
    ),
)

ROTATION = (
    Line("turns the pairs of eq. 9", lambda s: rope.turns_the_pairs(s.make("halves"))),
    Line(
        "turns neighbours in the interleaved layout",
        lambda s: rope.turns_the_pairs(s.make("interleaved"), layout="interleaved"),
        lambda s: "" if "interleaved" in s.layouts else "it takes no layout",
    ),
    Line("scores depend on the distance alone", lambda s: rope.scores_by_distance(s.make("halves"))),
    Line(
        "the layouts differ by a permutation",
        lambda s: rope.layouts_differ_by_a_permutation(s.make("halves"), s.make("interleaved")),
        lambda s: "" if "interleaved" in s.layouts else None,
    ),
)

RAGGED = 10  # a width that is no power of two
TURNED = (
    Line("turns the pairs of eq. 9", lambda s: rope.turns_the_pairs(s.make("halves"), width=RAGGED)),
    Line("turns the rows of every tile", lambda s: tiles.turns_every_tile(s.make("halves"), width=RAGGED)),
    Line("scores depend on the distance alone", lambda s: rope.scores_by_distance(s.make("halves"), width=RAGGED)),
)

ROUTE = (
    Line("the k largest are chosen", lambda s: experts.chooses_the_largest(s.call, s.scores, s.biased)),
    Line("gates are shares of the chosen scores", lambda s: experts.gates_are_shares(s.call, s.scores, s.biased)),
    Line(
        "a bias chooses and does not weigh",
        lambda s: experts.bias_only_chooses(s.call),
        needs("biased", "it takes no bias"),
    ),
    Line(
        "experts in another order change nothing",
        lambda s: experts.permuting_experts_permutes_the_routing(s.call, s.biased),
    ),
)

TILED = (
    *ROUTE,
    Line("routes the tokens of every tile", lambda s: tiles.routes_every_tile(s.call)),
    Line("of equal scores it takes different experts", lambda s: tiles.equals_are_all_different(s.call)),
)


def time_of_experts(subject: Function) -> dict[str, float]:
    """The outputs' and the gradients' time, beside the library's loop; more experts show what `W[e]` costs."""
    d, e, k, f = TIMED.values()
    with torch.random.fork_rng(devices=()):
        x, w_in, w_out = normal(256, d), normal(e, d, f).requires_grad_(), normal(e, f, d).requires_grad_()
        index = torch.rand(256, e).topk(k).indices
    tensors = (x, w_in, w_out, index, torch.full(index.shape, 1 / k, dtype=WIDE))
    calls = (subject.call, partial(loop, activation="gelu"))
    return time_ratio(*(partial(there_and_back, call, *tensors) for call in calls))


DISPATCH = (
    Line("equals the loop, gradients too", lambda s: experts.equals_loop(s.call)),
    Line("experts in another order change nothing", lambda s: experts.permuting_experts_changes_nothing(s.call)),
    Line("time of a pass with gradients", time_of_experts),
)

MIXTURE = (
    *EQUAL,
    Line("each token is seen alone", lambda s: model.tokens_apart(s.filled(), s.width)),
    Line("padding changes nothing", lambda s: s.padding(), needs("padded", "it takes no valid")),
    Line("without shared experts it is chapter 6's", lambda s: s.equals("outputs", n_shared=0), only("shared", True)),
    *TIME,
)

RULE = (
    Line("equals the library's rule", lambda s: balancing.equals_rule(s.call, s.key)),
    Line("lifts the less loaded", lambda s: balancing.lifts_the_less_loaded(s.call), is_not("quantile", "none")),
    Line("a shift of all biases stays one", lambda s: balancing.shift_stays_a_shift(s.call, name=s.key)),
    Line(
        "experts in another order get the same biases",
        lambda s: balancing.permuting_experts_permutes_the_bias(s.call, name=s.key),
    ),
    Line(
        "balances a skewed router",
        lambda s: balancing.balances(s.call, 0.5 if s.key == "quantile" else 0.02, s.key),
        is_not("equation-4", "none"),  # eq. 4 never does
    ),
)
PARTS = (
    Line("the parts of a step count as one", lambda s: balancing.parts_count_as_one(s.call)),
    Line("the bias is moved in place", lambda s: balancing.moves_in_place(s.make)),
    Line("counts are forgotten after a step", lambda s: balancing.forgets_the_counts(s.make)),
)
SWITCH = (Line("equals the library's, gradients too", lambda s: balancing.equals_switch_loss(s.call)),)
SHARED = (Line("equals one wide layer", lambda s: experts.shared_equal_one_layer(s.call)),)


# ---- what each chapter builds

SIZES = dict(d_model=32, n_heads=4)
LATENT = SIZES | dict(latent_dim=12)


def of(layer: type, **values) -> tuple[Callable, ...]:
    """A layer of the library with biases, and one without."""
    return tuple(partial(layer, bias=bias, dtype=WIDE, **values) for bias in (True, False))


def with_rope(layer: type, width: int, layout: str, **values) -> tuple[Callable, ...]:
    """The same with a rotation."""
    return tuple(
        lambda make=make: make(rope=RotaryEmbedding(width, building.POSITIONS, layout=layout, dtype=WIDE))
        for make in of(layer, **values)
    )


def held(cache: type, **sizes) -> Callable:
    """The library's cache, for so many rows and tokens."""
    return lambda rows, max_len: cache(batch_size=rows, max_len=max_len, dtype=WIDE, **sizes)


def kept_as(*names: str) -> Wanted:
    """The class of a cache."""
    return Wanted(names, "class", building.CACHE)


HEADS = Kind(
    Wanted(("CausalAttention", "MultiHeadAttention"), "layer", f"d_model n_heads {building.LAYER}"),
    lambda reader: SIZES,
    of(MultiHeadAttention, **SIZES),
    kept_as("Cache", "KVCache"),
    held(KVCache, n_kv_heads=4, d_head=8),
    numbers=64,
    steps=("step",),
)
LATENTS = Kind(
    Wanted(("LatentAttention", "MultiHeadLatentAttention"), "layer", f"d_model n_heads latent_dim {building.LAYER}"),
    lambda reader: LATENT,
    of(MultiHeadLatentAttention, **LATENT),
    kept_as("Latents", "LatentCache"),
    held(LatentCache, latent_dim=12),
    numbers=24,
    absorbed=12,
    steps=("step_rebuilt", "step_absorbed", "step"),
)
PAPER = Kind(
    Wanted(
        ("RotaryLatentAttention", "MultiHeadLatentAttention"),
        "layer",
        f"d_model n_heads latent_dim rope hybrid? {building.LAYER}",
    ),
    lambda reader: LATENT | dict(rope=turning(reader, 8), hybrid=False),
    with_rope(MultiHeadLatentAttention, 8, "halves", **LATENT),
    kept_as("Kept", "LatentCache"),
    held(LatentCache, latent_dim=12),
    numbers=24,
    steps=("step",),
)
HYBRID = Kind(
    Wanted(("RotaryLatentAttention",), "layer", f"d_model n_heads latent_dim rope hybrid {building.LAYER}"),
    lambda reader: LATENT | dict(rope=turning(reader, 8), hybrid=True),
    PAPER.oracles,
    kept_as("Kept", "HybridCache"),
    held(HybridCache, n_heads=4, d_head=8, latent_dim=12),
    numbers=44,
    steps=("step",),
    mark=", hybrid,",
)
DECOUPLED = Kind(
    Wanted(
        ("DecoupledAttention", "DecoupledLatentAttention"),
        "layer",
        f"d_model n_heads latent_dim d_nope d_value rope {building.LAYER}",
    ),
    lambda reader: LATENT | dict(d_nope=6, d_value=10, rope=turning(reader, 4, "interleaved")),
    tuple(
        make
        for layout in ("interleaved", "halves")  # where a file's rotation has no layout to choose, it is halves
        for make in with_rope(DecoupledLatentAttention, 4, layout, d_nope=6, d_value=10, **LATENT)
    ),
    kept_as("Kept", "JointLatentCache"),
    held(JointLatentCache, latent_dim=12, d_rope=4),
    numbers=16,
    absorbed=12,
    steps=("step",),
)
ROUTED = Wanted(("MixtureOfExperts", "FineGrainedExperts"), "layer", "d_model n_experts top_k d_expert n_shared?")
WITH_SHARED = Wanted(("MixtureOfExperts", "SharedExperts"), "layer", "d_model n_experts top_k d_expert n_shared")


@dataclass(frozen=True)
class Part:
    """Something that a chapter builds: what is looked for, how subjects are made of it, and their lines.

    needed: whether a file without it fails.
    """

    name: str
    wanted: tuple[Wanted, ...]
    subjects: Callable[[Reader], list]
    lines: tuple[Line, ...]
    needed: bool = True


def one(wanted: Wanted, subjects: Callable, lines: tuple[Line, ...], needed: bool = True) -> Part:
    """A part that is one class or function."""
    return Part(wanted.name, (wanted,), subjects, lines, needed)


def layer_of(kind: Kind, needed: bool = True) -> Part:
    """A layer of attention."""
    return one(kind.wanted, kind.layers, (*ATTENTION, *TIME), needed)


def steps_of(kind: Kind, needed: bool = True) -> Part:
    """Its steps with a cache."""
    return Part(
        f"steps of {kind.wanted.name}{kind.mark}".rstrip(","),
        (Wanted(kind.steps, "function", building.STEP), kind.cache),
        kind.kept,
        STEPS,
        needed,
    )


CHAPTERS: dict[int, tuple[Part, ...]] = {
    2: (layer_of(HEADS), steps_of(HEADS)),
    3: (layer_of(LATENTS), steps_of(LATENTS)),
    4: (
        one(building.ROPE, building.rotations, ROTATION),
        layer_of(PAPER),
        steps_of(PAPER),
        steps_of(HYBRID, needed=False),
        layer_of(DECOUPLED, needed=False),
        steps_of(DECOUPLED, needed=False),
    ),
    6: (
        one(building.ROUTE, building.choices, ROUTE),
        one(building.EXPERTS, partial(building.functions, building.EXPERTS), DISPATCH, needed=False),
        one(ROUTED, partial(building.mixtures, ROUTED), MIXTURE),
    ),
    7: (
        one(WITH_SHARED, partial(building.mixtures, WITH_SHARED, n_shared=2), MIXTURE),
        one(building.SHARED, partial(building.functions, building.SHARED), SHARED, needed=False),
    ),
    8: (
        *(
            one(building.wanted_rule(key), partial(building.rules, key), RULE, needed=key == "sign")
            for key in building.RULES
        ),
        one(building.BALANCER, building.balancers, PARTS, needed=False),
        one(building.SWITCH, building.switch_losses, SWITCH, needed=False),
        one(building.ROUTE, building.choices, ROUTE, needed=False),
    ),
    10: (
        one(building.ROPE, partial(building.rotations, width=RAGGED), TURNED),
        one(building.ROUTE, building.choices, TILED),
    ),
}


def looked_for(number: int) -> dict[str, bool]:
    """What a chapter's file may hold, as it is written in Python, and whether it has to."""
    shown: dict[str, bool] = {}
    for part in CHAPTERS[number]:
        for wanted in part.wanted:
            shown[wanted.shown] = shown.get(wanted.shown, False) or part.needed
    return shown


@dataclass(frozen=True)
class Todo:
    """A line of a report before it is run: check() runs it; without one, `said` is why.

    `missing` is true of what the file lacks and the chapter needs.
    """

    label: str
    check: Callable | None = None
    said: str = ""
    missing: bool = False


def todo(number: int, reader: Reader) -> Iterator[Todo]:
    """What is checked of a file for a chapter, line by line, in the order of the chapter.

    An exception of the file's own, where something is built, is raised by the check of the line that it stops.
    """
    without: set[str] = set()
    for part in CHAPTERS[number]:
        try:
            subjects = part.subjects(reader)
        except Missing as error:
            if str(error) not in without:
                yield Todo(part.name, said=str(error) if part.needed else error.quietly, missing=part.needed)
            without.add(str(error))
        except (Exception, SystemExit) as error:
            yield Todo(part.name, partial(_raise, error))
        else:
            for subject in subjects:
                yield from lines_of(subject, part.lines)


def lines_of(subject: object, lines: tuple[Line, ...]) -> Iterator[Todo]:
    """The lines of one subject."""
    for line in lines:
        label = f"{subject.name}: {line.label}"
        try:
            reason = line.unless(subject)
        except (Exception, SystemExit) as error:
            yield Todo(label, partial(_raise, error))
            continue
        if reason is not None:
            yield Todo(label, None if reason else partial(line.check, subject), reason)


def _raise(error: BaseException) -> None:
    raise error
