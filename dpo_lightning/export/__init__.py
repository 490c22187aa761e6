"""From checkpoints to folders that transformers reads."""

from dpo_lightning.export.classifier import as_classifier
from dpo_lightning.export.convert import export, tokenizer_of
from dpo_lightning.export.folder import write_companions
from dpo_lightning.export.model import save_policy
from dpo_lightning.modules.base import PROVENANCE

__all__ = ["PROVENANCE", "as_classifier", "export", "save_policy", "tokenizer_of", "write_companions"]
