"""Configuration errors in words for people: which key, what is known there, which was probably meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence

COMPONENT = re.compile(r"Problem with given class_path '([\w.]+)'")
UNKNOWN_KEY = re.compile(r"(?:(?:Group '([\w.]+)' does not )?accept option|Option) '([\w.]+)'")
UNKNOWN_FLAG = re.compile(r"unrecognized arguments: --([\w.]+)")
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
WRONG_TYPE = re.compile(r"Expected a <class '(\w+)'>\. Got value: (.*)")
MISSING = re.compile(r"the following arguments are required: (.*)")
PARSER_KEY = re.compile(r'Parser key "([\w.]+)"')


def explain(message: str, top_level: Sequence[str], bases: Iterable[type], command: str = "dpo-lightning fit") -> str:
    """What an error of the parser means.

    Args:
        message: The parser's own message.
        top_level: Keys known at the top of a config, those of the Trainer included.
        bases: Base classes of the components that a config may name.
        command: The command that was given.

    Returns:
        One line on what is wrong and what to do; the parser's message itself where it is of an unknown kind.
    """
    where = ".".join(PARSER_KEY.findall(message))
    components = COMPONENT.findall(message)
    if unknown := UNKNOWN_FLAG.search(message):
        return f"there is no key {_key(unknown[1], top_level)}; see `{command} --help`."
    if unknown := UNKNOWN_KEY.search(message):
        group, key = unknown[1], unknown[2]
        if not components:
            key = key.removesuffix(".class_path").partition(".init_args")[0]
            return f"there is no key {_key(key, top_level)}{'' if '.' in key else ' at the top of a config'}."
        component = _group_type(components[-1], group) if group else _load(components[-1])
        known = _parameters(component)
        place = f"{where}.{group}" if group else where
        key = key.split(".")[0]
        return f"{place}: {component.__name__} has no key {_key(key, known)}. It has {', '.join(known)}."
    if wrong := UNKNOWN_CLASS.search(message):
        known = sorted({cls.__name__ for base in bases for cls in _concrete(base)})
        own = "A class of your own is named with its module, as in my_module.MyClass."
        return f"{where}: there is no class {_key(wrong[1], known)}. {own}"
    if wrong := WRONG_TYPE.search(message):
        return f"{where}: expected {wrong[1]}, got {wrong[2]}."
    if components and (missing := MISSING.search(message)):
        return f"{where}: {components[-1].rpartition('.')[2]} needs {missing[1]}."
    return message


def _key(key: str, known: Sequence[str]) -> str:
    """The key as it was written, and the one that was probably meant."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key)


def _load(path: str) -> type:
    module, _, name = path.rpartition(".")
    component: type = getattr(importlib.import_module(module), name)
    return component


def _group_type(path: str, group: str) -> type:
    """The class of a parameter that is itself a group of keys."""
    for constructor in _constructors(_load(path)):
        found = typing.get_type_hints(constructor).get(group.split(".")[-1])
        if isinstance(found, type):
            return found
    return _load(path)


def _constructors(component: type) -> Iterator[Callable[..., None]]:
    """Constructors of a class and of its parents, nearest first."""
    yield from (vars(cls)["__init__"] for cls in component.__mro__ if "__init__" in vars(cls))


def _parameters(component: type) -> list[str]:
    """Names that a class takes, its parents' included where it passes keywords on."""
    names: dict[str, None] = {}
    for constructor in _constructors(component):
        parameters = inspect.signature(constructor).parameters.values()
        names |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "self"]


def _concrete(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            yield cls
        yield from _concrete(cls)
