"""Models that no process ever holds whole: built without storage, divided among ranks, filled part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_lightning.models.shard import Box, local, local_box

Reader = Callable[[Box], Tensor]


def without_storage(make: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """A model on the CPU whose weights are all zero and take one number's memory each; buffers are those of the family.

    What is added to it, such as adapters, is as real as ever.

    Args:
        make: Makes the model on the default device, which is ``meta`` for the while.

    Returns:
        ``None`` where the family leaves a buffer without a value.
    """
    with torch.device("meta"):
        model = make()
    if not _fill_buffers(model):
        return None
    _replace(model, lambda weight: torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape))
    return model


def to_meta(model: nn.Module) -> set[str]:
    """Have the weights without storage lie nowhere, since what lies on a device is divided with all its memory.

    Returns:
        Names of the others, which have values.
    """

    def there(weight: Tensor) -> Tensor:
        if _has_storage(weight):
            return weight.contiguous()  # as FSDP2 wants it
        return torch.empty_like(weight, device="meta")

    _replace(model, there)
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.is_meta}


def from_meta(model: nn.Module) -> None:
    """Give the parts of divided weights that lie nowhere memory on their device."""

    def here(weight: Tensor) -> Tensor:
        if not weight.is_meta:
            return weight
        assert isinstance(weight, DTensor)
        mesh, part = weight.device_mesh, weight.to_local()
        memory = torch.empty(part.shape, dtype=part.dtype, device=mesh.device_type)
        return DTensor.from_local(memory, mesh, weight.placements, shape=weight.shape, stride=weight.stride())

    _replace(model, here)
    model._apply(lambda tensor: tensor)  # FSDP2 takes note of new weights in there


def _replace(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put other weights in the places of a model's; one that has several places gets one for all of them."""
    old = list(model.parameters())
    new = {weight: nn.Parameter(make(weight.detach()), weight.requires_grad) for weight in old}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, new[weight])


def _has_storage(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()


@torch.no_grad()
def fill(model: nn.Module, readers: Mapping[str, Reader]) -> set[str]:
    """Give the part of every weight that lies here its values, and buffers those that are stored.

    Args:
        model: The model, whose weights may be divided among ranks.
        readers: How a part of a weight is read, by its names.

    Returns:
        Names of weights that got none.
    """
    names: dict[Tensor, list[str]] = {}
    for name, weight in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        names.setdefault(weight, []).append(name)
    missed: set[str] = set()
    for weight, known_as in names.items():
        stored = next((name for name in known_as if name in readers), None)
        target = local(weight)
        if stored is not None and target.numel():
            target.copy_(readers[stored](local_box(weight)))
        elif stored is None and isinstance(weight, nn.Parameter):
            missed.update(known_as)
    return missed


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy weights and buffers of a model into another that is divided in the same way."""
    for module in (m for m in source.modules() if isinstance(m, FSDPModule)):
        module.reshard()  # what a forward has left whole
    for of in (nn.Module.parameters, nn.Module.buffers):
        for ours, theirs in zip(of(target), of(source), strict=True):
            local(ours).copy_(local(theirs))


def take_random_state_of_first_rank(device: torch.device) -> None:
    """So that what is drawn, not read, is one model on all ranks."""
    state = torch.get_rng_state().to(device)
    torch.distributed.broadcast(state, src=0)
    torch.set_rng_state(state.cpu())


def _fill_buffers(model: PreTrainedModel) -> bool:
    """Whether every buffer has the value that its family computes for it: two different fillings have to vanish."""
    if any(isinstance(value, Tensor) and value.is_meta for part in model.modules() for value in vars(part).values()):
        return False  # a tensor that is no buffer, which nobody computes
    owners = [module for module in model.modules() if next(module.buffers(recurse=False), None) is not None]
    results: list[list[Tensor]] = []
    for filling in (0, 1):
        for module in owners:
            for name, buffer in list(module.named_buffers(recurse=False)):
                persistent = name not in module._non_persistent_buffers_set
                empty = torch.full(buffer.shape, filling, dtype=buffer.dtype, device="cpu")
                module.register_buffer(name, empty, persistent=persistent)
        for module in owners:
            _forget_initialization(module)
            model._init_weights(module)
        results.append([buffer.clone() for module in owners for buffer in module.buffers(recurse=False)])
    return all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def _forget_initialization(module: nn.Module) -> None:
    for part in (module, *module.buffers(recurse=False)):
        if hasattr(part, "_is_hf_initialized"):
            delattr(part, "_is_hf_initialized")
