"""Prompts in files."""

from __future__ import annotations

from dpo_lightning.data.files import Files
from dpo_lightning.errors import UsageError
from dpo_lightning.scorers.base import Prompt


def read_prompts(path: str) -> list[tuple[int, Prompt]]:
    """Prompts, text or messages, with the numbers of their rows.

    Raises:
        UsageError: If a row has none, or there is no row.
    """
    prompts: list[tuple[int, Prompt]] = []
    for number, row in Files(path).numbered():
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, (str, list)):
            raise UsageError(f"{path}, row {number}: a column 'prompt' must hold text or messages, got {prompt!r:.80}.")
        prompts.append((number, prompt))
    if not prompts:
        raise UsageError(f"{path} holds no row; at least one prompt is needed.")
    return prompts
