"""Writing the trained policy where transformers finds it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer

from dpo_lightning.export import PROVENANCE, as_classifier, save_policy, write_companions
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.reward import RewardModule


class ExportHF(Callback):
    """Save the policy, its tokenizer and a model card as a Hugging Face folder when training ends.

    Args:
        dir: The folder; hf in the run's log folder unless given.
        adapter: Of a policy with adapters write a whole model that has taken them up, or the adapters alone.
    """

    def __init__(self, dir: str | None = None, adapter: Literal["merge", "save"] = "merge") -> None:
        self.dir, self.adapter = dir, adapter
        self.written: Path | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        """Write the folder, on the first rank; the others help to gather weights that are sharded."""
        assert pl_module.policy is not None
        # All ranks ask for the log folder, since the Trainer broadcasts it.
        folder = Path(self.dir) if self.dir else Path(trainer.log_dir or trainer.default_root_dir) / "hf"
        writes = trainer.is_global_zero
        alone = pl_module.spec.has_adapters and self.adapter == "save"
        data: Any = getattr(trainer, "datamodule", None)
        record: dict[str, Any] = {
            "hyper_parameters": dict(pl_module.hparams),
            "global_step": trainer.global_step,
            PROVENANCE: pl_module.provenance(),
            "data": {PROVENANCE: data.provenance()} if hasattr(data, PROVENANCE) else {},
        }
        if isinstance(pl_module, RewardModule):
            record |= pl_module.offset_record()
        changed: Any = None
        tokenizer: Any = None
        if isinstance(pl_module, RewardModule) and not alone:
            tokenizer = copy.deepcopy(pl_module.spec.load_tokenizer())  # it gets a token for padding
            changed = functools.partial(as_classifier, tokenizer=tokenizer, record=record)
        save_policy(pl_module.spec, pl_module.policy, folder, adapter=self.adapter, writes=writes, changed=changed)
        if not writes:
            return
        tokenizer = tokenizer or pl_module.spec.load_tokenizer()
        write_companions(folder, tokenizer, record, base=pl_module.spec.path, alone=alone)
        self.written = folder
