"""What to change where a run does not fit into memory: from cheap to dear, each with what it would then take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from dpo_lightning.memory.plan import GB, Plan, plan
from dpo_lightning.memory.rehearsal import Case
from dpo_lightning.memory.shapes import halved, longest
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.dpo import DPOModule
from dpo_lightning.references.adapters import AdaptersOff
from dpo_lightning.references.cached import Cached
from dpo_lightning.references.frozen import FrozenCopy
from dpo_lightning.references.synced import Synced

Change = Callable[[Case], tuple[str, Case] | None]  # in words and done; None where there is nothing to change


class Remedy(NamedTuple):
    """A change and what it leads to."""

    words: str
    plan: Plan

    def __str__(self) -> str:
        return f"{self.words}: {self.plan.peak / GB:.2f} GB"


def remedies(module: PolicyModule, case: Case, room: int, most: int = 3) -> list[Remedy]:
    """The cheapest changes after which a run fits; where none does it alone, the first several together that do.

    Args:
        module: The module, with its Trainer.
        case: What does not fit.
        room: Bytes that there are.
        most: Most remedies.

    Returns:
        Remedies, the cheapest first; none where all changes together do not help.
    """
    found: list[Remedy] = []
    for change in _changes(module, room):
        if len(found) < most and (changed := change(case)) is not None:
            planned = plan(module, changed[1])
            found += [Remedy(changed[0], planned)] if planned.peak <= room else []
    return found or _together(module, case, room)


def _together(module: PolicyModule, case: Case, room: int) -> list[Remedy]:
    words = []
    for change in _changes(module, room):
        changed = change(case)
        if changed is not None:
            words.append(changed[0])
            case = changed[1]
            planned = plan(module, case)
            if planned.peak <= room:
                return [Remedy(" and ".join(words), planned)]
    return []


def _changes(module: PolicyModule, room: int) -> list[Change]:
    return [
        lambda case: _in_pieces(module, case, room),
        _checkpointed,
        lambda case: _cached(module, case),
        _narrow_reference,
        lambda case: _adapters(module, case),
        _shorter,
    ]


def _in_pieces(module: PolicyModule, case: Case, room: int) -> tuple[str, Case] | None:
    """As many of the longest examples as fit, one at least."""
    together = isinstance(module, DPOModule) and (module.loss.couples_batch or module.loss.num_sums)
    data, count = getattr(module.trainer, "datamodule", None), len(case.batch.length)
    if count == 1 or together or not hasattr(data, "micro_batch_tokens"):
        return None

    def of(examples: int) -> Case:
        return case._replace(batch=longest(case.batch, examples), in_pieces=True)

    least, whole = plan(module, of(1)).peak, plan(module, case).peak
    examples = max(1, min(count - 1, int(count * (room - least) / max(1, whole - least))))
    while examples > 1 and plan(module, of(examples)).peak > room:
        examples = examples * 3 // 4
    return f"data.init_args.micro_batch_tokens: {len(of(examples).batch.input_ids)}", of(examples)


def _checkpointed(case: Case) -> tuple[str, Case] | None:
    if case.policy.activation_checkpointing:
        return None
    policy = dataclasses.replace(case.policy, activation_checkpointing=True)
    return "model.init_args.policy.activation_checkpointing: true", case._replace(policy=policy)


def _cached(module: PolicyModule, case: Case) -> tuple[str, Case] | None:
    """Scores in a folder, where the loss needs no more of the reference than sums and the reference does not change."""
    if not isinstance(case.reference, FrozenCopy) or not isinstance(module, DPOModule):
        return None
    if module.loss.needs_tokens or module.loss.needs_kl:
        return None
    cached = Cached(path=case.reference.path, revision=case.reference.revision)
    return "model.init_args.reference: Cached", case._replace(reference=cached)


def _narrow_reference(case: Case) -> tuple[str, Case] | None:
    reference = case.reference
    if not isinstance(reference, FrozenCopy) or reference.quantize or reference.offload:
        return None
    if (reference.dtype or case.policy.dtype) != "float32":
        return None
    narrow = dataclasses.replace(reference, dtype="bfloat16")
    return "model.init_args.reference.init_args.dtype: bfloat16", case._replace(reference=narrow)


def _adapters(module: PolicyModule, case: Case) -> tuple[str, Case] | None:
    if case.policy.lora is not None:
        return None
    case = case._replace(policy=dataclasses.replace(case.policy, lora=LoRA()))
    words = "model.init_args.policy.lora: {rank: 16}"
    if not isinstance(case.reference, FrozenCopy | Synced):
        return words, case
    return f"{words} with model.init_args.reference: AdaptersOff", case._replace(reference=AdaptersOff())


def _shorter(case: Case) -> tuple[str, Case] | None:
    if case.batch.max_key < 64:
        return None
    case = case._replace(batch=halved(case.batch))
    return f"data.init_args.max_length: {case.batch.max_key}", case
