"""A plan of memory before training, and words where memory runs out."""

from __future__ import annotations

import logging

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dpo_lightning.batch import Batch, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.memory.available import available
from dpo_lightning.memory.plan import GB, Plan, plan
from dpo_lightning.memory.rehearsal import Case
from dpo_lightning.memory.remedies import remedies
from dpo_lightning.memory.shapes import lengths_of
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.referenced import ReferencedModule

log = logging.getLogger(__name__)

ROWS_SHOWN = 8
LESS = 0.8  # of what a plan said, where that was too much


class MemoryPlan(Callback):
    """Say before any weight is loaded what the heaviest micro-batch will take, and refuse to begin where it cannot fit.

    Needs a module of this package whose policy is not in memory yet, and a data module that tells its ``heaviest``
    micro-batch; with others nothing is said.

    Args:
        refuse: Whether a run that cannot fit is refused; otherwise it is warned of.
    """

    def __init__(self, refuse: bool = True) -> None:
        self.refuse = refuse
        self.plan: Plan | None = None
        self._running: Batch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the plan and compare it with what there is.

        Raises:
            UsageError: If the run cannot fit; the message has the cheapest remedies.
        """
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or not _can_be_planned(pl_module) or not hasattr(data, "heaviest"):
            return
        assert isinstance(pl_module, PolicyModule)
        case = _case(pl_module, data.heaviest())  # type: ignore[union-attr]
        try:
            self.plan = plan(pl_module, case)
        except UsageError:
            raise
        except Exception as error:  # a model or an optimizer of the user's own may not take tensors without storage
            log.warning(f"There is no plan of memory: {type(error).__name__}: {error}")
            return
        rank_zero_info(str(self.plan))
        room = _room(trainer, pl_module)
        if room is not None and self.plan.peak > room:
            advice = _advice(pl_module, case, room)
            message = (
                f"Training needs {self.plan.peak / GB:.2f} GB, and {room / GB:.2f} GB are free.\n{self.plan}\n{advice}"
            )
            if self.refuse:
                raise UsageError(message)
            log.warning(message)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep the batch in sight."""
        self._running = batch

    def on_train_batch_end(self, *args: object) -> None:
        """Let go of it."""
        self._running = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where memory ran out, say with which batch and what helps."""
        if self._running is None or not _can_be_planned(pl_module) or not _is_out_of_memory(exception):
            return
        assert isinstance(pl_module, PolicyModule)
        heaviest = max(self._running.pieces, key=lambda piece: len(piece.input_ids))
        batch = _on_host(heaviest)
        self._running = None
        log.error(f"Memory ran out with this batch: {describe(batch)}.")
        case = _case(pl_module, batch)
        log.error(_advice(pl_module, case, int(LESS * plan(pl_module, case).peak)))


def describe(batch: PreferenceBatch) -> str:
    """How large a batch is, and where its examples come from."""
    lengths = lengths_of(batch)
    prompt, response = max(prompt for prompt, _ in lengths), max(max(sizes) for _, sizes in lengths)
    rows = ", ".join(map(str, batch.row[:ROWS_SHOWN].tolist())) + (", ..." if len(batch.row) > ROWS_SHOWN else "")
    return (
        f"{len(lengths):,} examples, {len(batch.input_ids):,} tokens, the longest prompt {prompt:,}, the longest "
        f"response {response:,}, rows {rows}"
    )


def _can_be_planned(module: LightningModule) -> bool:
    """A model that is in memory already cannot be rehearsed without its weights."""
    return isinstance(module, PolicyModule) and isinstance(module.spec, PolicySpec)


def _case(module: PolicyModule, batch: PreferenceBatch) -> Case:
    assert isinstance(module.spec, PolicySpec)
    reference = module.reference if isinstance(module, ReferencedModule) and module.needs_reference else None
    data = getattr(module.trainer, "datamodule", None)
    in_pieces = getattr(data, "micro_batch_tokens", None) is not None
    return Case(module.spec, reference, batch, in_pieces)


def _room(trainer: Trainer, module: PolicyModule) -> int | None:
    """Bytes for this rank; what the module holds already is part of the plan."""
    free = available(module.device)
    if free is None:
        return None
    held = sum(weight.nbytes for weight in module.parameters() if weight.device.type == module.device.type)
    return (free if module.device.type == "cuda" else free // trainer.num_devices) + held


def _advice(module: PolicyModule, case: Case, room: int) -> str:
    found = remedies(module, case, room)
    if not found:
        return "No setting that is known here makes it fit: take a smaller model or a larger device."
    return "\n".join(["What helps, and what training would then take:", *(f"  {remedy}" for remedy in found)])


def _is_out_of_memory(error: BaseException) -> bool:
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)


def _on_host(batch: PreferenceBatch) -> PreferenceBatch:
    parts = {name: part.cpu() for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**parts)  # type: ignore[arg-type]
