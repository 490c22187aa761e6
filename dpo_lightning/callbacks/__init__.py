"""Callbacks: samples, rewards, reward against KL, a plan of memory, export, a stop on notice, a progress bar."""

from dpo_lightning.callbacks.export import ExportHF
from dpo_lightning.callbacks.memory_plan import MemoryPlan
from dpo_lightning.callbacks.progress import ProgressBar
from dpo_lightning.callbacks.reward_kl import TrackRewardKL
from dpo_lightning.callbacks.rewards import WriteRewards
from dpo_lightning.callbacks.samples import LogSamples
from dpo_lightning.callbacks.stop import GracefulStop

__all__ = ["ExportHF", "GracefulStop", "LogSamples", "MemoryPlan", "ProgressBar", "TrackRewardKL", "WriteRewards"]
