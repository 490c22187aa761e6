"""What tokens depend on, as one key: who finds it again may use the tokens that were made under it."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from abc import ABC
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.data.formats import Format
from dpo_lightning.data.sources import Source
from dpo_lightning.data.tokenize import Tokenization
from dpo_lightning.recipes import to_plain

LOADING = ("is_local", "local_files_only")


def token_key(source: Source, shape: Format | None, tokenization: Tokenization) -> str | None:
    """Changes with everything that tokens depend on, and with nothing else; None where that cannot be told."""
    fingerprint = source.fingerprint()
    if fingerprint is None:
        return None
    settings = {field.name: getattr(tokenization, field.name) for field in fields(tokenization)}
    tokenizer, chat = settings.pop("tokenizer"), settings.pop("chat")
    parts = {
        "source": fingerprint,
        "format": to_plain(shape),
        "settings": settings,
        "chat": {**vars(chat), "template": chat.source(tokenizer)},
        "tokenizer": _digest_of_tokenizer(tokenizer),
        "versions": [version(package) for package in ("transformers", "tokenizers", "jinja2")],
    }
    try:
        code = {*map(str, Path(__file__).parent.glob("*.py")), *map(inspect.getfile, _classes(shape))}
        parts["code"] = sorted(hashlib.blake2b(Path(path).read_bytes()).hexdigest() for path in code)
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    except (TypeError, OSError):  # a format or a template variable that is not plain data, or code typed into a shell
        return None


def _classes(value: Any) -> Iterator[type]:
    """The classes of a format, of those that it is made of, and what they inherit."""
    if isinstance(value, Format):
        yield from (cls for cls in type(value).__mro__ if cls not in (ABC, object))
        for part in vars(value).values():
            yield from _classes(part)


def _digest_of_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """Hashes of the files that it would be saved as, less what says how it was loaded."""
    tokenizer("a", verbose=False)  # puts away the cutting and padding of other calls, which would be saved
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config = Path(folder) / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({name: value for name, value in settings.items() if name not in LOADING}))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [hashlib.blake2b(path.read_bytes()).hexdigest() for path in files]
