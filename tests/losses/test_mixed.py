"""Weighted sums of losses: values, what they need, what they log, and the state of their parts."""

import math
from dataclasses import dataclass

import pytest
import torch
from all_losses import LENGTH, LOSSES, MARGIN, MPO, POLICY, REFERENCE, every_loss, logps, random_pairs, softplus

from dpo_lightning.losses import (
    AOTLoss,
    BCOPairLoss,
    DPOLoss,
    IPOLoss,
    LDDPOLoss,
    MixedLoss,
    NLLLoss,
    PreferenceLoss,
    SimPOLoss,
    TDPO1Loss,
    Weighted,
    WPOLoss,
)

NEEDS = ("needs_reference", "needs_collision", "needs_kl", "needs_tokens", "couples_batch", "compares_responses")


def mixed(*losses):
    return MixedLoss(losses=[Weighted(loss=loss) for loss in losses])


def test_mpo_by_hand():
    policy, reference = logps(POLICY, LENGTH), logps(REFERENCE, LENGTH)
    sums = torch.tensor([3.0, 4.0], dtype=torch.float64)
    parts = {
        "DPO": softplus(-0.1 * MARGIN),
        "BCOPair": softplus(-(0.2 - 0.75)) + softplus(-0.4 - 0.75),
        "NLL": 10 / 5,
    }
    got = MPO.parts(policy, reference, sums)
    assert {name: value.item() for name, value in got.items()} == pytest.approx(parts)
    assert list(got) == list(parts)
    expected = 0.8 * parts["DPO"] + 0.2 * parts["BCOPair"] + parts["NLL"]
    assert MPO(policy, reference, sums).item() == pytest.approx(expected, rel=1e-12)
    assert MPO(policy, reference).item() == pytest.approx(
        0.8 * parts["DPO"] + 0.2 * (softplus(-0.2) + softplus(-0.4)) + parts["NLL"], rel=1e-12
    )


@every_loss
def test_a_mixture_of_one_is_that_one(loss):
    policy, reference = random_pairs(5)
    one = mixed(loss)
    assert torch.equal(one(policy, reference), loss(policy, reference))
    assert torch.equal(one.rewards(policy, reference), loss.rewards(policy, reference))
    assert torch.equal(one.sums(policy, reference), loss.sums(policy, reference))
    assert one.num_sums == loss.num_sums
    assert [getattr(one, name) for name in NEEDS] == [getattr(loss, name) for name in NEEDS]
    (part,) = one.parts(policy, reference).values()
    assert torch.equal(part, loss(policy, reference))


def test_other_losses_have_no_parts():
    policy, reference = random_pairs(5)
    others = [loss for loss in LOSSES if not isinstance(loss, MixedLoss)]
    assert all(loss.parts(policy, reference) == {} and loss.part_names == () for loss in others)


@pytest.mark.parametrize(
    ("losses", "needs"),
    [
        ((NLLLoss(), NLLLoss()), set()),
        ((NLLLoss(), SimPOLoss()), {"compares_responses"}),
        ((NLLLoss(), DPOLoss()), {"needs_reference", "compares_responses"}),
        ((WPOLoss(), NLLLoss()), {"needs_reference", "needs_collision", "compares_responses"}),
        ((NLLLoss(), TDPO1Loss()), {"needs_reference", "needs_kl", "compares_responses"}),
        ((NLLLoss(), LDDPOLoss()), {"needs_reference", "needs_tokens", "compares_responses"}),
        ((AOTLoss(), NLLLoss()), {"needs_reference", "couples_batch", "compares_responses"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_a_mixture_needs_what_any_part_needs(losses, needs):
    assert {name for name in NEEDS if getattr(mixed(*losses), name)} == needs


def test_rewards_are_those_of_the_first_part_that_compares_responses():
    policy, reference = random_pairs(5)
    dpo, ipo = DPOLoss(beta=0.3), IPOLoss(tau=0.7)
    assert torch.equal(mixed(NLLLoss(), dpo, ipo).rewards(policy, reference), dpo.rewards(policy, reference))
    assert torch.equal(mixed(NLLLoss(), ipo, dpo).rewards(policy, reference), ipo.rewards(policy, reference))
    nested = mixed(NLLLoss(), mixed(NLLLoss(), ipo), dpo)
    assert torch.equal(nested.rewards(policy, reference), ipo.rewards(policy, reference))
    assert torch.equal(mixed(NLLLoss()).rewards(policy, None), NLLLoss().rewards(policy, None))


def test_parts_of_one_kind_are_numbered():
    policy, reference = random_pairs(5)
    loss = mixed(DPOLoss(), NLLLoss(), DPOLoss(beta=0.3), DPOLoss())
    assert loss.part_names == ("DPO", "NLL", "DPO2", "DPO3")
    assert tuple(loss.parts(policy, reference)) == loss.part_names


def test_every_part_has_its_own_sums():
    policy, reference = random_pairs(5)
    first, second = BCOPairLoss(beta=0.1), BCOPairLoss(beta=0.4)
    loss = mixed(first, DPOLoss(), mixed(NLLLoss(), second))
    assert loss.num_sums == 4
    sums = loss.sums(policy, reference)
    assert torch.equal(sums, torch.cat([first.sums(policy, reference), second.sums(policy, reference)]))
    parts = loss.parts(policy, reference, sums)
    assert torch.equal(parts["BCOPair"], first(policy, reference, sums[:2]))
    assert torch.equal(parts["Mixed"], NLLLoss()(policy, None) + second(policy, reference, sums[2:]))


def test_a_weight_of_zero_logs_a_part_only():
    policy, reference = random_pairs(5)
    loss = MixedLoss(losses=[Weighted(loss=DPOLoss()), Weighted(loss=NLLLoss(), weight=0.0)])
    assert torch.equal(loss(policy, reference), DPOLoss()(policy, reference))
    assert torch.equal(loss.parts(policy, reference)["NLL"], NLLLoss()(policy, None))


@dataclass(frozen=True, kw_only=True)
class Plain(PreferenceLoss):
    """A loss of a user's who has never heard of sums."""

    def __call__(self, policy, reference):
        return policy.total.sum(1)

    def rewards(self, policy, reference):
        return policy.total


def test_a_loss_that_takes_no_sums_may_be_a_part_beside_one_that_does():
    policy, reference = logps(POLICY, LENGTH), logps(REFERENCE, LENGTH)
    loss = mixed(Plain(), BCOPairLoss(beta=0.1))
    sums = loss.sums(policy, reference)
    assert sums.tolist() == pytest.approx([-0.2, 2.0])
    expected = -22.0 + math.log1p(math.exp(-(0.2 + 0.1))) + math.log1p(math.exp(-0.4 + 0.1))
    assert loss(policy, reference, sums).item() == pytest.approx(expected)


def test_parts_that_compare_pairs_refuse_rankings():
    policy = logps([[-3.0, -5.0, -4.0]])
    with pytest.raises(ValueError, match="DPOLoss compares two responses"):
        mixed(NLLLoss(), DPOLoss())(policy, policy)
