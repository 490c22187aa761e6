"""How far judges agree with each other, and with people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.statistics import agreement as agreement_of
from dpo_lightning.evaluation.statistics import cohen_kappa, rate_interval
from dpo_lightning.evaluation.verdicts import KINDS, Rating, by_name, read_ratings
from dpo_lightning.journal import write_whole


def agreement(files: list[str], out: str, *, names: list[str] | None = None) -> Path:
    """Share of comparisons on which raters agree, for every two of them, with an interval and Cohen's kappa.

    Two verdicts agree by 1 less how far apart they are: by 1 where they are the same, by one half where one of them is
    a tie, by 0 where they are opposite.

    Args:
        files: A file a rater, two or more: verdicts that `evaluate win_rate` keeps, or preference data with labels.
        out: JSON file of the result.
        names: What the raters are called; by default their files.

    Returns:
        The result.

    Raises:
        UsageError: If two of them have no comparison in common.
    """
    called = names or _stems(files)
    if len(files) < 2 or len(called) != len(files):
        raise UsageError(
            f"Agreement is of two raters or more, with a name each; got {len(files)} files, names {called}."
        )
    raters = dict(zip(called, [read_ratings(path) for path in files], strict=True))
    pairs = [{"raters": [a, b], **compare(raters[a], raters[b], (a, b))} for a, b in combinations(raters, 2)]
    rates = {name: _shares(ratings) for name, ratings in raters.items()}
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"kind": "agreement", "pairs": pairs, "raters": rates, "files": dict(zip(called, files, strict=True))}
    write_whole(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(table(called, pairs))
    return target


def compare(first: Sequence[Rating], second: Sequence[Rating], called: Sequence[str]) -> dict[str, Any]:
    """How far two raters agree on the comparisons that both have a verdict of.

    Without ties is the share on which both prefer the same response, among those on which both prefer one, however
    slightly: 0.75 prefers the first.

    Args:
        first: Ratings of a rater.
        second: Those of another.
        called: Their names.

    Raises:
        UsageError: If there is no such comparison.
    """
    kind = next((kind for kind in KINDS if all(kind in one.names for one in [*first, *second])), None)
    if kind is None:
        raise UsageError(f"{called[0]} and {called[1]} know comparisons by different things; give both texts, or rows.")
    known = [by_name(list(ratings), kind, name) for ratings, name in zip((first, second), called, strict=True)]
    common = [(known[0][name], known[1][name]) for name in known[0] if name in known[1]]
    values = [(a.known_by(kind), b.known_by(kind), a.prompt) for a, b in common]
    both = [(a, b, prompt) for a, b, prompt in values if a is not None and b is not None]
    if not both:
        raise UsageError(f"{called[0]} and {called[1]} have no comparison in common of which both have a verdict.")
    a, b, prompts = zip(*both, strict=True)
    agreed = agreement_of(a, b)
    decided = [float((x > 0.5) == (y > 0.5)) for x, y in zip(a, b, strict=True) if 0.5 not in (x, y)]
    return {
        "agreement": float(agreed.mean()),
        "interval": list(rate_interval(agreed, prompts)),
        "kappa": cohen_kappa(a, b),
        "compared": len(both),
        "without_verdict": len(common) - len(both),
        "not_in_both": len(known[0]) + len(known[1]) - 2 * len(common),
        "without_ties": {"agreement": float(np.mean(decided)) if decided else None, "compared": len(decided)},
    }


def table(names: Sequence[str], pairs: Sequence[dict[str, Any]]) -> str:
    """Agreement as a matrix, and each pair's interval and kappa."""
    found = {frozenset(pair["raters"]): pair for pair in pairs}
    width = max(10, *map(len, names)) + 2
    lines = ["agreement".ljust(width) + "".join(name.rjust(width) for name in names)]
    for name in names:
        cells = ["" if other == name else f"{found[frozenset((name, other))]['agreement']:.1%}" for other in names]
        lines.append(name.ljust(width) + "".join(cell.rjust(width) for cell in cells))
    for pair in pairs:
        low, high = pair["interval"]
        kappa = "-" if pair["kappa"] is None else f"{pair['kappa']:.3f}"
        interval = f"({low:.1%} to {high:.1%})"
        both = " and ".join(pair["raters"])
        lines.append(f"{both}: {pair['agreement']:.1%} {interval} of {pair['compared']}, kappa {kappa}")
    return "\n".join(lines)


def _shares(ratings: Sequence[Rating]) -> dict[str, Any]:
    values = [rating.value for rating in ratings]
    known = [value for value in values if value is not None]
    return {"verdicts": len(known), "ties": sum(value == 0.5 for value in known), "none": len(values) - len(known)}


def _stems(files: Sequence[str]) -> list[str]:
    """Names of files up to the first dot, or their paths where those are not all different."""
    stems = [Path(path).name.partition(".")[0] for path in files]
    if len(set(stems)) < len(stems):
        stems = [str(path) for path in files]
    if len(set(stems)) < len(stems):
        raise UsageError(f"A file is named twice: {', '.join(files)}. Name each rater once.")
    return stems
