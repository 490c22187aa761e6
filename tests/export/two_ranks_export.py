"""Run by test_export.py in a process of its own: python two_ranks_export.py MODEL FOLDER."""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dpo_lightning import PolicySpec
from dpo_lightning.export import save_policy
from dpo_lightning.models.adapters import LoRA


def perturbed(spec):
    """A policy whose adapters are not zero."""
    policy = spec.build()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return policy


def run(rank, policies, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, (spec, policy) in policies.items():
        if rank == 0:
            save_policy(spec, policy, folder / name / "whole")
        for layer in policy.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy.model, mesh=mesh)
        policy.model(input_ids=torch.tensor([[1, 5, 9]]))  # leaves the weights of the root whole in memory
        save_policy(spec, policy, folder / name / "sharded", max_shard_size="40KB", writes=rank == 0)
        sharded = dict(policy.named_parameters())
        assert all(hasattr(weight, "full_tensor") for key, weight in sharded.items() if ".layers." in key)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    specs = {"full": PolicySpec(path=sys.argv[1]), "lora": PolicySpec(path=sys.argv[1], lora=LoRA(rank=2))}
    policies = {name: (spec, perturbed(spec)) for name, spec in specs.items()}
    context = multiprocessing.get_context("fork")  # imports are paid once
    ranks = [context.Process(target=run, args=(rank, policies, Path(sys.argv[2]))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(max(rank.exitcode for rank in ranks))
