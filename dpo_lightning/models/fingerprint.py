"""Telling weights from other weights without keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_lightning.models.shard import is_zero, local, local_box, sharding_groups

# Enough elements of every tensor to notice any training, few enough that a large model takes seconds.
FINGERPRINT_ELEMENTS = 65_536


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's weights: names, shapes and up to 65,536 evenly spaced elements of every tensor.

    A new adapter adds nothing, since one of its factors is zero; the other is random, so both are left out.
    """
    weights = dict(model.named_parameters())
    return digest_of((name, weight) for name, weight in weights.items() if not _adds_nothing(name, weights))


def _adds_nothing(name: str, weights: Mapping[str, Tensor]) -> bool:
    for zero, random in ((".lora_B.", ".lora_A."), (".lora_embedding_A.", ".lora_embedding_B.")):
        if zero in name or random in name:
            return is_zero(weights[name.replace(random, zero)])
    return False


def digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The same of some weights with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in weights:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(_evenly_spaced(parameter.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()


def _evenly_spaced(weight: Tensor) -> Tensor:
    """Up to 65,536 elements of a weight, in fp32; of one that is divided among ranks the same on all of them."""
    stride = max(1, -(-weight.numel() // FINGERPRINT_ELEMENTS))
    if not isinstance(weight, DTensor):
        return weight.flatten()[::stride].float().contiguous()
    here = local(weight)
    places = torch.unravel_index(torch.arange(0, weight.numel(), stride, device=here.device), weight.shape)
    box = local_box(weight)
    is_here = torch.ones_like(places[0], dtype=torch.bool)
    for place, part in zip(places, box, strict=True):
        is_here &= (place >= part.start) & (place < part.stop)
    sample = torch.zeros(len(is_here), dtype=torch.float32, device=here.device)
    index = tuple(place[is_here] - part.start for place, part in zip(places, box, strict=True))
    sample[is_here] = here[index].float()
    bits = sample.view(torch.int32)  # of which all ranks but one have zeros: as numbers, minus zero would be lost
    for group in sharding_groups(weight):
        torch.distributed.all_reduce(bits, group=group)
    return sample
