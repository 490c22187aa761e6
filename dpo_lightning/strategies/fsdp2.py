"""Weights, gradients and optimizer divided among devices: FSDP2, with tensor parallelism where it is asked for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy

from dpo_lightning.checkpoints.folders import load_file, load_folder, save_folder
from dpo_lightning.checkpoints.reading import is_sharded as is_complete
from dpo_lightning.checkpoints.reading import read
from dpo_lightning.errors import UsageError
from dpo_lightning.models.shard import Sharding

TIMEOUT = timedelta(minutes=30)  # torch's own for gloo; that of NCCL, 10 minutes, is short for a first evaluation


class GatheredPrecision(Precision):
    """Float32 weights that are gathered in bfloat16: what ``bf16-mixed`` means where weights are divided.

    No autocast: what is gathered is in the dtype of the products already, and half as many bytes travel.
    """

    precision = "bf16-mixed"


class FSDP2Strategy(ModelParallelStrategy):
    """Every decoder layer, and what is around them, divided among all devices: ``strategy: fsdp2``.

    Modules of this package divide their weights by :attr:`sharding`, the frozen reference alike.

    Args:
        tensor_parallel_size: Devices that share the products of every layer; they see the same batches.
        save_distributed_checkpoint: Write checkpoints as folders to which every rank writes its part; otherwise as one
            file, which the first rank has to hold in memory.
        process_group_backend: Backend of collectives, if not that of the device.
        timeout: How long a rank waits for the others.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = TIMEOUT,
    ) -> None:
        self._compute_dtype: torch.dtype | None = None
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def sharding(self) -> Sharding:
        """How modules divide their weights."""
        return Sharding(mesh=self.device_mesh, compute_dtype=self._compute_dtype)

    @property
    def shards(self) -> int:
        """Ranks among which weights are divided."""
        return self.world_size

    @property
    def precision_plugin(self) -> Precision:
        """What the Trainer's precision means here."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision):
            if plugin.precision != "bf16-mixed":
                raise UsageError(f"`trainer.precision: {plugin.precision}` does not go with fsdp2; use bf16-mixed.")
            plugin, self._compute_dtype = GatheredPrecision(), torch.bfloat16
        if isinstance(plugin, HalfPrecision):
            raise UsageError(
                f"`trainer.precision: {plugin.precision}` does not go with fsdp2, which divides weights before they "
                "would be cast; use bf16-mixed, or have all in 16 bits by `policy.dtype`."
            )
        Strategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder, every rank its part, or one file, whole or not at all.

        Raises:
            UsageError: If it cannot be written.
        """
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            save_folder(checkpoint, path)
        else:
            Strategy.save_checkpoint(self, checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Take up weights and optimizers of a checkpoint, a folder or a file, by whatever strategy it was written.

        Raises:
            UsageError: If there is none, or it is damaged, or something else.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if path.is_dir() and is_complete(path):
            return load_folder(path, self.model, self.optimizers)
        trusted = True if weights_only is None else weights_only
        return load_file(read(path, weights_only=trusted, mmap=True), self.model, self.optimizers)

    def setup(self, trainer: Trainer) -> None:
        """Evaluate without gradients, but not in inference mode: weights that are gathered there cannot be trained."""
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False
        super().setup(trainer)

    def setup_environment(self) -> None:
        """Arrange the devices, those of tensor parallelism next to each other."""
        devices, together = self.num_nodes * self.num_processes, self._tensor_parallel_size
        assert isinstance(together, int)
        if devices % together:
            raise UsageError(f"`tensor_parallel_size` {together} does not divide the {devices} devices.")
        self._data_parallel_size = devices // together
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=(FSDP2Strategy.__doc__ or "").splitlines()[0])
