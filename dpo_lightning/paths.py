"""Paths that a config may name."""

from __future__ import annotations

from importlib.resources import files

PACKAGE = "package:"


def resolve(path: str) -> str:
    """A path as the file system knows it; ``package:NAME`` is a file that the installed package brings."""
    if path.startswith(PACKAGE):
        return str(files("dpo_lightning") / path.removeprefix(PACKAGE))
    return path
