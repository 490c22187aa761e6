"""Recipes as plain data: what a checkpoint keeps of the dataclasses that configured a module.

Checkpoints are loaded with ``weights_only=True``, so they may hold numbers, strings, lists and dictionaries alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from contextlib import suppress
from typing import Any, TypeVar

from dpo_lightning.errors import UsageError

T = TypeVar("T")


def to_plain(recipe: Any) -> Any:
    """A dataclass as ``{"class_path": ..., "init_args": ...}``, those inside of it too; plain values as they are."""
    if dataclasses.is_dataclass(recipe) and not isinstance(recipe, type):
        fields = {field.name: to_plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
        return {"class_path": _public_path(type(recipe)), "init_args": fields}
    if isinstance(recipe, (list, tuple)):
        return [to_plain(item) for item in recipe]
    return recipe


def identity(recipe: Any) -> Any:
    """What :func:`to_plain` writes down, without the fields that a class names in ``ASIDE``: they change no result."""
    if dataclasses.is_dataclass(recipe) and not isinstance(recipe, type):
        names = [field.name for field in dataclasses.fields(recipe) if field.name not in getattr(recipe, "ASIDE", ())]
        return {"class_path": _public_path(type(recipe)), **{name: identity(getattr(recipe, name)) for name in names}}
    if isinstance(recipe, (list, tuple)):
        return [identity(item) for item in recipe]
    return recipe


def from_plain(value: Any, base: type[T]) -> T:
    """The recipe that :func:`to_plain` wrote down; a recipe is handed through.

    A checkpoint must not choose code to run, so a class of another package is only taken once its module is
    imported.
    """
    if isinstance(value, base):
        return value
    if not isinstance(value, dict):
        raise UsageError(
            f"Expected a {base.__name__}, got {type(value).__name__}: {value!r:.80}; give an object of that class "
            "or of a subclass."
        )
    return _build(value, base) if "class_path" in value else base(**value)


def _build(plain: dict[str, Any], base: type[T]) -> T:
    module_name, _, name = plain["class_path"].rpartition(".")
    if module_name.split(".")[0] == __package__:
        with suppress(ModuleNotFoundError):
            importlib.import_module(module_name)
    cls = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(cls, type) and issubclass(cls, base) and hasattr(cls, "__dataclass_fields__")):
        kind = "dataclass" if base is object else f"subclass of {base.__name__}"
        raise UsageError(
            f"The checkpoint was made with {plain['class_path']}, which is not an imported {kind}. Import "
            f"{module_name} before loading, or pass your own object to load_from_checkpoint."
        )
    return cls(**{key: _nested(item) for key, item in plain.get("init_args", {}).items()})


def _public_path(cls: type) -> str:
    """Where users import a class from: the package around its module, where that offers it. Files may then move."""
    package = cls.__module__.rpartition(".")[0]
    is_public = getattr(sys.modules.get(package), cls.__qualname__, None) is cls
    return f"{package if is_public else cls.__module__}.{cls.__qualname__}"


def _nested(value: Any) -> Any:
    if isinstance(value, list):
        return [_nested(item) for item in value]
    if isinstance(value, dict) and set(value) == {"class_path", "init_args"}:
        return _build(value, object)
    return value
