"""What a judge is asked. Every question shows a prompt and two responses, called A and B."""

from __future__ import annotations

import re

from dpo_lightning.errors import UsageError
from dpo_lightning.scorers import Prompt

SUMMARIES = """

The post:
{prompt}

Summary A:
{first}

Summary B:
{second}"""

SIMPLE = f"""\
Here are a forum post and two summaries of it. Judge which summary tells a reader more of what matters most in the \
post.{SUMMARIES}"""

CONCISE = f"""\
Here are a forum post and two summaries of it. Judge which summary tells a reader what matters most in the post and \
leaves out what does not matter. A good summary is exact, and no longer than it needs to be.{SUMMARIES}"""

HELPFUL = """\
Here are a conversation and two replies that might follow it. Judge which reply is of more help to the person who asked.

The conversation:
{prompt}

Reply A:
{first}

Reply B:
{second}"""

QUESTIONS = {"simple": SIMPLE, "concise": CONCISE, "helpful": HELPFUL}
ENDING = """

First write one sentence that compares A and B and says which you prefer and why. Then write a last line that holds \
nothing but A or B, or tie if neither is better."""
REMINDER = "I cannot read your choice. Reply with one line that holds nothing but A, B or tie."

PLACE = re.compile(r"\{(prompt|first|second)\}")
VERDICT = re.compile(r"[\s*_`\"'(\[]*(A|B|[Tt]ie|TIE)[\s*_`\"')\].]*")
FIRST = {"A": 1.0, "B": 0.0, "tie": 0.5}


def template(question: str) -> str:
    """The text of a question: that of a name, or the text itself.

    Raises:
        UsageError: If it is neither.
    """
    text = QUESTIONS.get(question, question)
    missing = {"prompt", "first", "second"} - set(PLACE.findall(text))
    if missing:
        lacking = ", ".join(f"{{{name}}}" for name in sorted(missing))
        raise UsageError(
            f"`question` must be one of {', '.join(QUESTIONS)}, or a text that calls the two A and B and has "
            f"{{prompt}}, {{first}} and {{second}} in it; {question!r:.60} lacks {lacking}."
        )
    return text


def ask(question: str, prompt: Prompt, first: str, second: str) -> str:
    """A question about two responses, with how to answer it."""
    parts = {"prompt": written(prompt), "first": first, "second": second}
    # In one go, since a response may hold what looks like a place.
    return PLACE.sub(lambda place: parts[place[1]].strip(), template(question)) + ENDING


def written(prompt: Prompt) -> str:
    """A prompt as text: messages one below the other, each behind who said it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role'].capitalize()}: {message.get('content') or ''}" for message in prompt)


def read(answer: str) -> float | None:
    """The verdict on an answer's last line: 1 for A, 0 for B, one half for a tie; None for anything else."""
    lines = answer.strip().splitlines()
    found = VERDICT.fullmatch(lines[-1]) if lines else None
    return None if found is None else FIRST[found[1] if found[1] in "AB" else "tie"]
