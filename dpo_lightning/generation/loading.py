"""A model and its tokenizer, from wherever a user may have them."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.checkpoints.reading import META, SHARDS
from dpo_lightning.errors import UsageError
from dpo_lightning.export import export, tokenizer_of
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.paths import PACKAGE, resolve

DType = Literal["float32", "bfloat16", "float16"]
WEIGHTS = re.compile(r".*\.(safetensors|ckpt|distcp|bin|pt)")
CHUNK = 16 << 10  # bytes of a file of weights that are read together to tell it from another
MOST_READ = 256 << 20  # bytes of a file that are read for that; larger ones are read in chunks at equal distances


def load(
    path: str,
    *,
    dtype: DType = "float32",
    device: torch.device | str = "cpu",
    base: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        path: A Hugging Face folder, a name on the hub, package:NAME, or a checkpoint of a policy: a .ckpt file or a
            sharded folder; adapters are taken up into the weights.
        dtype: Dtype of the weights.
        device: Where the model is to be.
        base: Of a checkpoint, where the model that training began with is now.
        trust_remote_code: Run model code that comes with the weights.

    Raises:
        UsageError: If there is no such model, or it writes no text.
    """
    if is_checkpoint(path):
        logging.getLogger("dpo_lightning").info(f"Reading the checkpoint {path}.")
        with tempfile.TemporaryDirectory() as folder:
            export(path, folder, base=base, dtype=dtype)
            return load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    spec = _spec(path, dtype, trust_remote_code)
    try:
        kind = next(iter(spec.load_config().architectures or []), "")
        if kind.endswith("ForSequenceClassification"):
            raise UsageError(
                f"{path} is a reward model or a classifier ({kind}): it gives numbers and writes no text. Name a "
                "language model."
            )
        model: Any = spec.load_model()
        return model.to(device).eval(), spec.load_tokenizer()
    except UsageError as error:
        raise UsageError(str(error).removeprefix("`policy.path`: ")) from error


def load_tokenizer(path: str, *, base: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that :func:`load` gives, without reading weights."""
    if is_checkpoint(path):
        return tokenizer_of(path, base)
    try:
        return _spec(path, "float32", trust_remote_code).load_tokenizer()
    except UsageError as error:
        raise UsageError(str(error).removeprefix("`policy.path`: ")) from error


def is_checkpoint(path: str) -> bool:
    """Whether a path is that of a checkpoint rather than a Hugging Face folder; it need not be there."""
    place = _place(path)
    return place.is_file() or place.suffix == ".ckpt" or (place / META).exists() or (place / SHARDS).exists()


def which_model(path: str) -> dict[str, str]:
    """What tells a model from another: where it is and, on this machine, a digest of its weights.

    Of large files it is that of chunks, so near to each other that every large matrix of weights has some.
    """
    place = _place(path)
    if not place.exists():
        return {"model": path}
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    digest = hashlib.blake2b(digest_size=8)
    for file in (file for file in found if WEIGHTS.fullmatch(file.name) and file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name if place.is_dir() else ''} {size}\n".encode())
        distance = max(CHUNK, size * CHUNK // MOST_READ)
        with file.open("rb") as content:
            for start in (*range(0, size, distance), max(0, size - CHUNK)):
                content.seek(start)
                digest.update(content.read(CHUNK))
    name = path if path.startswith(PACKAGE) else str(place.absolute())
    return {"model": name, "weights": digest.hexdigest()}


def _place(path: str) -> Path:
    return Path(resolve(path)).expanduser()


def _spec(path: str, dtype: DType, trust_remote_code: bool) -> PolicySpec:
    place = _place(path)
    if not place.exists() and (path.count("/") > 1 or path.startswith((PACKAGE, ".", "/", "~"))):
        raise UsageError(
            f"There is no model {path}: give a Hugging Face folder, a name on a hub (owner/model), or a checkpoint, a "
            ".ckpt file or a sharded folder."
        )
    if place.is_dir() and not (place / "config.json").is_file():
        adapters = (place / "adapter_config.json").is_file()
        raise UsageError(
            f"The folder {path} holds no model: there is no config.json in it"
            + (
                ", but adapters alone; export the checkpoint with `--adapter merge`."
                if adapters
                else ", and no checkpoint."
            )
        )
    return PolicySpec(path=path, dtype=dtype, trust_remote_code=trust_remote_code)
