"""Checkpoints on disk: written whole or not at all, read as plain data, found again after a run was killed."""

from dpo_lightning.checkpoints.files import CheckpointFiles
from dpo_lightning.checkpoints.find import last_checkpoint

__all__ = ["CheckpointFiles", "last_checkpoint"]
