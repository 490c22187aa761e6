"""Labels as rows that the data module reads by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_lightning.labelling.groups import Group
from dpo_lightning.labelling.labellers import Label, Labels
from dpo_lightning.labelling.tally import Tally

Row = dict[str, Any]
TIE = 0.5


def pairs(group: Group, labels: Labels, tally: Tally) -> list[Row]:
    """A row for each pair with a better response."""
    rows = []
    for label in labels.compared:
        if label.verdict is None or label.verdict == TIE:
            continue
        better = (label.first, label.second) if label.verdict > TIE else (label.second, label.first)
        chosen, rejected = (group.responses[place] for place in better)
        row: Row = {"prompt": group.prompt, "chosen": chosen, "rejected": rejected, **group.columns()}
        if labels.scores is None:
            row["verdict"] = max(label.verdict, 1 - label.verdict)
        else:
            row["chosen_score"], row["rejected_score"] = (labels.scores[place] for place in better)
            tally.scored(row["chosen_score"], row["rejected_score"])
        rows.append(row)
    return rows


def comparisons(group: Group, labels: Labels, tally: Tally) -> list[Row]:
    """A row for each pair with a verdict, ties too."""
    rows = []
    for label in labels.compared:
        if label.verdict is None:
            continue
        places = (label.first, label.second)
        row: Row = {"prompt": group.prompt, "label": _word(label), **group.columns(), "verdict": label.verdict}
        row |= {f"output_{number}": group.responses[place] for number, place in enumerate(places, start=1)}
        if labels.scores is not None:
            scores = [labels.scores[place] for place in places]
            row |= {f"output_{number}_score": score for number, score in enumerate(scores, start=1)}
            if label.verdict != TIE:
                tally.scored(*(scores if label.verdict > TIE else reversed(scores)))
        rows.append(row)
    return rows


def rankings(group: Group, labels: Labels, tally: Tally) -> list[Row]:
    """One row with all responses, best first."""
    levels, scores = labels.levels, labels.scores
    assert levels is not None
    assert scores is not None
    order = sorted(range(len(levels)), key=lambda place: -levels[place])
    row: Row = {
        "prompt": group.prompt,
        "responses": [group.responses[place] for place in order],
        "scores": [levels[place] for place in order],
        **group.columns(),
    }
    if levels is not scores:
        row["true_scores"] = [scores[place] for place in order]
    tally.scored(scores[order[0]], scores[order[-1]])
    return [row]


def _word(label: Label) -> str:
    if label.verdict == TIE:
        return "tie"
    return "output_1" if label.verdict is not None and label.verdict > TIE else "output_2"


SHAPES: dict[str, Callable[[Group, Labels, Tally], list[Row]]] = {
    "pairs": pairs,
    "rankings": rankings,
    "comparisons": comparisons,
}
