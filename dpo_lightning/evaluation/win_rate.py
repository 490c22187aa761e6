"""How often a model's responses are better than given ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lightning.data.sources import Source
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.best_of_n import best_of_each
from dpo_lightning.evaluation.sides import Matched, Partners, match, partners, read_side, unmatched
from dpo_lightning.evaluation.statistics import rate_interval
from dpo_lightning.evaluation.verdicts import prompt_name
from dpo_lightning.journal import SETTINGS, write_whole
from dpo_lightning.judges import Comparison, Judge
from dpo_lightning.recipes import to_plain
from dpo_lightning.scorers import Scorer

LIKE = 0.8  # shorter over longer, in characters, from which on two responses count as of like length


def win_rate(
    samples: str,
    against: str | Source,
    out: str,
    *,
    judge: Judge,
    column: str = "chosen",
    samples_column: str = "chosen",
    prompt_column: str = "prompt",
    against_temperature: float | None = None,
    best_of: list[int] | None = None,
    chooser: Scorer | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """How often samples are better than given responses, by a judge, at each temperature.

    A tie counts one half. The judge's answers and the verdicts lie beside the result, and so do a chooser's scores.
    Where one side has more samples of a prompt than the other, those without a partner are left out, and counted.

    Args:
        samples: File of samples, of one temperature or several; or of data, with responses in a column.
        against: File of other samples, or of data, with the responses to compare with in a column; or any source of a
            data module, such as HubDataset.
        out: JSON file of the result.
        judge: What says which of two responses is better.
        column: Column of the responses to compare with, where those are data.
        samples_column: Column of the responses to judge, where those are data.
        prompt_column: Column of the prompt in data.
        against_temperature: Which samples to compare with, where they are of several temperatures.
        best_of: Numbers N, as in [1,4,16]; for each the best of the first N samples of a prompt alone is judged,
            as the chooser finds it.
        chooser: What picks the best of N, such as a reward model.
        overwrite: Ask the judge anew, whatever answers lie beside the result.

    Returns:
        The result, and the verdicts, one line a comparison.

    Raises:
        UsageError: If a prompt of the samples has no response to compare with, or fewer samples than `best_of` says.
    """
    _check(best_of, chooser)
    target = Path(out)
    if target.suffix != ".json":
        raise UsageError(f"The result is a JSON file; let its name end in .json, as in {target.with_suffix('.json')}.")
    sides = read_side(samples, samples_column, prompt_column)
    others = read_side(against, column, prompt_column, against_temperature)
    both = partners(sides, others, str(against))
    matched = match(both)
    target.parent.mkdir(parents=True, exist_ok=True)
    if best_of is not None and chooser is not None:
        matched = best_of_each(matched, sorted(set(best_of)), chooser, target.with_suffix(".scores.jsonl"))
    comparisons = [Comparison(one.prompt, one.first, one.second) for one in matched]
    answers = target.with_suffix(".answers.jsonl")
    if overwrite:
        for path in (answers, answers.with_name(answers.name + SETTINGS)):
            path.unlink(missing_ok=True)
    verdicts = judge.compare(comparisons, answers)
    beside = target.with_suffix(".verdicts.jsonl")
    write_whole(beside, "".join(_line(one, verdict) + "\n" for one, verdict in zip(matched, verdicts, strict=True)))
    rows = _rows(both, matched, verdicts)
    settings = {
        "samples": samples, "against": str(against), "column": column, "samples_column": samples_column,
        "prompt_column": prompt_column, "against_temperature": against_temperature,
        "judge": to_plain(judge), "chooser": to_plain(chooser),
    }  # fmt: skip
    write_whole(target, json.dumps({"kind": "win_rate", "rows": rows, "settings": settings}, indent=2) + "\n")
    print("\n".join(in_words(row) for row in rows))
    return [target, beside]


def summary(matched: Sequence[Matched], verdicts: Sequence[float | None]) -> dict[str, Any]:
    """Win rate with its interval, what it was counted from, and how long both sides are.

    Args:
        matched: Comparisons.
        verdicts: 1 where the first is better, 0 where the second is, one half for a tie, None where it is not known.
    """
    read = [(one, verdict) for one, verdict in zip(matched, verdicts, strict=True) if verdict is not None]
    values = [verdict for _, verdict in read]
    alike = [(one, verdict) for one, verdict in read if _likeness(one) >= LIKE]
    return {
        "win_rate": _mean(values),
        "interval": _interval(read),
        "compared": len(read),
        "prompts": len({prompt_name(one.prompt) for one, _ in read}),
        "wins": sum(value > 0.5 for value in values),
        "ties": sum(value == 0.5 for value in values),
        "losses": sum(value < 0.5 for value in values),
        "unreadable": len(matched) - len(read),
        "length": {
            "tokens": _mean([one.tokens[0] for one, _ in read if one.tokens[0] is not None]),
            "tokens_against": _mean([one.tokens[1] for one, _ in read if one.tokens[1] is not None]),
            "characters": _mean([len(one.first) for one, _ in read]),
            "characters_against": _mean([len(one.second) for one, _ in read]),
            "share_longer": _mean([float(len(one.first) > len(one.second)) for one, _ in read]),
        },
        "of_like_length": {
            "win_rate": _mean([verdict for _, verdict in alike]),
            "interval": _interval(alike),
            "compared": len(alike),
        },
    }


def in_words(row: dict[str, Any]) -> str:
    """A row as a line for people."""
    name = "given responses" if row["temperature"] is None else f"temperature {row['temperature']:g}"
    if row["best_of"] is not None:
        name += f", best of {row['best_of']}"
    counts = f"{row['wins']} wins, {row['ties']} ties, {row['losses']} losses, {row['unreadable']} unreadable"
    alike, length = row["of_like_length"], row["length"]
    lengths = f"characters {_shown(length['characters'], '.0f')} against {_shown(length['characters_against'], '.0f')}"
    controlled = f"of like length {_shown(alike['win_rate'])}{_within(alike)} of {alike['compared']}"
    rate = f"win rate {_shown(row['win_rate'])}{_within(row)}"
    return "   ".join([f"{name:16}", rate, counts, lengths, controlled, *_left(row["without_partner"])])


def _left(without_partner: dict[str, int]) -> list[str]:
    """What was compared with nothing, where there is such."""
    named = {"samples": "of the samples", "against": "of the other side"}
    left = [f"{count} {named[side]}" for side, count in without_partner.items() if count]
    return [f"without a partner {' and '.join(left)}"] if left else []


def _check(best_of: list[int] | None, chooser: Scorer | None) -> None:
    if best_of is None and chooser is None:
        return
    if chooser is None:
        raise UsageError(
            f"`best_of` {best_of} needs a `chooser` that picks the best, such as RewardModel with its `path`."
        )
    if not best_of or min(best_of) < 1:
        raise UsageError(
            "`chooser` picks the best of N samples; say of how many by `best_of`, numbers of 1 or more as in [1,4,16], "
            f"got {best_of}."
        )


def _rows(
    both: Sequence[Partners], matched: Sequence[Matched], verdicts: Sequence[float | None]
) -> list[dict[str, Any]]:
    """A row for each temperature, and each N of which the best was chosen."""
    together: dict[tuple[float | None, int | None], list[tuple[Matched, float | None]]] = {}
    for one, verdict in zip(matched, verdicts, strict=True):
        together.setdefault((one.temperature, one.best_of), []).append((one, verdict))
    return [
        {
            "temperature": temperature,
            "best_of": number,
            **summary(*zip(*own, strict=True)),
            "without_partner": unmatched([pair for pair in both if pair[0].temperature == temperature])._asdict(),
        }
        for (temperature, number), own in together.items()
    ]


def _shown(value: float | None, style: str = ".3f") -> str:
    return "-" if value is None else format(value, style)


def _within(row: dict[str, Any]) -> str:
    return "" if row["interval"] is None else " ({:.3f} to {:.3f})".format(*row["interval"])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _interval(read: Sequence[tuple[Matched, float]]) -> list[float] | None:
    """Interval of a rate; comparisons of one prompt are alike, in whichever rows it stands."""
    if not read:
        return None
    return list(rate_interval([verdict for _, verdict in read], [prompt_name(one.prompt) for one, _ in read]))


def _likeness(one: Matched) -> float:
    """Length of the shorter over that of the longer."""
    shorter, longer = sorted((len(one.first), len(one.second)))
    return shorter / longer if longer else 1.0


def _line(one: Matched, verdict: float | None) -> str:
    return json.dumps({**one._asdict(), "verdict": verdict}, ensure_ascii=False)
