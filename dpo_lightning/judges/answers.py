"""Answers of a server that are kept, so that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from dpo_lightning.journal import Book, digest_of
from dpo_lightning.recipes import identity
from dpo_lightning.server import Messages, Server, Spent


class AnswerBook(Book):
    """A server with the answers that it gave.

    Args:
        server: What answers.
        path: File that keeps the answers; without one they are kept in memory.

    Attributes:
        spent: What all answers in the file took.
        failed: Why questions have no answer, each with its number.
    """

    def __init__(self, server: Server, path: Path | None = None) -> None:
        self.server, self._mark = server, identity(server)
        super().__init__(path, "answers, each by a digest of model, settings and question")
        self._known: dict[str, str] = {row["digest"]: row["text"] for row in self.rows}
        counts = (sum(row[name] for row in self.rows) for name in ("input_tokens", "output_tokens"))
        self.spent = Spent(len(self.rows), *counts)
        self.failed: dict[str, int] = {}

    def of(self, questions: Sequence[Messages], notes: Sequence[dict[str, Any]]) -> list[str | None]:
        """The answer to each question, None where the server refused or failed it; equal ones are asked once.

        Args:
            questions: Dialogues.
            notes: What else to keep with each answer.

        Raises:
            UsageError: If the server cannot be asked, or a cap is reached; what was answered is kept.
        """
        keys = [digest_of(self._mark, question) for question in questions]
        places = sorted({key: place for place, key in enumerate(keys) if key not in self._known}.values())
        coming = self.server.ask([questions[place] for place in places], self.spent)
        hidden = None if places else True
        with tqdm(
            coming, f"Asking {self.server.model}", len(places), unit="answer", leave=False, disable=hidden
        ) as bar:
            for number, answer in bar:
                if answer.text is None:
                    self.failed[answer.error] = self.failed.get(answer.error, 0) + 1
                    continue
                key, note = keys[places[number]], notes[places[number]]
                counts = {"input_tokens": answer.spent.input_tokens, "output_tokens": answer.spent.output_tokens}
                row = {"digest": key, **note, "text": answer.text, "model": answer.model, **counts}
                self.keep([row])
                self._known[key], self.spent = answer.text, self.spent.plus(answer.spent)
        return [self._known.get(key) for key in keys]
