"""The checkpoint from which a run that ended before its end goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dpo_lightning.checkpoints.reading import META, has_all_parts, is_sharded, read_without_weights
from dpo_lightning.errors import UsageError

log = logging.getLogger(__name__)
NUMBERED = "version_"  # how loggers name the folders of runs
STOPPED = "stopped-step="  # how the checkpoint of a run that was told to stop begins


def folder_name(version: int | str) -> str:
    """How loggers name the folder of a run."""
    return version if isinstance(version, str) else f"{NUMBERED}{version}"


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of most optimizer steps in a folder, of those that are whole and can be resumed from.

    Names do not matter: ``last.ckpt`` may be missing, or a link to nothing, where a run was killed. Damaged ones are
    left out with a warning; so are, without one, unfinished folders of shards and checkpoints of weights alone.
    """
    best: tuple[tuple[int, int], Path] | None = None
    for path in sorted({path.resolve() for path in Path(folder).glob("*.ckpt")}):
        if not path.exists() or (path.is_dir() and not is_sharded(path)):
            continue
        try:
            header = read_without_weights(path)
            if path.is_dir() and not has_all_parts(path):
                raise UsageError(f"{path} lacks files that ranks have written.")
        except UsageError as error:
            log.warning(f"Left out: {error}")
            continue
        if path.is_file() and "optimizer_states" not in header:
            continue
        age = (steps(header), (path / META if path.is_dir() else path).stat().st_mtime_ns)
        if best is None or age > best[0]:
            best = age, path
    return None if best is None else best[1]


def steps(checkpoint: dict[str, Any]) -> int:
    """Optimizer steps that a checkpoint stands behind."""
    return int(checkpoint.get("global_step", 0))
