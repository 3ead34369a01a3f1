"""From what is in a file to what the checks are run on: layers, steps, functions as the checks call them.

Each function takes a `Reader` and gives subjects; what is not there, or cannot be told, is `Missing`. A call into the
file is by the names of its parameters, and what comes back is looked at before a check sees it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moemla.balancing import switch_loss
from moemla.cache import Cache
from moemla.checks.compare import require
from moemla.checks.finding import Match, Missing, Reader, Wanted, roles_of
from moemla.checks.subjects import Attention, Balancing, Choice, Function, Mixture, Rotation
from moemla.moe import MixtureOfExperts
from moemla.rope import RotaryEmbedding
from moemla.routing import Router, Routing

WIDE = torch.float64
POSITIONS = 512
CACHE = "max_len batch_size? n_layers? n_heads? n_kv_heads? d_head? d_model? latent_dim? d_rope? dtype? device?"
LAYER = "max_len|max_seq_len? dropout?"  # what many layers take besides
FORWARD = "* cache|kept|kv_cache? absorb? lengths?"
STEP = "layer * cache|kept|kv_cache lengths?"
ROPE = Wanted(("Rope", "RotaryEmbedding"), "class", "width max_seq_len? layout?", "* positions|position|pos")
ROUTE = Wanted(("route",), "function", "logits bias? top_k|k scores?")
EXPERTS = Wanted(("experts",), "function", "x w_in w_out index gate activation?")
SHARED = Wanted(("shared",), "function", "x w_in w_out activation?")
SORTED = Wanted(("dispatch", "sort_slots"), "function", "index n_experts|e block|block_m?")
TILES = Wanted(("routed", "experts"), "function", "x w_in w_out index gate activation? block|block_m?")
JOINT = Wanted(("joint_decode",), "function", "q joint lengths rank scale piece? block?")
LATENT = Wanted(
    ("latent_decode",),
    "function",
    "q k_latent v_latent weight bias? cos sin lengths interleaved? scale piece? block?",
)
ONLINE = Wanted(("online",), "function", "scores values block")
MERGE = Wanted(("merge",), "function", "means logs")
SERVE = Wanted(("serve",), "function", "model prompts new|max_new_tokens slots stop")
BALANCER = Wanted(("Balancer",), "class", "model rule? rate?")
SWITCH = Wanted(("switch_loss",), "function", "probabilities index")
SWITCH_OF_ROUTING = Wanted(("switch_loss",), "function", "routing")
TIMED = dict(d_model=64, n_experts=24, top_k=4, d_expert=16)  # no two weights of one shape, shared ones included


def a_tensor(out: object, what: str) -> Tensor:
    """What came back, if it is a tensor."""
    require(isinstance(out, Tensor), f"{what} gives {type(out).__name__}, not a tensor")
    return out


def built(match: Match, **values) -> nn.Module:
    """A layer in float64, without dropout, whose output is looked at."""
    layer = match.call(**values).double().eval()

    def looked_at(module: nn.Module, args: tuple, out: object) -> None:
        a_tensor(out, f"{match.name}.forward")

    layer.register_forward_hook(looked_at)
    return layer


# ---- chapters 2 to 4


def turning(reader: Reader, width: int, layout: str = "halves") -> Callable:
    """The file's rotation, or the library's where it has none."""
    try:
        match = reader.find(ROPE)
    except Missing:
        return RotaryEmbedding(width, POSITIONS, layout=layout, dtype=WIDE)
    rope = match.call(width=width, max_seq_len=POSITIONS, layout=layout)
    return rope.double() if isinstance(rope, nn.Module) else rope


def rotations(reader: Reader, width: int = 8) -> list[Rotation]:
    """The file's rotation, in the layouts that it has."""
    match = reader.find(ROPE)
    layouts = ("halves", "interleaved") if "layout" in match.roles else ("halves",)
    return [Rotation(match.name, lambda layout: turning(reader, width, layout), layouts)]


@dataclass(frozen=True)
class Kind:
    """A kind of attention: what is looked for, what it is built with, the library's, and what it keeps.

    values(reader) are for its constructor. `steps` are the chapter's functions; `cache` what its class may be called,
    held(rows, max_len) the library's. numbers and absorbed as in `Attention`, absorbed for steps of that name alone.
    mark: what is put behind the layer's name.
    """

    wanted: Wanted
    values: Callable[[Reader], dict]
    oracles: tuple[Callable[..., nn.Module], ...]
    cache: Wanted
    held: Callable[[int, int], Cache]
    numbers: int
    absorbed: int | None = None
    steps: tuple[str, ...] = ()
    mark: str = ""

    def layers(self, reader: Reader) -> list[Attention]:
        """The layer alone."""
        match = reader.find(self.wanted)
        besides = dict(max_len=POSITIONS, dropout=0.0)
        return [Attention(match.name, lambda: built(match, **besides, **self.values(reader)), self.oracles)]

    def kept(self, reader: Reader) -> list[Attention]:
        """The layer and each way to take a step: functions of a layer and a cache, or a forward that takes a cache."""
        (layer,) = self.layers(reader)
        forwards = self._forwards(layer)
        ways = self._functions(reader, not forwards) + forwards
        return [self._subject(reader, layer, *way) for way in ways]

    def _functions(self, reader: Reader, needed: bool) -> list[tuple[str, Callable, dict, bool]]:
        wanted = Wanted(self.steps, "function", STEP)
        chosen = [match for match in reader.fitting(wanted) if match.name in self.steps]
        if needed and not chosen:
            try:
                chosen = [reader.find(wanted)]
            except Missing as error:
                raise Missing(f"{error}, and no forward takes cache") from None
        return [(match.name, match.call, match.roles, "absorb" in match.name) for match in chosen]

    def _forwards(self, layer: Attention) -> list[tuple[str, Callable, dict, bool]]:
        roles = roles_of(layer.make().forward, FORWARD) or {}
        if "cache" not in roles:
            return []

        def call(absorb: bool | None, layer: nn.Module, **values) -> Tensor:
            values |= {} if absorb is None else {"absorb": absorb}
            named = {roles[role]: value for role, value in values.items() if role in roles and role != "*"}
            return layer(values["*"], **named)

        name = f"{layer.name}{self.mark} with a cache"
        if "absorb" not in roles:
            return [(name, partial(call, None), roles, False)]
        return [(name, partial(call, False), roles, False), (f"{name}, absorbed", partial(call, True), roles, True)]

    def _subject(
        self, reader: Reader, layer: Attention, name: str, call: Callable, roles: dict, absorbs: bool
    ) -> Attention:
        own = "layer" in roles  # a function; a forward may as well take the library's cache
        new = self._new_cache(reader, own)

        def start(layer: nn.Module, rows: int, max_len: int) -> tuple[Callable, object]:
            held = new(rows, max_len)

            def step(x: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
                told = {} if lengths is None or "lengths" not in roles else {"lengths": list(lengths)}
                taken = held[0] if isinstance(held, Cache) else held
                out = a_tensor(call(layer=layer, cache=taken, **{"*": x}, **told), name)
                if hasattr(held, "advance"):
                    held.advance(x.shape[1] if lengths is None else list(lengths))
                return out

            return step, held

        return Attention(
            name,
            layer.make,
            self.oracles,
            start=lambda layer: partial(start, layer),
            numbers=self.numbers,
            absorbed=self.absorbed if absorbs else None,
            ragged="lengths" in roles or isinstance(new(1, 1), Cache),
        )

    def _new_cache(self, reader: Reader, own: bool) -> Callable[[int, int], object]:
        try:
            match = reader.find(self.cache)
        except Missing:
            if own:
                raise
            return self.held
        widths = dict(d_head=8, n_kv_heads=4, d_rope=4, dtype=WIDE, n_layers=1) | self.values(reader)
        return lambda rows, max_len: match.call(batch_size=rows, max_len=max_len, **widths)


# ---- chapters 6 to 8


def choices(reader: Reader) -> list[Choice]:
    """route(logits, bias, top_k), whether it gives a Routing or (index, gate, ...)."""
    match = reader.find(ROUTE)

    def call(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        out = match.call(logits=logits, bias=bias, top_k=top_k, scores="sigmoid")
        pair = (out.index, out.gate) if hasattr(out, "gate") else out
        right = isinstance(pair, tuple) and len(pair) >= 2 and all(isinstance(part, Tensor) for part in pair[:2])
        right = right and not pair[0].is_floating_point()
        require(right, f"{match.name} gives {type(out).__name__}, not (index, gate) with whole numbers for the index")
        none = pair[0][(pair[0] < 0) | (pair[0] >= logits.shape[-1])]
        require(not len(none), f"{match.name} chooses expert {none[:1].tolist()} of {logits.shape[-1]}, counted from 0")
        return pair[0], pair[1]

    return [Choice(match.name, call, match.takes("bias"))]


def mixtures(wanted: Wanted, reader: Reader, n_shared: int = 0) -> list[Mixture]:
    """A layer of experts, beside the library's with sigmoid scores or with softmax."""
    match = reader.find(wanted)

    def make(**sizes) -> nn.Module:
        return built(match, **dict(n_shared=n_shared) | sizes)

    def oracle(scores: str, **sizes) -> nn.Module:
        return MixtureOfExperts(**dict(n_shared=n_shared) | sizes, scores=scores, dtype=WIDE).eval()

    sizes = dict(d_model=16, n_experts=5, top_k=2, d_expert=3)
    padded = "valid" in (roles_of(make(**sizes).forward, "* valid?") or {})
    oracles = tuple(partial(oracle, scores) for scores in ("sigmoid", "softmax"))
    return [Mixture(match.name, make, oracles, 16, sizes, TIMED, padded=padded, shared=n_shared > 0)]


def functions(wanted: Wanted, reader: Reader) -> list[Function]:
    """Every function that takes what is wanted, by its name; Missing where none does."""
    fitting = list(reader.fitting(wanted)) or [reader.find(wanted)]
    return [Function(match.name, partial(_called, match)) for match in fitting]


def _called(match: Match, *tensors: Tensor) -> Tensor:
    names = ("x", "w_in", "w_out", "index", "gate")
    return a_tensor(match.call(**dict(zip(names, tensors, strict=False)), activation="gelu"), match.name)


def sorters(reader: Reader) -> list[Function]:
    """dispatch(index, n_experts, block), which gives order, place and offsets first."""
    match = reader.find(SORTED)

    def call(index: Tensor, n_experts: int, block: int) -> tuple[Tensor, ...]:
        out = match.call(index=index, n_experts=n_experts, block=block)
        right = isinstance(out, tuple) and len(out) >= 3
        right = right and all(isinstance(part, Tensor) and not part.is_floating_point() for part in out[:3])
        require(right, f"{match.name} gives {type(out).__name__}, not (order, place, offsets) of whole numbers")
        return out

    return [Function(match.name, call)]


def decodes(wanted: Wanted, reader: Reader) -> list[Function]:
    """A decode of one new token, called by names; its key is "cut" where it takes the size of a piece or a tile."""
    match = reader.find(wanted)

    def call(cut: tuple[int, int] | None = None, **values) -> Tensor:
        values |= dict(bias=None, interleaved=False) | ({} if cut is None else dict(piece=cut[0], block=cut[1]))
        return a_tensor(match.call(**values), match.name)

    return [Function(match.name, call, "cut" if match.takes("piece") or match.takes("block") else "")]


def parts_of_decode(wanted: Wanted, reader: Reader) -> list[Function]:
    """Softmax by tiles, or the merge of pieces."""
    match = reader.find(wanted)
    names = wanted.takes.split()
    return [
        Function(
            match.name, lambda *tensors: a_tensor(match.call(**dict(zip(names, tensors, strict=True))), match.name)
        )
    ]


RULES = {
    "sign": ("sign_rule", "update", "sign"),
    "proportional": ("proportional_rule", "proportional"),
    "algorithm-1": ("algorithm_1", "algorithm_1_rule"),
    "equation-4": ("equation_4", "equation_4_rule"),
    "quantile": ("quantile_rule", "quantile"),
}


def wanted_rule(key: str) -> Wanted:
    """A rule of chapter 8; the quantile rule takes a histogram."""
    return Wanted(RULES[key], "function", f"bias {'margins' if key == 'quantile' else 'counts'} top_k|k? rate")


def rules(key: str, reader: Reader) -> list[Function]:
    """The rule of that name. A single one of another name is the sign rule."""
    wanted = wanted_rule(key)
    fitting = {match.name: match for match in reader.fitting(wanted)}
    named = [fitting[name] for name in wanted.names if name in fitting]
    others = {name for names in RULES.values() for name in names}
    unnamed = [match for name, match in fitting.items() if name not in others]
    if not named and key == "sign" and len(unnamed) == 1:
        named = unnamed
    if not named and key != "sign":
        raise reader.missing(wanted)
    match = named[0] if named else reader.find(wanted)

    def call(bias: Tensor, seen: Tensor, top_k: int, rate: float) -> Tensor:
        told = dict(counts=seen.clone(), margins=seen.clone())  # a rule may write in place
        out = match.call(bias=bias.clone(), top_k=top_k, rate=rate, **told)
        return a_tensor(out, match.name)

    return [Function(match.name, call, key)]


def balancers(reader: Reader) -> list[Balancing]:
    """A Balancer as the library's: Balancer(model, rule, rate), then step() after the loads of all parts."""
    match = reader.find(BALANCER)
    if not hasattr(match.thing, "step"):
        raise Missing(f"{match.name} has no step()")

    def step(bias: Tensor, parts: list[Tensor], top_k: int, rate: float) -> Tensor:
        router = Router(d_model=2, n_experts=len(bias), top_k=top_k, dtype=WIDE)
        router.bias.copy_(bias)
        balancer = match.call(model=router, rule="sign", rate=rate)
        for counts in parts:
            router.load += counts
        balancer.step()
        return router.bias

    def make(router: Router) -> object:
        return match.call(model=router, rule="sign", rate=0.1)

    return [Balancing(match.name, step, make)]


def switch_losses(reader: Reader) -> list[Function]:
    """switch_loss(probabilities, index), or of a Routing as the library's."""
    whole = [match for match in reader.fitting(SWITCH_OF_ROUTING) if match.name == switch_loss.__name__]
    match = whole[0] if whole else reader.find(SWITCH)

    def call(probabilities: Tensor, index: Tensor) -> Tensor:
        routing = Routing(index, probabilities.gather(1, index), probabilities, probabilities)
        return a_tensor(match.call(probabilities=probabilities, index=index, routing=routing), match.name)

    return [Function(match.name, call)]


# ---- chapter 14


def servers(reader: Reader) -> list[Function]:
    """serve(model, prompts, new, slots, stop), which gives a story for each prompt: a list of ids, or a tensor."""
    match = reader.find(SERVE)

    def call(model: nn.Module, prompts: list[list[int]], new: list[int], slots: int, stop: int) -> list[list[int]]:
        told = dict(prompts=[list(prompt) for prompt in prompts], new=list(new))  # both may be written in place
        out = match.call(model=model, slots=slots, stop=stop, **told)
        right = isinstance(out, (list, tuple)) and all(isinstance(story, (list, tuple, Tensor)) for story in out)
        require(right, f"{match.name} gives {type(out).__name__}, not a list of lists of ids")
        require(len(out) == len(prompts), f"{match.name} gives {len(out)} stories for {len(prompts)} prompts")
        return [torch.as_tensor(story).tolist() for story in out]

    return [Function(match.name, call)]
