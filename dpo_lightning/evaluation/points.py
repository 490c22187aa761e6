"""Reward against KL: one measurement of a model, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UsageError
from dpo_lightning.journal import write_whole

KIND = "reward_kl"
TRACKED = "frontier.jsonl"


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a model is worth, and how far it went for it.

    Args:
        method: How it was made, as in DPO; points of one method share a colour.
        label: Which of its runs, as in "beta 0.1"; points of one run are joined by a line.
        step: Optimizer steps it was trained for; None where nothing is trained.
        reward: Mean reward of its samples.
        reward_se: Standard error of it, over prompts; None of a single prompt.
        kl: KL to the reference over whole samples, in nats.
        kl_se: Its standard error; None of a bound and of a single prompt.
        kl_is_bound: Whether the KL is an upper bound, as for best of n.
        prompts: Number of prompts.
        samples: Number of samples.
        prompt_reward_sd: Standard deviation over prompts of the expected reward of a prompt's samples; None of a single
            prompt, and where one has a single sample.
        length_mean: Tokens of a sample, end token included; None where they were not counted.
        length_median: The same.
        finished: Share of samples that came to their end token.
    """

    method: str
    label: str = ""
    step: int | None = None
    reward: float
    reward_se: float | None = None
    kl: float
    kl_se: float | None = None
    kl_is_bound: bool = False
    prompts: int = 0
    samples: int = 0
    prompt_reward_sd: float | None = None
    length_mean: float | None = None
    length_median: float | None = None
    finished: float | None = None

    @property
    def run(self) -> tuple[str, str]:
        """What it shares with the other points of its run."""
        return self.method, self.label


NAMES = tuple(field.name for field in fields(Point))
NUMBERS = ("reward", "kl")


def write_points(path: Path, points: Sequence[Point], settings: dict[str, Any]) -> None:
    """A file of points and what they were measured with."""
    content = {"kind": KIND, "points": [asdict(point) for point in points], "settings": settings}
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_points(places: Iterable[str]) -> list[Point]:
    """Points of files and folders, each but once.

    Args:
        places: Files of ``evaluate reward_kl``, files of TrackRewardKL, or folders that hold such, at any depth.

    Raises:
        UsageError: If there are none, or a file is of another kind.
    """
    points: dict[tuple[Any, ...], Point] = {}
    for place in places:
        found = [point for path in _files(Path(place).expanduser()) for point in read_file(path)]
        if not found:
            raise UsageError(
                f"{place} holds no points: neither a file of `dpo-lightning evaluate reward_kl` nor {TRACKED}, which "
                "the callback TrackRewardKL writes into the folder of the logs."
            )
        points |= {(*point.run, point.step, point.kl, point.reward): point for point in found}
    return list(points.values())


def read_file(path: Path) -> list[Point]:
    """Points of one file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = json.loads(text)
            if not (isinstance(content, dict) and content.get("kind") == KIND):
                raise UsageError(f"{path} is no file of `dpo-lightning evaluate reward_kl`.")
            rows = content["points"]
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from error
    return [_point(row, f"{path}, point {number}") for number, row in enumerate(rows, start=1)]


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        if not place.exists():
            raise UsageError(f"There is no file or folder {place}.")
        return [place]
    whole = [path for path in sorted(place.rglob("*.json")) if _is_ours(path)]
    return [*whole, *sorted(place.rglob(TRACKED))]


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


def _point(row: Any, where: str) -> Point:
    wrong = [name for name in NUMBERS if not isinstance(row, dict) or not isinstance(row.get(name), (int, float))]
    if wrong or not isinstance(row.get("method"), str):
        missing = wrong[0] if wrong else "method"
        raise UsageError(f"{where}: no point of reward and KL, {missing!r} is missing or no {_kind(missing)}.")
    return Point(**{name: row[name] for name in NAMES if name in row})


def _kind(name: str) -> str:
    return "number" if name in NUMBERS else "text"
