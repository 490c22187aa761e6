"""What gives a response a number: functions, classifiers, reward models."""

from dpo_lightning.scorers.base import Prompt, Scorer
from dpo_lightning.scorers.reward_model import RewardModel

__all__ = ["Prompt", "RewardModel", "Scorer"]
