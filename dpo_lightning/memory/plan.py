"""How much memory a fit will take, and of what it consists."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.memory.division import Division, Gathered, divided
from dpo_lightning.memory.heap import between
from dpo_lightning.memory.meter import Bytes, Place
from dpo_lightning.memory.rehearsal import Case, rehearse
from dpo_lightning.memory.stand_ins import layer_lists
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.precision import compute_dtype
from dpo_lightning.references.synced import Synced

GB, MB = 1e9, 1e6
# How probably a small object settles beside a tensor and stays there (heap.py): fitted to what training took on a CPU
# (benchmarks/README.md). Graphs of models with adapters have more of them.
SETTLED, SETTLED_WITH_ADAPTERS = 0.3, 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the heaviest micro-batch will take of a device's memory at its peak, in bytes.

    Attributes:
        weights: The policy's parameters and buffers.
        gradients: Of what is trained, and under DDP the buckets in which they travel.
        optimizer: The optimizer's state.
        reference: The reference's weights, where it has any of its own on the device.
        gathered: What is divided among devices and whole while it is used.
        activations: What the forward pass keeps for the backward pass.
        temporary: What one operation hands to the next: logits of a chunk, 16-bit copies of weights.
        between: What the C library holds between tensors that are in use, as is to be expected; on a CPU alone.
        batch: What it holds for.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    gathered: int = 0
    activations: int = 0
    temporary: int = 0
    between: int = 0
    batch: BatchSize

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(self.parts.values())

    @property
    def parts(self) -> Bytes:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "batch"}

    def __str__(self) -> str:
        unit, name_of_unit = (GB, "GB") if self.peak >= GB else (MB, "MB")
        sizes = {name: size for name, size in self.parts.items() if size} | {"peak": self.peak}
        lines = [f"  {name:12}{size / unit:8.2f} {name_of_unit}" for name, size in sizes.items()]
        return "\n".join([f"Memory at the peak of a step, for {self.batch}", *lines])


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How large a batch is.

    Attributes:
        examples: Examples.
        tokens: Tokens of the stream.
        longest: Tokens of the longest prompt with its response.
    """

    examples: int
    tokens: int
    longest: int

    @classmethod
    def of(cls, batch: PreferenceBatch) -> Self:
        """The size of a batch, which the host knows without asking the device."""
        return cls(examples=len(batch.length), tokens=len(batch.input_ids), longest=batch.max_key)

    def __str__(self) -> str:
        return f"{self.examples:,} examples, {self.tokens:,} tokens, the longest sequence {self.longest:,}"


def plan(module: PolicyModule, case: Case, division: Division | None = None) -> Plan:
    """Rehearse a training step and read off its peak.

    Models of many layers are rehearsed with two small numbers of them. As kinds of layers repeat, the bytes at a place
    of the step grow by the same with every period, so that the peak is known for all.

    Args:
        module: The module, with its Trainer.
        case: What it is to be rehearsed with.
        division: How training is divided among devices; as the Trainer divides it unless given.
    """
    division = division or Division.of(module.trainer)
    config = case.policy.load_config().get_text_config()
    count, period = config.num_hidden_layers, _period(list(layer_lists(config).values()), config.num_hidden_layers)
    period = math.lcm(period, int(case.policy.activation_checkpointing) or 1)
    rehearsed = case if division.shards == 1 else _in_dtype_of_products(module, case)
    if count <= 3 * period:
        meter = rehearse(module, rehearsed, division=division)
        peaks, times = meter.peaks, 1
    else:
        few, meter = (rehearse(module, rehearsed, periods * period, period, division) for periods in (2, 3))
        peaks = {place: _extrapolate(few.peaks[place], meter.peaks[place], count / period - 2) for place in few.peaks}
        times = count // period - 2
    if division.shards > 1:
        peaks = _divided(peaks, case, rehearsed, min(count, period), division.shards)
    peak = max(peaks.values(), key=lambda peak: sum(peak.values()))
    if module.device.type == "cpu":
        settled = SETTLED if case.policy.lora is None else SETTLED_WITH_ADAPTERS
        peak = peak | {"between": between(meter.trace.deepened(times), settled)}
    return Plan(batch=BatchSize.of(case.batch), **peak)


def _in_dtype_of_products(module: PolicyModule, case: Case) -> Case:
    """Divided weights are gathered in the dtype of products, without autocast."""
    dtype = compute_dtype(module.precision)
    name: Any = case.policy.dtype if dtype is None else str(dtype).removeprefix("torch.")
    return case._replace(policy=dataclasses.replace(case.policy, dtype=name))


def _divided(peaks: dict[Place, Bytes], case: Case, rehearsed: Case, period: int, shards: int) -> dict[Place, Bytes]:
    held, used = (getattr(torch, spec.dtype).itemsize for spec in (case.policy, rehearsed.policy))
    # Adapters are in float32 as they are, and a reference that stays as it is is kept in the dtype of products.
    kinds = ["weights", *(("gradients", "optimizer") if case.policy.lora is None else ())]
    kinds += ["reference"] if isinstance(case.reference, Synced) else []
    wider = dict.fromkeys(kinds, held / used)
    has_copy = any(peak.get("reference") for peak in peaks.values())
    return divided(peaks, Gathered.of(case.policy, period, used, has_copy=has_copy), shards, wider)


def _period(lists: list[list[object]], count: int) -> int:
    """Layers after which what is listed layer by layer repeats."""
    kinds = [repr(kind) for kind in zip(*lists, strict=True)] or [""] * count
    return next(step for step in range(1, count + 1) if kinds[step:] == kinds[:-step] or step == count)


def _extrapolate(few: Bytes, more: Bytes, periods: float) -> Bytes:
    return {kind: round(few.get(kind, 0) + (more[kind] - few.get(kind, 0)) * periods) for kind in more}
