"""All that is done to a model once it is built: checkpoints, then compilation, then division among devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lightning.errors import UsageError
from dpo_lightning.models.seam import keep_attention_out_of_graphs

DATA, TENSOR = "data_parallel", "tensor_parallel"
STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the weights of a model are divided among devices.

    Args:
        mesh: Devices, by the dimensions data_parallel and tensor_parallel.
        compute_dtype: Dtype in which weights are gathered and products run, if not that of the weights. Gradients are
            summed in float32.
    """

    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """That of this rank."""
        kind = self.mesh.device_type
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def checkpoint_layers(model: PreTrainedModel, every: int) -> None:
    """Have every n-th decoder layer compute its activations again in backward instead of keeping them."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    except ValueError as error:
        raise UsageError(f"`policy.activation_checkpointing`: {error}") from error


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer by itself, for streams of any length; nothing happens before the first forward."""
    keep_attention_out_of_graphs()
    for layer in decoder_layers(model, "`policy.compile`"):
        # Nothing is compiled across a checkpoint, so there the parts of the layer are.
        for part in layer.children() if layer.gradient_checkpointing else (layer,):
            part.compile(dynamic=True)


def shard_layers(policy: nn.Module, model: PreTrainedModel, sharding: Sharding) -> None:
    """Divide the weights of every decoder layer, and of what is around them, among the devices of a mesh.

    Args:
        policy: What is called as a whole; what lies outside of the decoder layers is gathered while it runs. Its
            ``exact_parts``, if it has any, are gathered in the dtype of their weights.
        model: The model in it.
        sharding: The devices.
    """
    gathered = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    together = sharding.mesh[TENSOR].size()
    plan = tensor_parallel_plan(model, together) if together > 1 else {}
    for layer in decoder_layers(model, "`trainer.strategy: fsdp2`"):
        if plan:
            parallelize_module(layer, sharding.mesh[TENSOR], plan, src_data_rank=None)
        fully_shard(layer, mesh=sharding.mesh[DATA], mp_policy=gathered)
    for part in getattr(policy, "exact_parts", ()):
        fully_shard(part, mesh=sharding.mesh[DATA], mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    fully_shard(policy, mesh=sharding.mesh[DATA], mp_policy=gathered)
    register_fsdp_forward_method(policy, "generate")


def tensor_parallel_plan(model: PreTrainedModel, devices: int) -> dict[str, ParallelStyle]:
    """How the parts of a decoder layer are divided, as its family says.

    Args:
        model: The model.
        devices: Number of devices that share a layer.

    Raises:
        UsageError: If the family has no plan, or one that asks for more than dividing linear layers, or what it divides
            is no multiple of the devices or has adapters.
    """
    config = model.config.get_text_config()
    said = getattr(config, "base_model_tp_plan", None) or {}
    plan = {name.removeprefix("layers.*."): style for name, style in said.items() if name.startswith("layers.*.")}
    unknown = sorted({style for style in plan.values() if style not in STYLES})
    if not plan or unknown:
        reason = f"asks for {', '.join(unknown)}" if unknown else "has no plan for it"
        raise UsageError(
            f"`tensor_parallel_size`: {model.config.model_type} {reason}, and only linear layers are divided by "
            "columns and rows here; leave it at 1."
        )
    if getattr(model, "peft_config", None):
        raise UsageError(
            "`tensor_parallel_size`: layers with adapters are not divided; leave it at 1, or leave out `policy.lora`."
        )
    divided = {
        name: getattr(config, name, None) or devices
        for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    }
    odd = [f"{name} {size}" for name, size in divided.items() if size % devices]
    if odd:
        raise UsageError(f"`tensor_parallel_size` {devices} does not divide the model's {', '.join(odd)}.")
    return {name: STYLES[style]() for name, style in plan.items()}


def decoder_layers(model: PreTrainedModel, key: str) -> list[GradientCheckpointingLayer]:
    """The layers that a model is a stack of.

    Raises:
        UsageError: If there is none that can be told; it names the key of the config that needs them.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"{key}: {type(model).__name__} has no decoder layers that can be told from the rest; leave it out."
        )
    return layers


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are divided among devices."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; a tensor that is whole is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Box = tuple[slice, ...]


def local_box(tensor: Tensor) -> Box:
    """Which part of the whole tensor :func:`local` gives, as a range of each dimension."""
    box = [range(size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        # Tensor parallelism divides first, and data parallelism what that leaves.
        for dimension in reversed(range(tensor.device_mesh.ndim)):
            divided = divided_dimension(tensor.placements[dimension])
            if divided is not None:
                parts, place = tensor.device_mesh.size(dimension), tensor.device_mesh.get_local_rank(dimension)
                box[divided] = _chunk(box[divided], parts, place)
    return tuple(slice(part.start, part.stop) for part in box)


def _chunk(whole: range, parts: int, place: int) -> range:
    """What ``torch.chunk`` gives."""
    size = -(-len(whole) // parts)
    return whole[place * size : (place + 1) * size]


def divided_dimension(placement: Placement) -> int | None:
    """Which dimension of a tensor a placement divides, if any."""
    if placement.is_replicate() or placement.is_partial():
        return None
    return placement.dim  # type: ignore[attr-defined]  # not of Shard alone: what was divided before has another class


def is_zero(tensor: Tensor) -> bool:
    """Whether a tensor is zero on all ranks."""
    found = local(tensor).any().int()
    if isinstance(tensor, DTensor):
        for group in sharding_groups(tensor):
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
    return not found.item()


def sharding_groups(tensor: DTensor) -> Iterable[torch.distributed.ProcessGroup]:
    """The groups of ranks that hold different parts of a tensor."""
    for dimension, placement in enumerate(tensor.placements):
        if divided_dimension(placement) is not None:
            yield tensor.device_mesh.get_group(dimension)
