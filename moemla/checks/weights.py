"""Which weight of a layer is which of the library's: by name, else by shape where only one fits.

A list of equal layers, as `nn.ModuleList` names them (`experts.0.up.weight`, `experts.1.up.weight`), stands for one
weight with a piece for each of them; `nn.Linear` keeps a piece the other way round. What has shape alone to go by is
said, and where shape does not tell, the line names the weights that it might be.
"""

import re
from collections.abc import Callable

from torch import Tensor, nn

from moemla.checks.compare import Weights, require

View = Callable[[Tensor], Tensor]


def fit_weights(layer: nn.Module, oracle: nn.Module) -> Weights:
    """The oracle's weight of each parameter of a layer; CheckFailed in a line where they cannot be told apart.

    Buffers of the same name and shape are copied too; others of a layer (a mask, a table) are its own.
    """
    ours, theirs = dict(layer.named_parameters()), dict(oracle.named_parameters())
    for name in ours.keys() & theirs.keys():
        shape, right = tuple(ours[name].shape), tuple(theirs[name].shape)
        require(shape == right, f"{name} {shape}: the library's is {right}")
    weights: Weights = {name: (name, _itself) for name in ours if name in theirs}
    free = {name: weight for name, weight in theirs.items() if name not in weights}
    lists = _lists({name: tuple(weight.shape) for name, weight in ours.items() if name not in weights})
    linear = {f"{name}.weight" for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    while lists:
        candidates = {
            template: _candidates([ours[name] for name in names], free, names[0] in linear)
            for template, names in lists.items()
        }
        sure = {template: fitting for template, fitting in candidates.items() if len(fitting) == 1}
        sources = [source for ((source, _),) in sure.values()]
        sure = {template: fitting for template, fitting in sure.items() if sources.count(fitting[0][0]) == 1}
        require(bool(sure), _unclear(layer, lists, candidates, free))
        for template, ((source, views),) in sure.items():
            weights |= {name: (source, view) for name, view in zip(lists.pop(template), views, strict=True)}
            del free[source]
    require(not free, f"weights: the layer has none for the library's {_listed(free)}")
    right = dict(oracle.named_buffers())
    for name, buffer in layer.named_buffers():
        if name in layer.state_dict() and name in oracle.state_dict() and buffer.shape == right[name].shape:
            weights[name] = (name, _itself)
    return weights


def matched_by_shape(weights: Weights) -> list[str]:
    """`name = oracle's name` of the weights that were not called the same."""
    said = {re.sub(r"\b\d+\b", "*", name): source for name, (source, _) in weights.items() if name != source}
    return [f"{name} = {source}" for name, source in said.items()]


def _itself(weight: Tensor) -> Tensor:
    return weight


def _lists(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Names of one shape that differ in a number alone, in the order of the layer, by that name with stars.

    In an `nn.Sequential` numbers tell layers of other shapes apart: a name that is alone with its shape stands whole.
    """
    lists: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        lists.setdefault((re.sub(r"\b\d+\b", "*", name), shape), []).append(name)
    several = [template for template, _ in lists]

    def called(template: str, shape: tuple[int, ...], names: list[str]) -> str:
        if len(names) == 1:
            return names[0]
        return template if several.count(template) == 1 else f"{template} of {shape}"

    return {called(*key, names): names for key, names in lists.items()}


def _candidates(ours: list[Tensor], free: dict[str, Tensor], linear: bool) -> list[tuple[str, list[View]]]:
    """(name, a view for each of ours) of the oracle's weights that have these shapes."""
    fitting = [(name, _views(weight, len(ours), ours[0], linear)) for name, weight in free.items()]
    if any(part.shape != ours[0].shape for part in ours):
        return []
    return [(name, views) for name, views in fitting if views]


def _views(weight: Tensor, count: int, piece: Tensor, linear: bool) -> list[View]:
    """Views of a weight that are `count` pieces of a shape; none where it has no such pieces."""
    if count == 1:
        if weight.shape == piece.shape:
            return [_itself]
        if weight.dim() == 2 and piece.dim() == 3:  # (S, in, out) for one wide nn.Linear, whose weight is (out, in)
            several, wide, narrow = piece.shape
            if weight.shape == (several * narrow, wide):
                return [lambda weight: weight.unflatten(0, (several, -1)).mT]
            if weight.shape == (narrow, several * wide):
                return [lambda weight: weight.unflatten(1, (several, -1)).permute(1, 2, 0)]
        return [_turned] if weight.dim() == 2 and weight.T.shape == piece.shape and not linear else []
    if weight.dim() == 3 and len(weight) == count:  # experts: (E, in, out), while nn.Linear has (out, in)
        shape = weight.shape[:0:-1] if linear else weight.shape[1:]
        return [_piece(i, linear) for i in range(count)] if shape == piece.shape else []
    for dim in range(weight.dim()):  # one wide layer in place of several: cut where it is wide
        wanted = list(piece.shape)
        wanted[dim : dim + 1] = [count * wanted[dim]] if dim < len(wanted) else []
        if tuple(wanted) == tuple(weight.shape):
            return [_cut(i, count, dim) for i in range(count)]
    return []


def _turned(weight: Tensor) -> Tensor:
    return weight.T


def _piece(number: int, turned: bool) -> View:
    return lambda weight: weight[number].T if turned else weight[number]


def _cut(number: int, count: int, dim: int) -> View:
    return lambda weight: weight.chunk(count, dim)[number]


def _shape(weight: Tensor) -> str:
    return str(tuple(weight.shape))


def _listed(weights: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {_shape(weight)}" for name, weight in weights.items()) or "none"


def _unclear(layer: nn.Module, lists: dict, candidates: dict, free: dict[str, Tensor]) -> str:
    """What cannot be told apart, the first of it."""
    ours = dict(layer.named_parameters())
    template = next((name for name in lists if not candidates[name]), next(iter(lists)))
    which = " or ".join(name for name, _ in candidates[template])
    said = f"{template} {_shape(ours[lists[template][0]])}"
    if which:
        return f"weights: {said} may be {which}: name the weights as the library does"
    return f"weights: {said} is none of the library's that are left: {_listed(free)}"
