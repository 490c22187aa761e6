"""What gives a response a number: functions, classifiers, reward models."""

from dpo_lightning.scorers.base import Prompt, Scorer

__all__ = ["Prompt", "Scorer"]
