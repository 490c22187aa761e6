"""What the columns of a source mean, found from its first rows, or refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_lightning.data.cells import WRONG_TYPE, is_messages
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Asked, Format, Pairs, SharedPrompts, ShareGPT, Transcripts
from dpo_lightning.data.rankings import TIED, TIES, Columns, Comparisons, Rankings, said
from dpo_lightning.data.samples import Samples
from dpo_lightning.data.sources import Row
from dpo_lightning.data.supervised import Alpaca, Completions, Messages, Texts
from dpo_lightning.errors import UsageError

NUM_ROWS = 100
# The names under which people keep a thing, the usual one first.
ALIASES = {
    "prompt": ("prompt", "question", "query", "instruction", "input"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog"),
    "chosen": (
        *("chosen", "response_chosen", "chosen_response", "answer_chosen", "completion_chosen"),
        *("accepted", "preferred", "response_j"),
    ),
    "rejected": (
        *("rejected", "reject", "response_rejected", "rejected_response", "answer_rejected", "completion_rejected"),
        *("dispreferred", "response_k"),
    ),
    "responses": ("responses", "completions", "candidates", "answers", "outputs"),
    "scores": ("scores", "ratings", "rewards"),
    "context": ("input", "context"),
    "first": ("output_1", "response_1", "answer_1", "completion_1", "output_a", "response_a", "answer_a"),
    "second": ("output_2", "response_2", "answer_2", "completion_2", "output_b", "response_b", "answer_b"),
    "label": ("label", "preference", "preferred", "winner", "better"),
    "completion": ("completion", "response", "answer", "output", "target"),
    "text": ("text",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
}
BESIDES = ("system", "history", "tools")  # what a prompt may have beside it; a column of nulls is none
LABELS: tuple[tuple[int | str, int | str], ...] = (
    *((1, 2), ("output_1", "output_2"), ("response_1", "response_2"), ("model_a", "model_b")),
    *(("A", "B"), ("a", "b"), ("first", "second")),
)
# What a prompt may lack when it is left unread, and what the prompts of dialogues may lack.
OF_PROMPTS = ("instruction", "input", "context", "choices", "options", "history", "system", "system_prompt", "tools")
OF_DIALOGUES = ("history", "system", "system_prompt", "tools")
SAMPLED = {"tokens", "finished"}  # what `dpo-lightning sample` says of each of its responses
WRITTEN_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
SHAPES = (
    *(Pairs(), ShareGPT(), SharedPrompts(), Transcripts(), Rankings(), Samples(), Comparisons()),
    *(Messages(), Completions(), Alpaca(), Texts()),
)


def choose(rows: Sequence[Row], source: str) -> Format:
    """The shape that most of a source's first rows have.

    Args:
        rows: The first rows, at least one.
        source: What messages call their source.

    Raises:
        UsageError: If none has; names the columns found, the shapes known and the one that is nearest.
    """
    columns = list(dict.fromkeys(column for row in rows if isinstance(row, Mapping) for column in row))
    tried: list[tuple[Format, UnusableRow]] = []
    objects = [row for row in rows if isinstance(row, Mapping)]
    for shape in _candidates(objects, source) if objects else ():
        problem = _problem(shape, rows)
        if problem is None:
            _check_unread(shape, objects, source)
            return shape
        tried.append((shape, problem))
    known = "\n".join(f"  {shape}" for shape in SHAPES)
    nothing = "objects without columns" if objects else f"{type(rows[0]).__name__} in place of an object"
    found = ", ".join(map(repr, columns)) or nothing
    if tried:
        nearest = "\n  or ".join(f"{shape}, but of too many rows: {problem}" for shape, problem in tried)
    else:
        overlap = {shape: _likeness(shape.columns(), columns) for shape in SHAPES}
        nearest = str(max(overlap, key=lambda shape: overlap[shape]))
    raise UsageError(
        f"{source}: cannot tell what its columns mean. Found {found}.\nNearest is {nearest}\nKnown are\n{known}\n"
        "Name shape and columns by `data.init_args.format`, as in {class_path: Pairs, init_args: {prompt: frage, "
        "chosen: gut, rejected: schlecht}}."
    )


def _problem(shape: Format, rows: Sequence[Row]) -> UnusableRow | None:
    """Why most of some rows do not have a shape."""
    problems = [problem for row in rows for problem in _problems(shape, row)]
    # A tie has the shape, and says nothing.
    misfits = [problem for problem in problems if problem is not None and problem.reason != TIES]
    # Any two texts may begin alike by chance, so of these nearly all have to.
    share = 0.1 if isinstance(shape, SharedPrompts) else 0.5
    return misfits[0] if len(misfits) > share * len(problems) else None


def _problems(shape: Format, row: Row) -> list[UnusableRow | None]:
    try:
        return [None if isinstance(item, PreferenceExample) else item for item in shape.read(row)]
    except UnusableRow as problem:
        return [problem]
    except RecursionError:
        return [UnusableRow(WRONG_TYPE, "its lists and objects are nested too deeply.")]


def _candidates(rows: Sequence[Row], source: str) -> Iterator[Format]:
    """Shapes for which all columns are there, likeliest first."""
    given = list(_given(rows).values())
    if given and all(_is_column(row.get(name)) for name in given for row in rows):
        inner = [line for row in rows for line in _lines(row, given)]
        yield from (Columns(rows=shape) for shape in _shapes(inner, source) if _problem(shape, inner) is None)
    yield from _shapes(rows, source)


def _shapes(rows: Sequence[Row], source: str) -> Iterator[Format]:
    """The same, of rows that are no tables."""
    given = _given(rows)
    prompt = given.get("prompt") or given.get("messages")
    asked: dict[str, Any] = {role: given[role] for role in BESIDES if role in given}
    if prompt == "instruction" and "context" in given:
        asked["context"] = given["context"]
    if "chosen" in given and "rejected" in given:
        sides: dict[str, Any] = {"chosen": given["chosen"], "rejected": given["rejected"]}
        if "prompt" in given:
            yield Pairs(prompt=given["prompt"], **sides, **asked, repeated=_repeated(rows, given, source))
        elif prompt:
            yield ShareGPT(prompt=prompt, **sides, **asked)
        else:
            yield Transcripts(**sides)
            yield SharedPrompts(**sides, tools=given.get("tools"))
    if prompt and "responses" in given and "scores" not in given and _are_sampled(rows):
        yield Samples(prompt=prompt, responses=given["responses"], **asked)
    elif prompt and "responses" in given:
        yield Rankings(prompt=prompt, responses=given["responses"], scores=given.get("scores"), **asked)
    if prompt and all(role in given for role in ("first", "second", "label")):
        places = {role: given[role] for role in ("first", "second", "label")}
        yield Comparisons(prompt=prompt, **places, **asked, labels=_labels(rows, places, source))
    if "chosen" not in given and "rejected" not in given:  # half a pair is nothing for SFT
        yield from _supervised(rows, given, asked, source)


def _supervised(rows: Sequence[Row], given: Mapping[str, str], asked: dict[str, Any], source: str) -> Iterator[Format]:
    if ("messages" in given or {"prompt", "completion"} <= given.keys()) and any(map(_is_feedback, rows)):
        raise UsageError(
            f"{source}: one completion a prompt with a label true or false is unpaired feedback, and no format here "
            "reads it. To learn the good ones, keep those rows alone and name {class_path: Completions}."
        )
    if "messages" in given:
        yield Messages(messages=given["messages"], system=given.get("system"), tools=given.get("tools"))
    if "prompt" in given and "completion" in given:
        if (given["prompt"], given["completion"]) == ("instruction", "output"):
            yield Alpaca(**(asked | {"context": asked.get("context")}))
        yield Completions(prompt=given["prompt"], completion=given["completion"], **asked)
    elif "text" in given:
        others = [given[role] for role in ("prompt", "completion", "responses", "first", "second") if role in given]
        if others:
            raise UsageError(
                f"{source}: does {given['text']!r} hold all there is to learn, or is {others[0]!r} part of it? Say so "
                f"by `data.init_args.format`: {{class_path: Texts, init_args: {{text: {given['text']}}}}} for the "
                f"first; where one continues the other {{class_path: Completions, init_args: {{prompt: ..., "
                "completion: ...}}."
            )
        yield Texts(text=given["text"])


def _given(rows: Sequence[Row]) -> dict[str, str]:
    """Columns by the role that their names tell."""
    columns = dict.fromkeys(column for row in rows for column in row)
    for role in BESIDES:
        for name in ALIASES[role]:
            if all(row.get(name) is None for row in rows):
                columns.pop(name, None)
    names = {role: next((alias for alias in aliases if alias in columns), "") for role, aliases in ALIASES.items()}
    return {role: name for role, name in names.items() if name}


def _are_sampled(rows: Sequence[Row]) -> bool:
    return {column for row in rows for column in row} >= SAMPLED


def _is_feedback(row: Row) -> bool:
    return said(row.get("label")).lower() in ("true", "false", "0", "1")


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and not is_messages(value)


def _lines(row: Row, given: Sequence[str]) -> Iterator[Row]:
    """The rows of a row that is a table, with the columns that are as long as those of known names."""
    length = len(row[given[0]])
    lists = {name: values for name, values in row.items() if _is_column(values)}
    table = {name: values for name, values in lists.items() if name in given or len(values) == length}
    return (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=False))


def _check_unread(shape: Format, rows: Sequence[Row], source: str) -> None:
    """Refuse to guess where what a shape leaves unread may change what it means."""
    if isinstance(shape, Columns):
        shape, rows = shape.rows, [line for row in rows for line in _lines(row, shape.columns())]
    read, ask = shape.columns(), "Name shape and columns by `data.init_args.format`"
    telling = OF_PROMPTS if isinstance(shape, Asked) else OF_DIALOGUES
    for column in telling:
        if column not in read and any(_holds_something(row.get(column)) for row in rows):
            raise UsageError(
                f"{source}: looks like {shape}, but {column!r} may belong to the prompt. {ask}: one that reads it (by "
                "`context`, `system`, `history` or `tools`), or this one, if it does not."
            )
    for column in read:
        texts = [row[column] for row in rows if isinstance(row.get(column), str)]
        if 2 * sum(WRITTEN_MESSAGES.match(text) is not None for text in texts) > len(texts):
            raise UsageError(
                f"{source}: column {column!r} holds messages written out as text, which would be learned as it is: "
                f"give them as lists of objects, in JSON Lines or Parquet. {ask}, if they are meant."
            )
    if isinstance(shape, (Rankings, Alpaca)) and getattr(shape, "scores", None) is None:
        responses = shape.answers()[0]
        rivals = [column for row in rows for column in row if column not in read and _ranks(row, column, responses)]
        if rivals or responses in ("answers", "candidates"):
            because = f"{rivals[0]!r} may say otherwise" if rivals else "it may hold equals, or one that is right"
            raise UsageError(
                f"{source}: cannot tell whether {responses!r} is best first: {because}. {ask}, as in {{class_path: "
                f"Rankings, init_args: {{responses: {responses}}}}} if it is, or with {{scores: your_column}}, higher "
                f"is better. Responses in no order are {{class_path: Samples, init_args: {{responses: {responses}}}}}, "
                "for predict alone."
            )


def _holds_something(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else isinstance(value, (list, Mapping)) and value)


def _ranks(row: Row, column: str, responses: str) -> bool:
    """Whether a column holds a number for every response."""
    values, ranked = row[column], row.get(responses)
    if not isinstance(values, list) or not isinstance(ranked, list) or len(values) != len(ranked):
        return False
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def _repeated(rows: Sequence[Row], given: Mapping[str, str], source: str) -> bool:
    """Whether nearly all chosen and rejected texts begin with their prompt once more."""
    texts: list[list[Any]] = [[row.get(given[role]) for role in ("prompt", "chosen", "rejected")] for row in rows]
    plain = [cells for cells in texts if all(isinstance(cell, str) for cell in cells) and cells[0].strip()]
    again = [cells for cells in plain if all(side.startswith(cells[0]) for side in cells[1:])]
    if 0.1 * len(plain) < len(again) < 0.9 * len(plain):
        raise UsageError(
            f"{source}: in {len(again)} of the first {len(plain)} rows chosen and rejected begin with the prompt once "
            "more, in the others not. Name {class_path: Pairs, init_args: {repeated: true}} to take it off and leave "
            "the others out, or {class_path: Pairs} to keep both as they are."
        )
    return bool(again) and len(again) >= 0.9 * len(plain)


def _labels(rows: Sequence[Row], places: Mapping[str, str], source: str) -> tuple[int | str, int | str]:
    """Which label means the first response, which the second."""
    column = places["label"]
    found = {said(row.get(column)) for row in rows} - {"", "nan"}
    found -= {label for label in found if label.lower() in TIED}
    # Not 0 and 1: to some 1 means the second, to others that the first is better.
    known = (*LABELS, (places["first"], places["second"]))
    fitting = [labels for labels in dict.fromkeys(known) if found <= set(map(str, labels))]
    if len(fitting) == 1 and (len(found) == 2 or not found <= {"1", "2"}):
        return fitting[0]
    listed = ", ".join(f"{label!r:.40}" for label in sorted(found)[:5]) or "none"
    example = listed if len(found) == 2 else "1, 2"
    raise UsageError(
        f"{source}: cannot tell which label means the first response: in the first {len(rows)} rows {column!r} holds "
        f"{listed}. Name the two, that of the first response before that of the second, as in {{class_path: "
        f"Comparisons, init_args: {{label: {column}, labels: [{example}]}}}}."
    )


def _likeness(wanted: Sequence[str], found: Sequence[object]) -> float:
    """How many of some columns are there, by name or nearly, above one half of them."""
    matchers = [[difflib.SequenceMatcher(None, name, str(other)) for other in found] for name in wanted]
    return sum(max((matcher.ratio() for matcher in row), default=0) - 0.5 for row in matchers)
