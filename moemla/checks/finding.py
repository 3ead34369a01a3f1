"""Finds what a chapter builds in a file of the reader's: by what it takes, and only then by its name.

What is taken is written as a line of names: `layer * cache|kept lengths?` is something called layer, one more that may
be called anything, something called cache or kept, and lengths where it is taken. Whatever else there is has a default.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

from torch import nn

SHOWN = 4  # things of a file that a line names


class Missing(Exception):
    """What was looked for is not in the file, or more than once; the message is one line.

    quietly: the same for what may be left out, where nothing in the file goes by its name.
    """

    def __init__(self, message: str, quietly: str = ""):
        super().__init__(message)
        self.quietly = quietly or message


@dataclass(frozen=True)
class Wanted:
    """Something to look for: its names, the chapter's first, its kind ("layer", "class", "function"), what it takes.

    calls: what an object of the class takes when it is called.
    """

    names: tuple[str, ...]
    kind: str
    takes: str
    calls: str = ""

    @property
    def name(self) -> str:
        """What the chapter calls it."""
        return self.names[0]

    @property
    def shown(self) -> str:
        """As it is written in Python, with what may be left out in brackets."""
        taken = f"{'def' if self.kind == 'function' else 'class'} {self.name}({_written(self.takes)})"
        return f"{taken}, called with ({_written(self.calls)})" if self.calls else taken


def _written(line: str) -> str:
    names = [token.rstrip("?").partition("|")[0].replace("*", "x") for token in line.split()]
    return ", ".join(
        f"[{name}]" if token.endswith("?") else name for name, token in zip(names, line.split(), strict=True)
    )


@dataclass(frozen=True)
class Match:
    """What was found: the thing, its name in the file, and the parameter that each token of the line became."""

    name: str
    thing: Callable
    roles: dict[str, str]

    def takes(self, role: str) -> bool:
        """Whether it has a parameter for this token's first name."""
        return role in self.roles

    def call(self, **values):
        """Calls it with values by the tokens' first names; those that it does not take are left out."""
        return self.thing(**{self.roles[role]: value for role, value in values.items() if role in self.roles})


def parameters(thing: Callable) -> dict[str, inspect.Parameter]:
    """What something takes by name, without `self`, `*args` and `**kwargs`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        taken = inspect.signature(thing).parameters.items()
        return {name: p for name, p in taken if p.kind in kinds and name != "self"}
    except (TypeError, ValueError):  # there are classes whose signature Python does not know
        return {}


def roles_of(thing: Callable, takes: str) -> dict[str, str] | None:
    """The parameter for each token of a line by the token's first name; None where it does not fit."""
    taken = parameters(thing)
    needed = [name for name, p in taken.items() if p.default is inspect.Parameter.empty]
    roles, tokens = {}, takes.split()
    for token in tokens:
        names = token.rstrip("?").split("|")
        here = [name for name in names if name in taken]
        if here:
            roles[names[0]] = here[0]
        elif not token.endswith("?") and token != "*":
            return None
    left = [name for name in needed if name not in roles.values()]
    if "*" in tokens and left:
        roles["*"] = left.pop(0)
    elif "*" in tokens:
        return None
    return None if left else roles


class Reader:
    """What a file defines, apart from what it imports. `roles_of` says whether something fits."""

    def __init__(self, namespace: SimpleNamespace | ModuleType):
        here = vars(namespace)
        own = {name: thing for name, thing in here.items() if getattr(thing, "__module__", "") == here["__name__"]}
        classes = {name: thing for name, thing in own.items() if inspect.isclass(thing)}
        self.layers = {name: thing for name, thing in classes.items() if issubclass(thing, nn.Module)}
        self.classes = {name: thing for name, thing in classes.items() if name not in self.layers}
        self.functions = {name: thing for name, thing in own.items() if inspect.isfunction(inspect.unwrap(thing))}

    def of_kind(self, kind: str) -> dict[str, Callable]:
        """Everything of a kind by its name; a class may be a layer."""
        kinds = dict(layer=self.layers, function=self.functions)
        return kinds[kind] if kind in kinds else self.classes | self.layers

    def fitting(self, wanted: Wanted) -> Iterator[Match]:
        """All that fit, in the order of the file."""
        for name, thing in self.of_kind(wanted.kind).items():
            roles = roles_of(thing, wanted.takes)
            called = getattr(thing, "forward", thing.__call__)
            if roles is not None and (not wanted.calls or roles_of(called, wanted.calls) is not None):
                yield Match(name, thing, roles)

    def find(self, wanted: Wanted) -> Match:
        """The one that fits, or the one of them that is called as in the chapter; else Missing."""
        fitting = {match.name: match for match in self.fitting(wanted)}
        named = [fitting[name] for name in wanted.names if name in fitting]
        if named or len(fitting) == 1:
            return (named or [*fitting.values()])[0]
        if fitting:
            raise Missing(f"{_and(list(fitting))} all fit {wanted.shown}: call the one that is meant {wanted.name}")
        raise self.missing(wanted)

    def missing(self, wanted: Wanted) -> Missing:
        """What is said where nothing fits."""
        called_so = any(name in self.of_kind(wanted.kind) for name in wanted.names)
        message = f"{wanted.shown} was expected; the file has {self.seen(wanted)}"
        return Missing(message, "" if called_so else f"the file has no {wanted.shown}")

    def seen(self, wanted: Wanted) -> str:
        """What there is of the kind, the chapter's names first, with what it takes."""
        kind = self.of_kind(wanted.kind)
        if not kind:
            return "no function" if wanted.kind == "function" else "no class"
        names = sorted(kind, key=lambda name: name not in wanted.names)
        said = [f"{name}({', '.join(parameters(kind[name]))})" for name in names[:SHOWN]]
        return _and(said) if len(names) <= SHOWN else f"{', '.join(said)} and {len(names) - SHOWN} more"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
