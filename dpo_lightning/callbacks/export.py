"""Writing the trained policy where transformers finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, Trainer

from dpo_lightning.modules.base import PolicyModule


class ExportHF(Callback):
    """Save the policy and its tokenizer as a Hugging Face folder when training ends.

    Args:
        dir: The folder; hf in the run's log folder unless given.
        adapter: Of a policy with adapters write a whole model that has taken them up, or the adapters alone.
    """

    def __init__(self, dir: str | None = None, adapter: Literal["merge", "save"] = "merge") -> None:
        self.dir, self.adapter = dir, adapter
        self.written: Path | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Write the folder, on the first rank."""
        assert pl_module.policy is not None
        # All ranks ask for the log folder, since the Trainer broadcasts it.
        folder = Path(self.dir) if self.dir else Path(trainer.log_dir or trainer.default_root_dir) / "hf"
        if not trainer.is_global_zero:
            return
        pl_module.spec.save(pl_module.policy, folder, merge=self.adapter == "merge")
        pl_module.spec.load_tokenizer().save_pretrained(folder)
        self.written = folder
