"""Configuration errors in words for people: which key, what is known there, which was probably meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator

COMPONENT = re.compile(r"Problem with given class_path '([\w.]+)'")
UNKNOWN_KEY = re.compile(r"(?:Option|accept option) '([\w.]+)'|unrecognized arguments: --([\w.]+)")
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
PARSER_KEY = re.compile(r'Parser key "([\w.]+)"')


def explain(message: str, top_level: Iterable[str], classes: Iterable[type]) -> str:
    """What an error of the parser means.

    Args:
        message: The parser's own message.
        top_level: Keys known at the top of a config.
        classes: Bases of the components that a config may name.

    Returns:
        One line on what is wrong and what to do; the parser's message itself where it is of an unknown kind.
    """
    where = ".".join(PARSER_KEY.findall(message))
    component = COMPONENT.findall(message)
    unknown = UNKNOWN_KEY.search(message)
    if unknown and component:
        key = (unknown[1] or unknown[2]).split(".")[0]
        name, known = component[-1], _parameters(component[-1])
        return f"{where}: {name.rpartition('.')[2]} has no key {key!r}{_meant(key, known)}. It has {', '.join(known)}."
    if unknown:
        key = (unknown[1] or unknown[2]).removesuffix(".class_path").partition(".init_args")[0]
        known = list(top_level)
        if key.startswith("trainer."):
            return f"the Trainer has no key {key!r}{_meant(key, known)}. See `dpo-lightning fit --help`."
        return f"there is no key {key!r}{_meant(key, known)} at the top of a config."
    wrong_class = UNKNOWN_CLASS.search(message)
    if wrong_class:
        name, known = wrong_class[1], sorted({cls.__name__ for base in classes for cls in _concrete(base)})
        return (
            f"{where}: there is no class {name!r}{_meant(name, known)}. A class of your own is named with its module, as "
            "in my_module.MyClass."
        )
    return message


def _meant(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _parameters(path: str) -> list[str]:
    """Names that a class takes, its parents' included where it passes keywords on."""
    module, _, name = path.rpartition(".")
    names: dict[str, None] = {}
    component: type = getattr(importlib.import_module(module), name)
    for cls in component.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        names |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "self"]


def _concrete(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            yield cls
        yield from _concrete(cls)
