"""What the columns of a source mean, found from its first rows, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_lightning.data.cells import is_messages
from dpo_lightning.data.example import PreferenceExample, UnusableRow
from dpo_lightning.data.formats import Format, Pairs, SharedPrompts, ShareGPT, Transcripts
from dpo_lightning.data.rankings import Columns, Comparisons, Rankings
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
    "first": ("output_1", "response_1", "answer_1", "completion_1", "output_a", "response_a", "answer_a"),
    "second": ("output_2", "response_2", "answer_2", "completion_2", "output_b", "response_b", "answer_b"),
    "label": ("label", "preference", "preferred", "winner", "better"),
    "completion": ("completion", "response", "answer", "output", "target"),
    "text": ("text",),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
}
LABELS: tuple[tuple[int | str, int | str], ...] = (
    *((1, 2), (0, 1), ("output_1", "output_2"), ("response_1", "response_2"), ("model_a", "model_b")),
    *(("A", "B"), ("a", "b"), ("first", "second")),
)
SHAPES = (
    *(Pairs(), ShareGPT(), SharedPrompts(), Transcripts(), Rankings(), Comparisons()),
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
            return shape
        tried.append((shape, problem))
    known = "\n".join(f"  {shape}" for shape in SHAPES)
    found = ", ".join(map(repr, columns)) if columns else f"{type(rows[0]).__name__} in place of an object"
    if tried:
        shape, problem = tried[0]
        nearest = f"{shape}, but of most rows: {problem}"
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
    misfits = [problem for problem in problems if problem is not None]
    # Any two texts may begin alike by chance, so of these nearly all have to.
    share = 0.1 if isinstance(shape, SharedPrompts) else 0.5
    return misfits[0] if len(misfits) > share * len(problems) else None


def _problems(shape: Format, row: Row) -> list[UnusableRow | None]:
    try:
        return [None if isinstance(item, PreferenceExample) else item for item in shape.read(row)]
    except UnusableRow as problem:
        return [problem]


def _candidates(rows: Sequence[Row], source: str) -> Iterator[Format]:
    """Shapes for which all columns are there, likeliest first."""
    columns = dict.fromkeys(column for row in rows for column in row)
    names = {role: next((alias for alias in aliases if alias in columns), "") for role, aliases in ALIASES.items()}
    given = {role: name for role, name in names.items() if name}
    if given and all(_is_column(row.get(name)) for name in given.values() for row in rows):
        inner = [dict(zip(given.values(), values, strict=False)) for row in rows for values in _across(row, given)]
        yield from (Columns(rows=shape) for shape in _candidates(inner, source) if _problem(shape, inner) is None)
    prompt = given.get("prompt") or given.get("messages")
    asked: dict[str, Any] = {name: given[name] for name in ("system", "tools") if name in given}
    context = next((name for name in ("input", "context") if name in columns), None)
    if prompt == "instruction" and context is not None:
        asked["context"] = context
    if "chosen" in given and "rejected" in given:
        sides: dict[str, Any] = {"chosen": given["chosen"], "rejected": given["rejected"]}
        if "prompt" in given:
            yield Pairs(prompt=given["prompt"], **sides, **asked, repeated=_repeated(rows, given))
        elif prompt:
            yield ShareGPT(prompt=prompt, **sides, **asked)
        else:
            yield Transcripts(**sides)
            yield SharedPrompts(**sides, tools=given.get("tools"))
    if prompt and "responses" in given:
        yield Rankings(prompt=prompt, responses=given["responses"], scores=given.get("scores"), **asked)
    if prompt and all(role in given for role in ("first", "second", "label")):
        places = {role: given[role] for role in ("first", "second", "label")}
        yield Comparisons(prompt=prompt, **places, **asked, labels=_labels(rows, given["label"], source))
    if "chosen" in given or "rejected" in given:
        return  # half a pair is nothing for SFT
    if "messages" in given:
        yield Messages(messages=given["messages"], tools=given.get("tools"))
    if "prompt" in given and "completion" in given and given["prompt"] != given["completion"]:
        if any(isinstance(row.get("label"), bool) for row in rows):
            raise UsageError(
                f"{source}: one completion a prompt with a label true or false is unpaired feedback, and no format "
                "here reads it. To learn the good ones, keep those rows alone and name {class_path: Completions}."
            )
        if (given["prompt"], given["completion"]) == ("instruction", "output"):
            yield Alpaca(**(asked | {"context": asked.get("context")}))
        yield Completions(prompt=given["prompt"], completion=given["completion"], **asked)
    elif "text" in given and "prompt" not in given:
        yield Texts(text=given["text"])
    elif "text" in given:
        raise UsageError(
            f"{source}: does {given['text']!r} continue {given['prompt']!r} or hold all there is to learn? Say so by "
            f"`data.init_args.format`: {{class_path: Texts, init_args: {{text: {given['text']}, prompt: "
            f"{given['prompt']}}}}}, or without `prompt`."
        )


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and not is_messages(value)


def _across(row: Row, given: Mapping[str, str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(row.get(name) for name in given.values()), strict=False)


def _repeated(rows: Sequence[Row], given: Mapping[str, str]) -> bool:
    """Whether nearly all chosen and rejected texts begin with their prompt once more."""
    texts: list[list[Any]] = [[row.get(given[role]) for role in ("prompt", "chosen", "rejected")] for row in rows]
    plain = [cells for cells in texts if all(isinstance(cell, str) for cell in cells) and cells[0].strip()]
    again = [cells for cells in plain if all(side.startswith(cells[0]) for side in cells[1:])]
    return bool(plain) and len(again) >= 0.9 * len(plain)


def _labels(rows: Sequence[Row], column: str, source: str) -> tuple[int | str, int | str]:
    """Which label means the first response, which the second."""
    said = {str(row.get(column)).strip() for row in rows} - {"tie", "None"}
    fitting = [labels for labels in LABELS if said <= set(map(str, labels))]
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        f"{source}: cannot tell which label means the first response: in the first {len(rows)} rows {column!r} holds "
        f"{', '.join(sorted(said)[:5])}. Name the two, that of the first response before that of the second, as in "
        f"{{class_path: Comparisons, init_args: {{label: {column}, labels: [1, 2]}}}}."
    )


def _likeness(wanted: Sequence[str], found: Sequence[str]) -> float:
    """How many of some columns are there, by name or nearly."""
    near = [max((difflib.SequenceMatcher(None, name, other).ratio() for other in found), default=0) for name in wanted]
    return sum(near) / len(near)
