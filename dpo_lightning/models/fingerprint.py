"""Telling weights from other weights without keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

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
            return not weights[name.replace(random, zero)].any()
    return False


def digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The same of some weights with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in weights:
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, -(-flat.numel() // FINGERPRINT_ELEMENTS))].float().cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
