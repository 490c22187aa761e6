"""What every module shares: building the policy, guarding its steps, throughput, metrics, plain checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torchmetrics import Metric

from dpo_lightning.batch import Batch, Logps, PreferenceBatch
from dpo_lightning.checkpoints.files import write_whole_files
from dpo_lightning.checkpoints.reading import read
from dpo_lightning.cpu import keep_freed_memory
from dpo_lightning.errors import UsageError
from dpo_lightning.functional.head import Outputs
from dpo_lightning.models.adapters import base_fingerprint
from dpo_lightning.models.in_memory import AnyPolicy, InMemory, PolicyRecipe
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.shard import Sharding
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.guard import Guard
from dpo_lightning.modules.nonfinite import Run
from dpo_lightning.modules.optimised import OptimisedModule
from dpo_lightning.modules.precision import FLOAT32, autocast_dtype, compute_dtype, recommend_bfloat16, warn_of_rounding
from dpo_lightning.modules.schedule import Schedule
from dpo_lightning.modules.throughput import Throughput
from dpo_lightning.ranks import data_place
from dpo_lightning.recipes import from_plain, to_plain

POLICY = "policy."
BASE_FINGERPRINT = "base_fingerprint"
IN_MEMORY = "in_memory"
PROVENANCE = "provenance"
FSDP1 = """`trainer.strategy: fsdp` is PyTorch's first FSDP, under which Lightning cannot clip by norm. Use the second:
  strategy: fsdp2
  precision: bf16-mixed   # 16-bit products, weights and their updates in float32"""


class PolicyModule(OptimisedModule):
    """A policy, its optimizer and its metrics; subclasses say what the loss is.

    Args:
        policy: The model and how it is loaded; in Python also a model in memory, which is then trained.
        lr: Learning rate of the default optimizer, fused AdamW without weight decay; 1e-6 where nothing is given.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: What the learning rate does after warm-up: stay, or fall to 0 at the last step.
        optimizer: Another optimizer, with its learning rate.
        lr_scheduler: Another schedule, in steps; replaces warmup_steps and schedule.
    """

    progress_names: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        policy: AnyPolicy,
        lr: float | None = None,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(lr, warmup_steps, schedule, optimizer, lr_scheduler)
        self.spec = _recipe(policy)
        self.policy = None
        self.metrics = nn.ModuleDict({stage: self.make_metric() for stage in ("fit", "validate", "test")})
        self._throughput = Throughput()
        self._guard = Guard()
        self._base_fingerprint: str | None = None
        self._validation: dict[str, Any] | None = None
        self._register_state_dict_hook(_leave_out)
        self.register_load_state_dict_post_hook(_do_not_miss)
        self.record(policy=_recorded(self.spec), lr=lr, warmup_steps=warmup_steps, schedule=schedule)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning does it; also of a folder of shards, which is put together first."""
        if not isinstance(checkpoint_path, (str, Path)) or not Path(checkpoint_path).is_dir():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.ckpt"
            torch.save(read(Path(checkpoint_path)), whole)
            return super().load_from_checkpoint(whole, *args, **kwargs)

    def record(self, **hyperparameters: Any) -> None:
        """Keep hyperparameters as plain data, so that checkpoints load with ``weights_only=True``."""
        self.save_hyperparameters({name: to_plain(value) for name, value in hyperparameters.items()})

    def make_metric(self) -> Metric:
        """The metric of a stage; its ``compute`` gives a dictionary."""
        raise NotImplementedError

    def metric(self, stage: str) -> Any:
        """The metric that collects a stage: fit, validate or test."""
        return self.metrics[stage]

    def setup(self, stage: str) -> None:
        """Find out what cannot be done before any weight is loaded."""
        if self._trainer is not None:
            if isinstance(self.trainer.strategy, FSDPStrategy):
                raise UsageError(FSDP1)
            write_whole_files(self.trainer)
        if stage == "fit":
            self.spec.check()
        if self._target_device().type == "cpu":
            keep_freed_memory()

    def configure_model(self) -> None:
        """Build the policy, unless there is one."""
        if self.policy is None:
            self.policy = self.load(self.spec)
            warn_of_rounding(self.policy, self.precision)
            if self._trainer is not None and self._target_device().type == "cpu":
                recommend_bfloat16(self.policy, self.precision)
            self._hide_constants_from_ddp()
        # Now, since a strategy may cast the weights later.
        if self.spec.has_adapters and self._trainer is not None and self._base_fingerprint is None:
            self._base_fingerprint = base_fingerprint(self.policy)

    def load(self, spec: PolicyRecipe, weights: CausalPolicy | None = None) -> CausalPolicy:
        """Build a model for this module's device, precision and strategy, with the weights of another, if given."""
        sharding: Sharding | None = None if self._trainer is None else getattr(self.trainer.strategy, "sharding", None)
        return spec.build(self._target_device(), compute_dtype(self.precision), sharding, weights)

    def is_left_out(self, name: str) -> bool:
        """Whether a weight is left out of checkpoints: below adapters all that are not trained."""
        if not self.spec.has_adapters or self.policy is None or not name.startswith(POLICY):
            return False
        try:
            return not self.policy.get_parameter(name.removeprefix(POLICY)).requires_grad
        except AttributeError:  # no weight, such as what quantised ones have beside them
            return True

    def provenance(self) -> dict[str, Any]:
        """What a model card says of training, as plain data: the module, and the last validation with its step."""
        validation = self._validation
        if validation is not None:
            metrics = {name: float(value) for name, value in validation["metrics"].items()}
            validation = {"step": validation["step"], "metrics": metrics}
        return {"module": type(self).__name__, "validation": validation}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the last validation and a fingerprint of what is below adapters; behind a bad step nothing is saved."""
        self._guard.check()
        super().on_save_checkpoint(checkpoint)
        checkpoint[PROVENANCE] = self.provenance()
        if self.spec.has_adapters and self.policy is not None:
            self._base_fingerprint = self._base_fingerprint or base_fingerprint(self.policy)
            checkpoint[BASE_FINGERPRINT] = self._base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Under adapters see that the weights below them are those that they were trained on."""
        super().on_load_checkpoint(checkpoint)
        self._see_that_it_fits(checkpoint.get("state_dict", {}))
        self._validation = checkpoint.get(PROVENANCE, {}).get("validation")
        expected = checkpoint.get(BASE_FINGERPRINT)
        if expected is None:
            return
        if self.policy is None:
            self.configure_model()
        assert self.policy is not None
        self._base_fingerprint = base_fingerprint(self.policy)
        if self._base_fingerprint != expected:
            raise UsageError(
                f"The adapters of this checkpoint were trained on other weights than {self.spec.origin} holds "
                "now; set `policy.path` to those, or hand over a model that has them."
            )

    def _see_that_it_fits(self, weights: dict[str, torch.Tensor]) -> None:
        """Say in words that a checkpoint is of another module or model."""
        if weights and not any(name.startswith(POLICY) for name in weights):
            raise UsageError(
                f"The checkpoint is not of a {type(self).__name__}: its weights have names like {next(iter(weights))}, "
                f"those of a policy begin with {POLICY!r}."
            )
        if self.policy is None:
            return
        for name, weight in self.policy.state_dict(prefix=POLICY).items():
            if name in weights and weights[name].shape != weight.shape:
                raise UsageError(
                    f"The checkpoint is of another model than `policy.path` {self.spec.path}: there {name} has the "
                    f"shape {tuple(weights[name].shape)}, here {tuple(weight.shape)}. Name the model that it was "
                    "trained from."
                )

    def forward(self, batch: PreferenceBatch, reference: Outputs | None = None, collision: bool = False) -> Logps:
        """Log-probabilities of the policy, shape ``(B, K)``, and what else is asked for, as in CausalPolicy."""
        if self.policy is None:
            self.configure_model()
        return self.policy(batch, reference, collision)  # type: ignore[misc]

    def on_train_start(self) -> None:
        """Start the clock of the throughput, and watch what is learnt."""
        super().on_train_start()
        self._throughput.start()
        run, strategy = self.trainer, self.trainer.strategy
        folder = Path(run.log_dir or run.default_root_dir)
        ranks = (run.global_rank, run.world_size, run.accumulate_grad_batches)
        self._guard.start(Run(type(self).__name__, folder, *ranks, autocast_dtype(self.precision), strategy.barrier))

    def on_train_end(self) -> None:
        """The last step, too, has to have been a good one."""
        self._guard.check()

    def on_validation_start(self) -> None:
        """Validation does not count as training time, and is of weights that are known to be good."""
        self._guard.check()
        self._throughput.pause()

    def on_validation_end(self) -> None:
        """Training goes on."""
        self._throughput.resume()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What a callback does between steps does not count as training time."""
        self._throughput.pause()
        yield
        self._throughput.resume()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count what the step will do; shapes are known on the host."""
        super().on_train_batch_start(batch, batch_idx)
        self._guard.begin(batch)
        for piece in batch.pieces:
            self._throughput.count(piece.length.shape[0], piece.input_ids.shape[0])

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Of a loss that is not finite no gradient is, and by the gradients all ranks learn of it."""
        self._guard.note_loss(loss, self._num_losses)
        super().backward(loss, *args, **{"gradient": 1 + 0 * loss.detach(), **kwargs})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let no update pass that is not finite, and log; between log lines nothing waits for the device.

        Training metrics are those of all batches since the last line.
        """
        step = self.trainer.global_step + 1
        norm = self.find_gradient_norm(optimizer)
        if self.scales_loss:
            self._guard.let_pass()  # the scaler skips what is not finite, by its own design
        else:
            self._guard.watch(norm, optimizer, step)
        due = is_logged(self.trainer, step)
        if not due and step > 1:  # the progress bar has something to show from the first step on
            return
        metric = self.metric("fit")
        for name, value in metric.compute().items():
            self.log(f"train/{name}", value, prog_bar=name in self.progress_names)
        if not due:
            return
        metric.reset()
        self.log("train/grad_norm", norm)
        for name, value in self._throughput.per_second().items():
            self.log(f"train/{name}", value * self._share_of_rank(), sync_dist=True, reduce_fx="sum")

    def on_validation_epoch_end(self) -> None:
        """Log validation metrics over the whole set and all ranks."""
        self._log_stage("validate", "val")

    def on_test_epoch_end(self) -> None:
        """Log test metrics over the whole set and all ranks."""
        self._log_stage("test", "test")

    def _log_stage(self, stage: str, prefix: str) -> None:
        metric = self.metric(stage)
        values = metric.compute()
        for name, value in values.items():
            self.log(f"{prefix}/{name}", value, prog_bar=name in self.progress_names)
        metric.reset()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._validation = {"step": self.trainer.global_step, "metrics": values}

    def over_ranks(self, value: Tensor, operation: str) -> Tensor:
        """Sum, mean or max of a value of every rank that has batches of its own; without a Trainer there is one."""
        if self._trainer is None:
            return value
        result = self.trainer.strategy.reduce(value, reduce_op=operation)
        return result * self._share_of_rank() if operation == "sum" else result

    def _share_of_rank(self) -> float:
        """What a rank adds to a sum over ranks: those that share the products of one model have the same batches."""
        return data_place(self.trainer).ranks / self.trainer.world_size

    def _hide_constants_from_ddp(self) -> None:
        """Buffers are constants and a reference is frozen: DDP should neither broadcast nor reduce them."""
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in self.named_buffers()]

    def _target_device(self) -> torch.device:
        """Where the policy will run."""
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    @property
    def precision(self) -> str:
        """The Trainer's precision, such as bf16-mixed."""
        return FLOAT32 if self._trainer is None else str(self.trainer.precision)


def _recipe(policy: Any) -> PolicyRecipe:
    if isinstance(policy, InMemory):
        return policy
    if isinstance(policy, nn.Module):
        return InMemory(policy)
    if isinstance(policy, dict) and IN_MEMORY in policy:
        raise UsageError(
            f"The policy of this checkpoint was a {policy[IN_MEMORY]} in memory, which a checkpoint does not hold: "
            "hand over one, with the weights that training began with, by load_from_checkpoint(path, policy=model)."
        )
    return from_plain(policy, PolicySpec)


def _recorded(recipe: PolicyRecipe) -> Any:
    return {IN_MEMORY: type(recipe.model).__name__} if isinstance(recipe, InMemory) else recipe


def _leave_out(module: PolicyModule, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and module.is_left_out(name.removeprefix(prefix))]:
        del state[name]


def _do_not_miss(module: PolicyModule, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not module.is_left_out(name)]


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the Trainer writes a log line at an optimizer step, counted from 1."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and step % interval == 0
