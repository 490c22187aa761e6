"""A progress bar that a person can read."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHORT = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with short names: loss, accuracy, margin, and the same of validation."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Metrics without the training stage's prefix and the version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {_short(name): value for name, value in metrics.items()}


def _short(name: str) -> str:
    stage, _, rest = name.partition("/")
    rest = SHORT.get(rest, rest)
    return rest if stage == "train" else f"{stage} {rest}" if rest else stage
