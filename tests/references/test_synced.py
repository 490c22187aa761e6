"""TR-DPO: the reference takes up weights of the policy at every interval, and a resumed run goes on with it."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from small_runs import data, every_step, fit, module, same, saving, trained, trainer

from dpo_lightning import DPOModule
from dpo_lightning.errors import UsageError
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.references import Synced


class Follow(Callback):
    """Weights of policy and reference behind every optimizer step."""

    def __init__(self):
        self.policy, self.reference = [], []

    def note(self, module):
        for kept, policy in ((self.policy, module.policy), (self.reference, module.reference_policy.policy)):
            kept.append({name: weight.detach().clone() for name, weight in policy.named_parameters()})

    def on_train_start(self, trainer, pl_module):
        self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.policy):
            self.note(pl_module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("alpha", "interval"), [(0.6, 2), (1.0, 3), (0.25, 1)])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_updates_equal_a_hand_computation(tiny_llama, tmp_path, alpha, interval, accumulate, lora):
    follow = Follow()
    dpo = module(tiny_llama, Synced(alpha=alpha, interval=interval), lora)
    losses = fit(tmp_path, dpo, data(tiny_llama), callbacks=[follow], accumulate_grad_batches=accumulate)
    assert losses.values[0] == pytest.approx(math.log(2), abs=1e-6)
    expected = follow.policy[0]
    assert len(follow.policy) == 7
    for step, (policy, reference) in enumerate(zip(follow.policy, follow.reference, strict=True)):
        if step and step % interval == 0:
            expected = {name: alpha * policy[name] + (1 - alpha) * expected[name] for name in expected}
        torch.testing.assert_close(reference, expected, atol=1e-7, rtol=1e-5)
    assert not same(follow.policy[0], expected)


def test_a_hard_update_brings_the_loss_back_to_log_2(tiny_llama, tmp_path):
    losses = fit(tmp_path, module(tiny_llama, Synced(alpha=1.0, interval=3)), data(tiny_llama))
    assert [abs(loss - math.log(2)) < 1e-6 for loss in losses.values] == [True, False, False, True, False, False]


def reference_weights(module):
    return {name: weight.clone() for name, weight in module.reference_policy.named_parameters()}


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize("step", [3, 4])  # between two updates, and at one
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_llama, tmp_path, step, lora):
    whole = module(tiny_llama, Synced(alpha=0.5, interval=2), lora)
    expected = saving(tmp_path, whole, data(tiny_llama))
    resumed = module(tiny_llama, Synced(alpha=0.5, interval=2), lora)
    found = fit(tmp_path, resumed, data(tiny_llama), tmp_path / f"step={step}.ckpt", seed=1)
    assert found.values == expected.values[step:]
    assert same(trained(resumed), trained(whole))
    assert same(reference_weights(resumed), reference_weights(whole))


def test_updates_wait_for_whole_accumulated_batches_when_resumed(tiny_llama, tmp_path):
    settings = {"accumulate_grad_batches": 2}
    whole, resumed = (module(tiny_llama, Synced(alpha=0.5, interval=2)) for _ in range(2))
    saving(tmp_path, whole, data(tiny_llama), **settings)
    fit(tmp_path, resumed, data(tiny_llama), tmp_path / "step=3.ckpt", seed=1, **settings)
    assert same(reference_weights(resumed), reference_weights(whole))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_loaded_checkpoint_holds_its_reference(tiny_llama, tmp_path, lora):
    dpo = module(tiny_llama, Synced(alpha=0.5, interval=2), lora)
    saving(tmp_path, dpo, data(tiny_llama))
    loaded = DPOModule.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    assert loaded.reference == dpo.reference
    assert same(reference_weights(loaded), reference_weights(dpo))
    before, after = (trainer(tmp_path).validate(m, data(tiny_llama), verbose=False)[0] for m in (dpo, loaded))
    assert after == before
    assert abs(before["val/loss"] - math.log(2)) > 1e-3
    # And goes on from there.
    fit(tmp_path, loaded, data(tiny_llama), max_steps=1)


def test_under_adapters_checkpoints_hold_those_of_both_alone(tiny_llama, tmp_path):
    dpo = module(tiny_llama, Synced(alpha=0.5, interval=2), LoRA(rank=2))
    saving(tmp_path, dpo, data(tiny_llama), max_steps=2)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    policy = {f"policy.{name}" for name in trained(dpo)}
    assert set(state) == policy | {f"reference_{name}" for name in map("policy.{}".format, policy)}


def test_the_reference_is_in_no_optimizer_and_never_trains(tiny_llama, tmp_path):
    dpo = module(tiny_llama, Synced(alpha=0.5, interval=2))
    run = trainer(tmp_path, max_steps=2, callbacks=[every_step(tmp_path)], enable_checkpointing=True)
    run.fit(dpo, data(tiny_llama))
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    reference = list(dpo.reference_policy.parameters())
    assert optimized == {id(p) for p in dpo.policy.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in reference)
    assert not any(part.training for part in dpo.reference_policy.modules())


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"alpha": 0.0}, r"`alpha` must be in \(0, 1\], got 0.0; for a fixed reference use FrozenCopy"),
        ({"alpha": 1.5}, r"`alpha` must be in \(0, 1\], got 1.5"),
        ({"interval": 0}, "`interval` must be 1 or more, got 0"),
    ],
)
def test_constants_without_meaning_are_refused(constants, message):
    with pytest.raises(UsageError, match=message):
        Synced(**constants)
