"""What gives a response a number: functions, classifiers, reward models."""

from dpo_lightning.scorers.base import Prompt, Scorer, Unscored, scores_of
from dpo_lightning.scorers.book import ScoreBook
from dpo_lightning.scorers.classifier import Classifier
from dpo_lightning.scorers.function import Function
from dpo_lightning.scorers.reward_model import RewardModel

__all__ = ["Classifier", "Function", "Prompt", "RewardModel", "ScoreBook", "Scorer", "Unscored", "scores_of"]
