"""Direct preference optimisation (arXiv:2305.18290) and its family as PyTorch Lightning modules."""

from dpo_lightning.batch import Logps, PreferenceBatch
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.reward import RewardDecoder, RewardSpec
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.dpo import DPOModule
from dpo_lightning.modules.reward import RewardModule
from dpo_lightning.modules.sft import SFTModule
from dpo_lightning.strategies.fsdp2 import FSDP2Strategy

__version__ = "0.1.0"
__all__ = [
    "CausalPolicy",
    "DPOModule",
    "FSDP2Strategy",
    "Logps",
    "PolicySpec",
    "PreferenceBatch",
    "PreferenceDataModule",
    "RewardDecoder",
    "RewardModule",
    "RewardSpec",
    "SFTModule",
]
