"""Reward against KL of many runs: a picture, its numbers, and what a method has over others at equal KL."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.envelope import Vertex, advantage, envelope, levels, reward_at
from dpo_lightning.evaluation.plot import Scale, draw
from dpo_lightning.evaluation.points import NAMES, Point, read_points
from dpo_lightning.journal import write_whole

Table = list[list[str]]
SAME = 1e-4  # nats: the reference itself, but for rounding


def frontier(runs: list[str], out: str, *, baseline: str = "DPO", scale: Scale = "linear") -> list[Path]:
    """Draw reward against KL of many evaluations, and compare methods at equal KL.

    Args:
        runs: Files of `evaluate reward_kl`, files that the callback TrackRewardKL wrote, or folders that hold such.
        out: The picture, a PNG; its numbers go into a CSV beside it, and the comparison into another.
        baseline: The method that the others are compared with.
        scale: linear, or sqrt, which spreads small KL out.

    Returns:
        Picture and tables.

    Raises:
        UsageError: If there is nothing to draw, or matplotlib is missing.
    """
    picture = Path(out)
    if picture.suffix != ".png":
        raise UsageError(f"The picture is a PNG; let its name end in .png, as in {picture.with_suffix('.png')}.")
    points = sorted(read_points(runs), key=lambda point: (point.kl_is_bound, point.run, point.step or 0))
    figure = draw(points, scale)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    numbers, comparison = picture.with_suffix(".csv"), picture.with_suffix(".equal_kl.csv")
    write_whole(numbers, _csv([list(NAMES), *([_cell(value) for value in asdict(p).values()] for p in points)]))
    table = equal_kl(points, baseline)
    write_whole(comparison, _csv(table))
    print(f"Reward at equal KL (nats), on the upper envelope of each method; and what {baseline} has over it")
    print(_aligned(table))
    return [picture, numbers, comparison]


def equal_kl(points: Sequence[Point], baseline: str = "DPO") -> Table:
    """Reward of each method at round values of KL, and the advantage of one method over the others.

    Args:
        points: Of all methods; those with a bound of KL for their KL come out too low, never too high.
        baseline: Whose advantage is told.

    Returns:
        Rows of cells, the first of them the head. Advantages are means over the KL that both methods reach. Errors are
        upper bounds, as :func:`reward_at` and :func:`advantage` have them.
    """
    points = [replace(point, kl=0.0) if abs(point.kl) < SAME else point for point in points]
    methods = list(dict.fromkeys(point.method for point in points))
    curves = {method: envelope(_from_reference(points, method)) for method in methods}
    own = curves.get(baseline)
    columns = levels(own if own else max(curves.values(), key=lambda curve: curve[-1].kl))
    table = [["method", *(f"KL {level:g}" for level in columns), f"{baseline} over it", "least", "most", "for KL"]]
    for method in sorted(methods, key=lambda name: name != baseline):
        rewards = [_reward(curves[method], level) for level in columns]
        table.append([method, *rewards, *_advantage(own, curves[method], method == baseline)])
    return table


def _from_reference(points: Sequence[Point], method: str) -> list[Point]:
    """Points of a method; every method begins at the reference, which may have been measured with another one alone."""
    own = [point for point in points if point.method == method]
    if any(point.kl == 0 for point in own):
        return own
    reference = [point for point in points if point.kl == 0]
    return [*own, *sorted(reference, key=lambda point: point.samples)[-1:]]


def _reward(curve: Sequence[Vertex], kl: float) -> str:
    found = reward_at(curve, kl)
    if found is None or kl > curve[-1].kl:
        return "-"
    reward, se = found
    return f"{reward:.3f}{_error(se)}"


def _advantage(own: Sequence[Vertex] | None, other: Sequence[Vertex], same: bool) -> list[str]:
    found = None if own is None or same else advantage(own, other)
    if found is None:
        return ["-"] * 4
    mean = f"{found.mean:+.3f}{_error(found.se)}"
    return [mean, f"{found.least:+.3f}", f"{found.most:+.3f}", f"{found.low:.3g} to {found.high:.3g}"]


def _error(se: float | None) -> str:
    return f" ± {se:.3f}" if se else ""


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _aligned(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in cells)
        for row in table
        for cells in [list(enumerate(zip(row, widths, strict=True)))]
    )
