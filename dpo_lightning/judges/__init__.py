"""What says which of two responses is better."""

from dpo_lightning.judges.base import Comparison, Judge
from dpo_lightning.judges.llm import Bias, LLMJudge, Verdict, position_bias
from dpo_lightning.judges.score import ByScore

__all__ = ["Bias", "ByScore", "Comparison", "Judge", "LLMJudge", "Verdict", "position_bias"]
