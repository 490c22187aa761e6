"""Data reports beside a run's logs and in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dpo_lightning.data.report import DataReport

FILE = "data_report.json"


def publish(reports: Sequence[DataReport], trainer: Trainer) -> None:
    """Write reports into the log folder, for a Trainer that has a logger; to be called on all ranks."""
    if not trainer.loggers:
        return
    log_dir = trainer.log_dir  # asked on all ranks, since it is broadcast
    if log_dir is None or not trainer.is_global_zero:
        return
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    content = json.dumps([report.to_json() for report in reports], indent=2, ensure_ascii=False)
    (Path(log_dir) / FILE).write_text(content + "\n", encoding="utf-8")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _to_tensorboard(reports, logger)


def _to_tensorboard(reports: Sequence[DataReport], logger: TensorBoardLogger) -> None:
    for place, report in enumerate(reports):
        # Several sources of a split, each under a tag of its own.
        twins = [other for other in reports[:place] if other.split == report.split]
        tag = f"data/{report.split}" + (f"_{len(twins) + 1}" if twins else "")
        logger.experiment.add_text(tag, report.markdown())
        for name, lengths in report.lengths.items():
            values = np.repeat([*lengths], [*lengths.values()])
            logger.experiment.add_histogram(f"{tag}/{name}_tokens", values)
