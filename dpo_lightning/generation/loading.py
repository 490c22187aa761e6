"""A model that writes, from wherever it lies."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dpo_lightning.checkpoints.reading import META, SHARDS
from dpo_lightning.export import export
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.paths import resolve


def load(path: str) -> tuple[PreTrainedModel, Tokenizer]:
    """A model on the CPU, in evaluation mode, and its tokenizer.

    Args:
        path: A Hugging Face folder, a hub name, a .ckpt file or the folder of a sharded checkpoint.

    Raises:
        UsageError: If there is none.
    """
    place = Path(resolve(path)).expanduser()
    if place.is_file() or any((place / name).is_file() for name in (META, SHARDS)):
        with tempfile.TemporaryDirectory() as folder:
            return load(str(export(str(place), folder)))
    spec = PolicySpec(path=path)
    return spec.load_model().eval(), spec.load_tokenizer()
