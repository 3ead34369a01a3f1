"""What is checked of each chapter: what its class takes, what it has to equal, and the lines it goes through.

The tests run these lines on the library's own layers and on the chapters', `moemla check` on a reader's file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from moemla.attention import MultiHeadAttention
from moemla.cache import HybridCache, JointLatentCache, KVCache, LatentCache
from moemla.checks import building
from moemla.checks.building import WIDE, Kind, Wanted, turning
from moemla.checks.finding import Missing, Reader
from moemla.checks.lines import (
    ATTENTION,
    DISPATCH,
    GROUPED,
    MERGE,
    MIXTURE,
    ONLINE,
    PARTS,
    RAGGED,
    ROTATION,
    ROUTE,
    RULE,
    SERVE,
    SHARED,
    SORTED,
    STEPS,
    SWITCH,
    TILED,
    TIME,
    TURNED,
    Line,
    decode_lines,
)
from moemla.latent_attention import DecoupledLatentAttention, MultiHeadLatentAttention
from moemla.rope import RotaryEmbedding

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
    11: (
        one(building.SORTED, building.sorters, SORTED),
        one(building.TILES, partial(building.functions, building.TILES), GROUPED),
    ),
    12: (
        one(building.JOINT, partial(building.decodes, building.JOINT), decode_lines("joint")),
        one(building.LATENT, partial(building.decodes, building.LATENT), decode_lines("latent")),
        one(building.ONLINE, partial(building.parts_of_decode, building.ONLINE), ONLINE, needed=False),
        one(building.MERGE, partial(building.parts_of_decode, building.MERGE), MERGE, needed=False),
    ),
    14: (one(building.SERVE, building.servers, SERVE),),
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
