"""What explains a step that was not finite: its rows and scores in words, and its batches in a file to run again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from dpo_lightning.batch import Batch, PreferenceBatch
from dpo_lightning.errors import UsageError
from dpo_lightning.modules.gradients import total_norm
from dpo_lightning.modules.steps import PiecewiseModule

ROWS_SHOWN, RATIOS_SHOWN = 64, 5
CPU = torch.device("cpu")


class NonFinite(UsageError):
    """A loss or a gradient that is not finite, and that no weight has taken up.

    Args:
        message: What happened, with which rows, and what to do.
        step: The optimizer step, counted from 1.
        rows: Rows of the examples that it would have learnt from, on this rank.
        path: Where they were saved; None where they could not be.
    """

    def __init__(self, message: str, step: int, rows: list[int], path: Path | None) -> None:
        super().__init__(message)
        self.step, self.rows, self.path = step, rows, path


class Run(NamedTuple):
    """As much of a run as the guard needs.

    Attributes:
        module: Name of the module's class.
        folder: Where logs are.
        rank: This process.
        world_size: Number of processes.
        accumulate: Batches an optimizer step.
        autocast: Dtype of matrix products where it is another than that of the weights.
        barrier: Waits for the other processes.
    """

    module: str
    folder: Path
    rank: int
    world_size: int
    accumulate: int
    autocast: torch.dtype | None
    barrier: Callable[[], None]


class Scores(NamedTuple):
    """Log-probabilities of responses of policy and reference, if there is one, or rewards, ``(B, K)``; their rows."""

    row: Tensor
    policy: Tensor
    reference: Tensor | None


@dataclass
class Trace:
    """What a batch leaves behind, on the device: nothing of it is asked for unless the run stops."""

    batch: Batch
    loss: Tensor | None = None
    num_losses: Tensor | float = 1.0
    scores: list[Scores] = field(default_factory=list)

    @property
    def rows(self) -> list[int]:
        """Rows of its examples."""
        return [row for piece in self.batch.pieces for row in piece.row.tolist()]


def explained(run: Run, step: int, window: Sequence[Trace], norm: float, scored: str) -> NonFinite:
    """What there is to say of a step that was not finite, and its batches in a file beside the logs.

    Args:
        run: The run.
        step: The optimizer step, counted from 1.
        window: Its batches on this rank.
        norm: Norm of its gradient.
        scored: What responses are scored by, where there is no reference.
    """
    path = run.folder / f"nonfinite-step={step}-rank={run.rank}.pt"
    rows = [row for trace in window for row in trace.rows]
    lines = [*_found(run, step, window, norm), _rows_line(rows), _ratios_line(window, scored)]
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        torch.save(_plain(run, step, window, norm), path)
        lines.append(_saved_line(run, path))
        saved: Path | None = path
    except (OSError, RuntimeError) as error:
        lines.append(f"The batch could not be saved to {path}: {error}")
        saved = None
    lines.append(
        "What helps: look at these rows; where log-ratios are large, a lower learning rate, a longer warm-up or "
        "`trainer.gradient_clip_val`; where the loss is one of your own, its logarithms, powers and divisions."
    )
    return NonFinite("\n".join(line for line in lines if line), step, rows, saved)


class Reproduction(NamedTuple):
    """What running a saved step again gives.

    Attributes:
        losses: Of its batches.
        gradient_norm: Of all gradients together.
        nonfinite: Names of weights whose gradient is not finite.
    """

    losses: list[float]
    gradient_norm: float
    nonfinite: list[str]


def reproduce(module: PiecewiseModule, path: str | Path) -> Reproduction:
    """Run the batches of a step that was not finite again, with the weights that a module has now.

    After a run has stopped in this process, they are those that met the batch; from a checkpoint, those of its step.
    The module's gradients, metrics and sums are overwritten, its weights are not. Dropout draws other noise.

    Args:
        module: The module.
        path: What the run has saved, of one rank.
    """
    saved = torch.load(path, weights_only=True)
    trainer, module.trainer = module._trainer, None  # whose ranks may be gone
    autocast = None if saved["autocast"] is None else getattr(torch, saved["autocast"])
    module.zero_grad()
    module.train()
    losses = []
    try:
        for plain in saved["batches"]:
            pieces = [move_data_to_device(PreferenceBatch(**piece), module.device) for piece in plain["pieces"]]
            total = 0.0
            for piece in pieces:
                with torch.autocast(module.device.type, autocast, enabled=autocast is not None):
                    loss = module.summed_loss("fit", piece) / plain["num_losses"]
                module.backward(loss / len(saved["batches"]))
                total += loss.item()
            losses.append(total)
    finally:
        module.trainer = trainer
    gradients = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return Reproduction(losses, total_norm(list(gradients.values())).item(), bad)


def _found(run: Run, step: int, window: Sequence[Trace], norm: float) -> list[str]:
    losses = [math.nan if trace.loss is None else trace.loss.item() * run.accumulate for trace in window]
    where = f" on rank {run.rank} of {run.world_size}" if run.world_size > 1 else ""
    lines = [
        f"Optimizer step {step} was not taken: the norm of its gradient is {norm}, the loss{where} "
        f"{', '.join(f'{loss:.6g}' for loss in losses)}. Weights, the optimizer's state and all checkpoints are as "
        "they were before."
    ]
    if run.world_size > 1 and all(map(math.isfinite, losses)):
        lines.append("The loss of this rank is finite: look also at what the other ranks say.")
    return lines


def _rows_line(rows: Sequence[int]) -> str:
    others = f" and {len(rows) - ROWS_SHOWN:,} more" if len(rows) > ROWS_SHOWN else ""
    return f"Rows of the data: {', '.join(map(str, rows[:ROWS_SHOWN]))}{others}."


def _ratios_line(window: Sequence[Trace], scored: str) -> str:
    """The responses that policy and reference disagree about most, what is not finite first."""
    scores = [score for trace in window for score in trace.scores]
    if not scores:
        return ""
    values = [
        (value, row, number)
        for score in scores
        for row, ratios in zip(score.row.tolist(), _ratios(score).tolist(), strict=True)
        for number, value in enumerate(ratios, start=1)
    ]
    values.sort(key=lambda entry: -abs(entry[0]) if math.isfinite(entry[0]) else -math.inf)
    what = scored if scores[0].reference is None else "log pi - log pi_ref"
    shown = [f"row {row}, response {number}: {value:.6g}" for value, row, number in values[:RATIOS_SHOWN]]
    return f"Largest {what}, in nats: {'; '.join(shown)}."


def _ratios(scores: Scores) -> Tensor:
    return scores.policy if scores.reference is None else scores.policy - scores.reference


def _saved_line(run: Run, path: Path) -> str:
    return (
        f"The batch was saved; to run it again:\n    from dpo_lightning.modules.nonfinite import reproduce\n"
        f'    reproduce(module, "{path}")  # of this process, or {run.module}.load_from_checkpoint(...)'
    )


def _plain(run: Run, step: int, window: Sequence[Trace], norm: float) -> dict[str, Any]:
    """What loads with ``weights_only=True``."""
    return {
        "step": step,
        "rank": run.rank,
        "world_size": run.world_size,
        "autocast": None if run.autocast is None else str(run.autocast).removeprefix("torch."),
        "gradient_norm": norm,
        "batches": [
            {
                "num_losses": float(trace.num_losses),
                "loss": None if trace.loss is None else trace.loss.item() * run.accumulate,
                "pieces": [
                    move_data_to_device(piece._replace(window=None), CPU)._asdict() for piece in trace.batch.pieces
                ],
                "scores": [
                    {name: None if part is None else part.cpu() for name, part in scores._asdict().items()}
                    for scores in trace.scores
                ],
            }
            for trace in window
        ],
    }
