"""Callbacks for any Trainer: samples, a plan of memory, export, a progress bar with short names."""

from dpo_lightning.callbacks.export import ExportHF
from dpo_lightning.callbacks.memory_plan import MemoryPlan
from dpo_lightning.callbacks.progress import ProgressBar
from dpo_lightning.callbacks.samples import LogSamples

__all__ = ["ExportHF", "LogSamples", "MemoryPlan", "ProgressBar"]
