"""Lightning strategies: how training is divided among devices."""

from dpo_lightning.strategies.fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
