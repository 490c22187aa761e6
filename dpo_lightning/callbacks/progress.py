"""A progress bar that a person can read."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from dpo_lightning.modules.base import is_logged

SHORT = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with short names: loss, accuracy, margin, and the same of validation.

    Metrics are read when they are logged and kept for the steps between, so that showing them makes no step wait for
    the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, int | str | float | dict[str, float]] = {}

    def on_train_start(self, *args: Any) -> None:
        """Count on from where a run goes on in the middle of an epoch, which Lightning does not announce."""
        super().on_train_start(*args)
        trainer: Any = self.trainer
        self.on_train_epoch_start(trainer)
        bar = self.train_progress_bar
        bar.n = bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.completed

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Metrics without the training stage's prefix and the version number."""
        step = trainer.global_step
        between_log_lines = trainer.training and step > 1 and not is_logged(trainer, step)
        if not between_log_lines:
            metrics = super().get_metrics(trainer, pl_module)
            metrics.pop("v_num", None)
            self._shown = {_short(name): value for name, value in metrics.items()}
        return self._shown


def _short(name: str) -> str:
    stage, _, rest = name.partition("/")
    rest = SHORT.get(rest, rest)
    return rest if stage == "train" else f"{stage} {rest}" if rest else stage
