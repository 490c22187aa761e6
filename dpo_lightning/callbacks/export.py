"""Writing the trained policy where transformers finds it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from dpo_lightning.modules.base import PolicyModule


class ExportHF(Callback):
    """Save the policy and its tokenizer as a Hugging Face folder when training ends.

    Args:
        dir: The folder; hf in the run's log folder unless given.
    """

    def __init__(self, dir: str | None = None) -> None:
        self.dir = dir
        self.written: Path | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Write the folder, on the first rank."""
        assert pl_module.policy is not None
        # All ranks ask for the log folder, since the Trainer broadcasts it.
        folder = Path(self.dir) if self.dir else Path(trainer.log_dir or trainer.default_root_dir) / "hf"
        if not trainer.is_global_zero:
            return
        pl_module.policy.model.save_pretrained(folder)
        pl_module.spec.load_tokenizer().save_pretrained(folder)
        self.written = folder
