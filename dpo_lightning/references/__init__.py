"""Where reference log-probabilities come from."""

from dpo_lightning.models.fingerprint import fingerprint
from dpo_lightning.references.adapters import AdaptersOff
from dpo_lightning.references.base import FrozenPolicy, Reference
from dpo_lightning.references.cached import Cached
from dpo_lightning.references.frozen import FrozenCopy
from dpo_lightning.references.synced import Synced

__all__ = ["AdaptersOff", "Cached", "FrozenCopy", "FrozenPolicy", "Reference", "Synced", "fingerprint"]
