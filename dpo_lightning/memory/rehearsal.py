"""A training step rehearsed on tensors without storage, to see how much memory the real one will take."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_lightning.batch import PreferenceBatch
from dpo_lightning.memory.division import Division
from dpo_lightning.memory.meter import Host, Meter
from dpo_lightning.memory.stand_ins import KnownScores, layers_of, stand_in
from dpo_lightning.models.policy import CausalPolicy
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.modules.base import PolicyModule
from dpo_lightning.modules.referenced import ReferencedModule
from dpo_lightning.references.base import Reference


class Case(NamedTuple):
    """What of a run decides how much memory it takes, and can be changed.

    Attributes:
        policy: How the policy is built.
        reference: Where reference log-probabilities come from; None where the module needs none.
        batch: The heaviest micro-batch, on the CPU.
        in_pieces: Whether it is one of several that make a batch.
    """

    policy: PolicySpec
    reference: Reference | None
    batch: PreferenceBatch
    in_pieces: bool = False


def rehearse(
    module: PolicyModule,
    case: Case,
    num_layers: int | None = None,
    period: int = 1,
    division: Division | None = None,
) -> Meter:
    """A training step in its steady state, with the optimizer's state there.

    Args:
        module: The module with its Trainer; it is left as it is.
        case: What is to be rehearsed.
        num_layers: Layers of the models; all unless given.
        period: Layers after which kinds of layers repeat.
        division: How training is divided among devices; as the Trainer divides it unless given.

    Returns:
        A meter with a trace, and bytes by kind at the peak of every place. A place is a phase with a layer, counted
        from the first for the first period and from the last for the last, or with ``head`` for what is outside of the
        layers.
    """
    meter = Meter(module.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about fake tensors
        with meter, torch.device(module.device), Host():
            double = _double(module, case, meter, num_layers, period)
            _run(double, case, meter, division or Division.of(module.trainer))
    return meter


def _run(module: PolicyModule, case: Case, meter: Meter, division: Division) -> None:
    trainer, weights = module.trainer, [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = _optimizer(module)
    meter.kind = "gradients"
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
        weight.register_post_accumulate_grad_hook(lambda weight: meter.rename([weight.grad], "gradients"))
    # Beside them DDP keeps all gradients in buckets.
    in_buckets = division.ranks > 1 and division.shards == 1
    buckets = [torch.empty_like(weight) for weight in weights] if in_buckets else []
    meter.kind = "temporary"
    optimizer.step()  # makes its state
    meter.rename((value for state in optimizer.state.values() for value in state.values()), "optimizer")
    with _phase(meter, "optimizer"):
        optimizer.step()
    if trainer.accumulate_grad_batches == 1 and not case.in_pieces:
        optimizer.zero_grad()
    with trainer.precision_plugin.train_step_context():
        with _phase(meter, "forward", "activations"):
            loss = module.summed_loss("fit", case.batch)
        if case.in_pieces:  # the weights' 16-bit copies outlive a piece
            _backward(loss, meter)
    if not case.in_pieces:
        _backward(loss, meter)
    del buckets


def _backward(loss: torch.Tensor, meter: Meter) -> None:
    with _phase(meter, "backward"), torch.autocast(loss.device.type, enabled=False):
        loss.backward()


@contextmanager
def _phase(meter: Meter, name: str, kind: str = "temporary") -> Iterator[None]:
    meter.phase, meter.kind = name, kind
    meter.move("head")
    yield
    meter.phase, meter.kind = None, "temporary"
    meter.move(None)


def _double(module: PolicyModule, case: Case, meter: Meter, num_layers: int | None, period: int) -> PolicyModule:
    """A module like another, with models without weights."""

    def load(spec: PolicySpec, weights: CausalPolicy | None = None) -> CausalPolicy:
        policy = stand_in(spec, num_layers)
        _mark_layers(policy, meter, period)
        return policy

    double = copy.copy(module)
    double.trainer = module.trainer
    vars(double).update(_modules=dict(module._modules), load=load)
    # Compiled layers are not rehearsed, and take no more.
    double.spec, double.metrics = (
        dataclasses.replace(case.policy, compile=False),
        nn.ModuleDict({"fit": module.make_metric()}),
    )
    meter.kind = "weights"
    double.policy = load(double.spec)
    meter.kind = "reference"
    if isinstance(double, ReferencedModule) and case.reference is not None:
        double.reference, double.reference_policy = case.reference, None
    double.configure_model()
    if isinstance(double, ReferencedModule) and double.needs_reference and double.reference.sums_alone:
        double.reference_policy = KnownScores()
    double.trainer.precision_plugin.convert_module(double)
    return double


def _optimizer(module: PolicyModule) -> torch.optim.Optimizer:
    found: Any = module.configure_optimizers()
    optimizer: torch.optim.Optimizer = found["optimizer"] if isinstance(found, dict) else found
    for group in optimizer.param_groups:
        # What torch chooses by itself, but not for fake tensors.
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = module.device.type == "cuda"
    return optimizer


def _mark_layers(policy: CausalPolicy, meter: Meter, period: int) -> None:
    """Have every layer say where a computation stands, forward and backward."""
    layers = layers_of(policy)
    for index, layer in enumerate(layers):
        from_end = index - len(layers)
        position = index if index < period else from_end if from_end >= -period else None
        layer.register_forward_pre_hook(_marker(meter, position))
        layer.register_forward_hook(_backward_marker(meter, position, last=from_end == -1))


def _marker(meter: Meter, position: int | None) -> Callable[..., None]:
    def mark(*_: Any) -> None:
        meter.move(position)

    return mark


def _backward_marker(meter: Meter, position: int | None, last: bool) -> Callable[..., None]:
    def mark(layer: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(_marker(meter, position))
        if last:
            meter.move("head")

    return mark
