"""Norms and clipping of gradients that are divided among ranks in several ways at once."""

import divided
import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dpo_lightning.modules.gradients import clip_by_norm, clip_by_value, total_norm


def plain():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (4,), (1, 7), (6, 2))]


def clipped(tensor_parallel_size):
    """Norm before, gradients clipped by norm and by value."""
    whole, mesh = plain(), divided.sharding(tensor_parallel_size).mesh
    placements = [(Shard(0), Replicate()), None, (Shard(0), Shard(1)), (Replicate(), Shard(0))]

    def parts():
        return [
            gradient.clone() if where is None else distribute_tensor(gradient, mesh, where, src_data_rank=None)
            for gradient, where in zip(whole, placements, strict=True)
        ]

    by_norm, by_value = parts(), parts()
    norm = total_norm(by_norm)
    assert not isinstance(norm, DTensor)
    clip_by_norm(by_norm, 1.5, norm)
    clip_by_value(by_value, 0.5)
    alone = total_norm(parts()[:1])
    return (norm, alone, [*map(divided.whole, by_norm)], [*map(divided.whole, by_value)])


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_divided_gradients_are_clipped_as_whole_ones(tensor_parallel_size, two_ranks):
    by_norm, by_value = [torch.nn.Parameter(g.clone()) for g in plain()], [torch.nn.Parameter(g) for g in plain()]
    for weight in (*by_norm, *by_value):
        weight.grad = weight.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(by_norm, 1.5)
    torch.nn.utils.clip_grad_value_(by_value, 0.5)
    for found in two_ranks.run(clipped, tensor_parallel_size):
        torch.testing.assert_close(found[0], norm)
        torch.testing.assert_close(found[1], plain()[0].norm())
        torch.testing.assert_close(found[2], [weight.grad for weight in by_norm])
        torch.testing.assert_close(found[3], [weight.grad for weight in by_value])
