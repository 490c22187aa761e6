"""Models divided among the ranks of a pool, held against whole ones: every function runs on each rank."""

import gc
import io
import json
import logging
import os
import threading
from pathlib import Path

import small_runs
import torch
from small_world import CountOfA
from strategy_runs import train
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dpo_lightning import DPOModule, PolicySpec
from dpo_lightning.batch import lay_out
from dpo_lightning.callbacks import ExportHF, LogSamples, TrackRewardKL
from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.points import TRACKED
from dpo_lightning.losses import DPOLoss
from dpo_lightning.models.adapters import as_reference, base_fingerprint
from dpo_lightning.models.fingerprint import fingerprint
from dpo_lightning.models.selfcheck import choose_layout
from dpo_lightning.models.shard import DATA, TENSOR, Sharding, local
from dpo_lightning.references import FrozenCopy
from dpo_lightning.strategies import FSDP2Strategy

BATCH = [(list(range(8, 19)), [[20, 31, 42, 53], [9, 8]]), ([30, 40], [[50, 60, 70], [11, 12, 13, 14, 15]])]


def sharding(tensor_parallel_size=1, **kwargs):
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    shape = (distributed.get_world_size() // tensor_parallel_size, tensor_parallel_size)
    return Sharding(mesh=init_device_mesh("cpu", shape, mesh_dim_names=(DATA, TENSOR)), **kwargs)


def build(spec, tensor_parallel_size=1):
    """The divided model, of ranks that are seeded differently, and the plain one by the seed of the first."""
    divided = sharding(tensor_parallel_size)
    torch.manual_seed(distributed.get_rank())
    policy = spec.build(sharding=divided)
    torch.manual_seed(0)
    return policy, spec.build()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unequal(policy, plain):
    """Names of weights and buffers that differ in any bit, and what only one of the two has."""
    mine, its = ({**dict(m.named_buffers()), **m.state_dict()} for m in (policy, plain))
    wrong = sorted(mine.keys() ^ its.keys())
    for name in sorted(mine.keys() & its.keys()):  # full_tensor is a call of all ranks
        ours, theirs = whole(mine[name]).detach(), its[name]
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            wrong.append(name)
    trained = ({name for name, weight in m.named_parameters() if weight.requires_grad} for m in (policy, plain))
    return wrong + sorted(set.symmetric_difference(*trained))


@torch.no_grad()
def compare(spec, tensor_parallel_size=1):
    """How a divided model differs from the plain one."""
    policy, plain = build(spec, tensor_parallel_size)
    batch = lay_out(BATCH)
    held = sum(local(weight).numel() for weight in policy.parameters())
    result = {
        "unequal": unequal(policy, plain),
        "share": held / sum(weight.numel() for weight in plain.parameters()),
        "fingerprint": fingerprint(policy) == fingerprint(plain),
        "base": base_fingerprint(policy) == base_fingerprint(plain),
        "logps": (policy.eval()(batch).total - plain.eval()(batch).total).abs().max().item(),
    }
    with torch.random.fork_rng([]):
        twin = spec.build(sharding=sharding(tensor_parallel_size), weights=policy)
    assert not any(local(a).data_ptr() == local(b).data_ptr() != 0 for a, b in both(policy, twin))
    return {**result, "twin": unequal(twin, plain)}


def both(first, second):
    return zip(first.parameters(), second.parameters(), strict=True)


def warned(spec):
    """What is said while a model is built."""
    from dpo_lightning.models import spec as module

    module._say_that_ranks_load_all.cache_clear()
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    module.log.addHandler(handler)
    try:
        spec.build(sharding=sharding())
    finally:
        module.log.removeHandler(handler)
    return said.getvalue()


def refusal(spec, tensor_parallel_size=1):
    """In what words a model is refused."""
    try:
        spec.build(sharding=sharding(tensor_parallel_size))
    except UsageError as error:
        return str(error)
    return None


def train_in_parallel(model, folder, tensor_parallel_size, devices, **kwargs):
    """A fit whose layers are divided among devices in two ways."""
    strategy = FSDP2Strategy(tensor_parallel_size=tensor_parallel_size)
    return train(model, folder, strategy, devices, **kwargs)


class Measured(DPOModule):
    """Knows by how much the memory of its process grew at the peak while its models were built, in bytes."""

    grown = None

    def configure_model(self):
        if self.grown is None:
            gc.collect()
            with Memory() as memory:
                super().configure_model()
            self.grown = memory.grown
        else:
            super().configure_model()


class Memory:
    """Peak growth of the resident set and, as far as a look every millisecond sees it, of what is no file in it."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        self.before, self.most, self.ended = status(), 0, threading.Event()
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self):
        while not self.ended.wait(0.001):
            self.most = max(self.most, status()["RssAnon"])

    def __exit__(self, *_):
        self.ended.set()
        self.watch.join()
        self.grown = {
            "peak": status()["VmHWM"] - self.before["VmRSS"],
            "without files": self.most - self.before["RssAnon"],
            "in the end": status()["VmRSS"] - self.before["VmRSS"],
        }


def status():
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in lines if value.endswith("kB")}


def growth(model, folder):
    """What building a policy with its frozen copy takes on this rank."""
    spec = PolicySpec(path=model)
    choose_layout(spec.load_config())
    module = Measured(spec, DPOLoss(), FrozenCopy())
    trainer = small_runs.trainer(
        folder,
        strategy="fsdp2",
        devices=int(os.environ["WORLD_SIZE"]),
        max_steps=1,
        limit_val_batches=0,
        inference_mode=False,
    )
    trainer.fit(module, small_runs.data(model))
    return module.grown


def sample_and_export(model, folder, **trainer_args):
    """What is sampled before and after a fit, and the weights at its end, which are exported too."""
    samples = LogSamples(["the film", "we all loved"], max_new_tokens=6)
    module = small_runs.module(model)
    callbacks = [samples, ExportHF(f"{folder}/hf")]
    small_runs.fit(folder, module, small_runs.data(model), callbacks=callbacks, inference_mode=False, **trainer_args)
    weights = {name: whole(weight).detach().clone() for name, weight in module.policy.model.state_dict().items()}
    return {"before": samples.before, "after": samples.after, "weights": weights}


def adapters_off_first(spec):
    """How gradients of adapters differ from those of one process when a first forward was without them, as a share."""
    torch.manual_seed(0)
    policy = spec.build(sharding=sharding(compute_dtype=torch.bfloat16))
    torch.manual_seed(0)
    plain, batch = spec.build(), lay_out(BATCH)
    with torch.no_grad(), as_reference(policy.model):
        policy(batch)
    policy(batch).total.sum().backward()
    plain(batch).total.sum().backward()
    pairs = [(whole(mine.grad), its.grad) for mine, its in both(policy, plain) if its.requires_grad]
    assert all(mine.dtype == torch.float32 for mine, _ in pairs)
    return max((mine - its).norm() / its.norm() for mine, its in pairs if its.any()).item()


def track(model, folder, **trainer_args):
    """The points that TrackRewardKL keeps, several chunks of prompts each."""
    callback = TrackRewardKL(["the film", "we all loved", "a story"], CountOfA(), 2, 5, batch_size=2, every_n_steps=2)
    module = small_runs.module(model)
    data = small_runs.data(model)
    small_runs.fit(folder, module, data, callbacks=[callback], inference_mode=False, max_steps=4, **trainer_args)
    return [json.loads(line) for line in (Path(folder) / TRACKED).read_text().splitlines()]
