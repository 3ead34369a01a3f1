"""The lines of a report of `moemla check`: a label and a check, by what they are run on.

Where a subject has nothing for a line, it is no line of that subject, or left out with a reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from moemla.checks import attention, balancing, decode, experts, grouped, model, rope, serving, tiles
from moemla.checks.building import TIMED, WIDE
from moemla.checks.compare import normal, time_ratio
from moemla.checks.subjects import Function, there_and_back
from moemla.experts import loop


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

SORTED = (
    Line("slots stand by expert, in their order", lambda s: grouped.sorts_by_expert(s.call)),
    Line("place and offsets say where", lambda s: grouped.says_where(s.call)),
)
GROUPED = (
    Line("equals the loop where tiles are ragged, gradients too", lambda s: grouped.equals_loop_in_tiles(s.call)),
    Line("takes tokens that are a view, and the gradient of a sum", lambda s: grouped.takes_views(s.call)),
    Line("an expert that nobody takes gets zeros", lambda s: grouped.nobodys_expert_gets_zeros(s.call)),
    Line("experts in another order change nothing", lambda s: grouped.experts_in_another_order(s.call)),
    Line("gives the same bits again", lambda s: grouped.same_bits_again(s.call)),
)

MIXTURE = (
    *EQUAL,
    Line("each token is seen alone", lambda s: model.tokens_apart(s.filled(), s.width)),
    Line("padding changes nothing", lambda s: s.padding(), needs("padded", "it takes no valid")),
    Line("without shared experts it is chapter 6's", lambda s: s.equals("outputs", n_shared=0), only("shared", True)),
    *TIME,
)


def decode_lines(kind: str) -> tuple[Line, ...]:
    """Those of a decode over a "joint" cache, or over "latent" ones."""
    return (
        Line("equals one softmax over all slots", lambda s: decode.equals_one_softmax(s.call, kind)),
        Line("rows see their own slots alone", lambda s: decode.rows_end_where_they_end(s.call, kind)),
        Line("caches may be views", lambda s: decode.takes_views(s.call, kind)),
        Line("large scores do not overflow", lambda s: decode.large_scores(s.call, kind)),
        Line(
            "any piece and any tile give the same",
            lambda s: decode.any_cut(s.call, kind),
            needs("key", "it takes no piece and no block"),
        ),
    )


ONLINE = (Line("equals one softmax, whatever the order", lambda s: decode.online_softmax(s.call)),)
MERGE = (Line("weighs pieces by their exponentials", lambda s: decode.merges_pieces(s.call)),)

SERVE = (
    Line("each story is the one written alone", lambda s: serving.equals_each_alone(s.call)),
    Line("a story ends at its stop token, or at its number", lambda s: serving.ends_where_it_ends(s.call)),
    Line("no call has more rows than slots", lambda s: serving.computes_no_more_rows(s.call)),
    Line("a free slot is taken at once", lambda s: serving.takes_free_slots(s.call)),
    Line("the past is not computed again", lambda s: serving.computes_no_past(s.call)),
    Line("prompts in another order get the same stories", lambda s: serving.order_is_theirs(s.call)),
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
