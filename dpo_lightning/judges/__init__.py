"""What says which of two responses is better."""

from dpo_lightning.judges.base import Comparison, Judge

__all__ = ["Comparison", "Judge"]
