"""Answers of a server that are kept, so that nothing is asked twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from dpo_lightning.journal import Book, digest_of
from dpo_lightning.recipes import identity
from dpo_lightning.server import NOTHING, Answer, Messages, Server, Spent


class AnswerBook(Book):
    """A server with the answers that it gave.

    Args:
        server: What answers.
        path: File that keeps the answers; without one they are kept in memory.
        ask_again: Ask again what the server refused or failed in an earlier run.

    Attributes:
        spent: What all answers in the file took, and what was paid for none.
        failed: Why questions have no answer, each with its number.
    """

    def __init__(self, server: Server, path: Path | None = None, ask_again: bool = False) -> None:
        self.server, self._mark = server, identity(server)
        super().__init__(path, "answers, each by a digest of model, settings and question")
        self._known: dict[str, str] = {row["digest"]: row["text"] for row in self.rows if row["text"] is not None}
        known = [] if ask_again else self.rows
        self._left_out: dict[str, str] = {row["digest"]: row["error"] for row in known if row.get("left_out")}
        self.spent = NOTHING.plus(*map(_spent, self.rows))
        self.failed = Counter[str]()

    def of(self, questions: Sequence[Messages], notes: Sequence[dict[str, Any]]) -> list[str | None]:
        """The answer to each question, None where the server refused or failed it; equal ones are asked once.

        What it refused or failed in an earlier run is not asked again, unless that is wished for.

        Args:
            questions: Dialogues.
            notes: What else to keep with each answer.

        Raises:
            UsageError: If the server cannot be asked, or a cap is reached; what was answered is kept.
        """
        keys = [digest_of(self._mark, question) for question in questions]
        places = sorted({key: place for place, key in enumerate(keys) if not self._is_settled(key)}.values())
        coming = self.server.ask([questions[place] for place in places], self.spent)
        hidden = None if places else True
        with tqdm(
            coming, f"Asking {self.server.model}", len(places), unit="answer", leave=False, disable=hidden
        ) as bar:
            for number, answer in bar:
                key, note = ("", {}) if number is None else (keys[places[number]], notes[places[number]])
                self._take(key, note, answer)
        self.failed.update(self._left_out[key] for key in {*keys} - {*self._known} if key in self._left_out)
        return [self._known.get(key) for key in keys]

    def _is_settled(self, key: str) -> bool:
        return key in self._known or key in self._left_out

    def _take(self, key: str, note: dict[str, Any], answer: Answer) -> None:
        """Keep an answer, that there is none, or what was paid for nothing."""
        row = {"digest": key, **note, "text": answer.text, "model": answer.model, **answer.spent._asdict()}
        if answer.text is None:
            row |= {"error": answer.error, "left_out": answer.left_out}
        self.keep([row])
        self.spent = self.spent.plus(answer.spent)
        if answer.text is not None:
            self._known[key] = answer.text
        elif answer.left_out:
            self._left_out[key] = answer.error


def _spent(row: dict[str, Any]) -> Spent:
    """What an answer in the file took: one request, where it was written before requests were counted."""
    return Spent(row.get("requests", 1), row["input_tokens"], row["output_tokens"])
