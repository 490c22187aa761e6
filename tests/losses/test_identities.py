"""What ties the losses to each other and to the DPO paper, arXiv:2305.18290."""

import dataclasses

import pytest
import torch
from all_losses import RANKINGS, every_loss, logps, random_pairs

from dpo_lightning.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    BCOPairLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    DPOPositiveLoss,
    EXOPairLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    LDDPOLoss,
    LengthNormalizedDPOLoss,
    MixedLoss,
    NLLLoss,
    PlackettLuceLoss,
    RDPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SoftmaxDPOLoss,
    TDPO1Loss,
    TDPO2Loss,
    Weighted,
    WPOLoss,
)

LENGTHS = torch.randint(1, 9, (20, 2), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    "loss",
    [
        DPOLoss(beta=0.3, label_smoothing=0.0),
        RobustDPOLoss(beta=0.3, label_smoothing=0.0),
        PlackettLuceLoss(beta=0.3),
        SoftmaxDPOLoss(beta=0.3),
        RDPOLoss(beta=0.3, alpha=0.0),
        LDDPOLoss(beta=0.3, ld_alpha=1.0),
        FDPOLoss(beta=0.3, divergence="reverse_kl"),
        DPOPositiveLoss(beta=0.3, lambda_=0.0),
        TDPO2Loss(beta=0.3, alpha=0.0),
        MixedLoss(losses=[Weighted(loss=DPOLoss(beta=0.3))]),
    ],
    ids=str,
)
def test_losses_that_are_dpo(loss):
    policy, reference = random_pairs(20, LENGTHS)
    torch.testing.assert_close(loss(policy, reference), DPOLoss(beta=0.3)(policy, reference))


@pytest.mark.parametrize("loss", [AOTLoss(beta=0.3), AOTUnpairedLoss(beta=0.3)], ids=str)
def test_optimal_transport_of_one_example_is_dpo(loss):
    policy, reference = random_pairs(1)
    torch.testing.assert_close(loss(policy, reference), DPOLoss(beta=0.3)(policy, reference))


def test_equal_lengths_have_no_surplus_and_a_common_denominator():
    policy, reference = random_pairs()  # 4 tokens each
    dpo = DPOLoss(beta=0.3)(policy, reference)
    torch.testing.assert_close(LDDPOLoss(beta=0.3, ld_alpha=0.1)(policy, reference), dpo)
    torch.testing.assert_close(LengthNormalizedDPOLoss(beta=0.3 * 4)(policy, reference), dpo)
    torch.testing.assert_close(RDPOLoss(beta=0.3, alpha=0.5)(policy, reference), dpo)


def test_tdpo_without_divergence_is_dpo():
    policy, reference = random_pairs()
    policy = policy._replace(kl=torch.zeros_like(policy.kl))
    dpo = DPOLoss(beta=0.3)(policy, reference)
    torch.testing.assert_close(TDPO1Loss(beta=0.3)(policy, reference), dpo)
    torch.testing.assert_close(TDPO2Loss(beta=0.3)(policy, reference), dpo)


def test_tdpo2_draws_rejected_responses_to_the_divergence_of_chosen_ones():
    policy, reference = random_pairs()
    kl = policy.kl.requires_grad_()
    TDPO2Loss()(policy, reference).sum().backward()
    chosen = policy.owner % 2 == 0
    assert (kl.grad[chosen] == 0).all()
    assert (kl.grad[~chosen] > 0).all()  # descent lowers it


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_small_alpha_is_the_reverse_kl_and_one_the_forward_kl(size):
    policy, reference = random_pairs()
    reference = reference._replace(total=policy.total + (reference.total - policy.total) / 20)
    small, large = (FDPOLoss(divergence="alpha", alpha=alpha) for alpha in (size, 1 - size))
    limits = [(small, FDPOLoss(divergence="reverse_kl")), (large, FDPOLoss(divergence="forward_kl"))]
    for loss, limit in limits:
        got, expected = loss(policy, reference), limit(policy, reference)
        torch.testing.assert_close(got, expected, atol=10 * size, rtol=10 * size)
        assert not torch.equal(got, expected)


def test_the_gradient_of_dpo_is_the_weighted_one_of_section_4():
    policy, reference = random_pairs()
    total = policy.total.requires_grad_()
    DPOLoss(beta=0.3)(policy, reference).sum().backward()
    chosen, rejected = (0.3 * (total.detach() - reference.total)).unbind(1)
    weight = 0.3 / (1 + torch.exp(chosen - rejected))  # beta times how wrong the implicit rewards are
    torch.testing.assert_close(total.grad, torch.stack([-weight, weight], 1))


def test_robust_dpo_is_unbiased_under_flipped_labels():
    policy, reference = random_pairs()
    swapped = [part._replace(total=part.total.flip(1)) for part in (policy, reference)]
    robust, epsilon = RobustDPOLoss(beta=0.3, label_smoothing=0.2), 0.2
    mean = (1 - epsilon) * robust(policy, reference) + epsilon * robust(*swapped)
    torch.testing.assert_close(mean, DPOLoss(beta=0.3)(policy, reference))


@pytest.mark.parametrize("margin", [-2.3714, 1.44012])
def test_discopop_is_stationary_where_its_paper_says(margin):
    total = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
    DiscoPOPLoss()(logps(total), logps([[0.0, 0.0]])).backward()
    assert total.grad[0, 0].item() == pytest.approx(0.0, abs=1e-5)
    assert total.grad[0, 1].item() == pytest.approx(0.0, abs=1e-5)


def test_exo_is_least_where_the_margin_says_what_the_label_does():
    epsilon = 0.1
    best = torch.logit(torch.tensor(1 - epsilon, dtype=torch.float64))
    total = torch.tensor([[best.item(), 0.0]], dtype=torch.float64, requires_grad=True)
    loss = EXOPairLoss(beta=1.0, label_smoothing=epsilon)(logps(total), logps([[0.0, 0.0]]))
    loss.backward()
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(total.grad, torch.zeros_like(total))


# Lemma 1: rewards that differ by a function of the prompt are the same preferences, so a shift of all log-probabilities
# of a prompt changes nothing where a loss knows margins alone. (These pairs have equal lengths.)
OF_MARGINS = (DPOLoss, IPOLoss, HingeLoss, EXOPairLoss, SimPOLoss, PlackettLuceLoss, SoftmaxDPOLoss, AOTLoss)


def knows_margins_alone(loss):
    if isinstance(loss, FDPOLoss):
        return loss.divergence == "reverse_kl"
    if isinstance(loss, (WPOLoss, AOTUnpairedLoss)):
        return False
    return isinstance(loss, OF_MARGINS) or type(loss).__name__ in {"DiscoPOPLoss", "TDPO1Loss", "TDPO2Loss"}


@every_loss
def test_a_shift_of_both_responses_of_a_prompt_changes_nothing_exactly_where_theory_says_so(loss):
    policy, reference = random_pairs()
    generator = torch.Generator().manual_seed(2)
    shift = 10 * torch.randn(20, 1, dtype=torch.float64, generator=generator)
    shifted = logps(policy.total + shift)._replace(kl=policy.kl)
    if knows_margins_alone(loss):
        torch.testing.assert_close(loss(shifted, reference), loss(policy, reference))
    else:
        assert not torch.allclose(loss(shifted, reference), loss(policy, reference))


@every_loss
def test_examples_are_permuted_with_their_losses(loss):
    policy, reference = random_pairs()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    permuted = [logps(part.total[order]) for part in (policy, reference)]
    torch.testing.assert_close(loss(*permuted), loss(policy, reference)[order])


@every_loss
def test_only_losses_that_couple_a_batch_look_beyond_their_example(loss):
    policy, reference = random_pairs()
    singles = zip(policy.total.split(1), reference.total.split(1), strict=True)
    alone = torch.cat([loss(logps(ours), logps(theirs)) for ours, theirs in singles])
    assert loss.couples_batch != torch.allclose(loss(policy, reference), alone)


@pytest.mark.parametrize("loss", [AOTLoss(), AOTUnpairedLoss()], ids=str)
def test_an_absent_response_takes_no_rank(loss):
    policy, reference = random_pairs(3)
    more = [part.total.new_tensor([[-3.0, 0.0]]) for part in (policy, reference)]
    length = [[4, 4], [4, 0], [4, 4], [4, 4]]
    mixed = [
        logps(torch.cat([part.total[:1], lone, part.total[1:]]), length)
        for part, lone in zip((policy, reference), more, strict=True)
    ]
    torch.testing.assert_close(loss(*mixed)[[0, 2, 3]], loss(policy, reference))


def test_unpaired_transport_does_not_know_which_responses_were_pairs():
    policy, reference = random_pairs()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    repaired = [logps(torch.stack([part.total[:, 0], part.total[order, 1]], 1)) for part in (policy, reference)]
    loss = AOTUnpairedLoss()
    torch.testing.assert_close(loss(*repaired), loss(policy, reference))
    assert not torch.allclose(AOTLoss()(*repaired), AOTLoss()(policy, reference))


@pytest.mark.parametrize("loss", RANKINGS, ids=str)
def test_absent_responses_take_no_part_in_rankings(loss):
    policy, reference = random_pairs()
    wide = [torch.cat([part.total, part.total.new_zeros(20, 1)], 1) for part in (policy, reference)]
    length = [[4, 4, 0]] * 20
    torch.testing.assert_close(loss(*(logps(total, length) for total in wide)), loss(policy, reference))


def test_softmax_dpo_does_not_know_the_order_of_the_others():
    totals = torch.tensor([[-3.0, -5.0, -4.0], [-3.0, -4.0, -5.0]])
    value = SoftmaxDPOLoss()(logps(totals), logps(torch.zeros(2, 3)))
    torch.testing.assert_close(value[0], value[1])
    ranked = PlackettLuceLoss()(logps(totals), logps(torch.zeros(2, 3)))
    assert ranked[0] > ranked[1]


def test_cpo_is_the_sum_of_its_parts():
    policy, _ = random_pairs(20, LENGTHS)
    uniform = policy._replace(total=torch.zeros_like(policy.total))
    cpo = CPOLoss(beta=0.3, alpha=0.7)(policy, None)
    torch.testing.assert_close(cpo, DPOLoss(beta=0.3)(policy, uniform) + 0.7 * NLLLoss()(policy, None))


@pytest.mark.parametrize("loss", [DPOLoss(), LengthNormalizedDPOLoss(), RDPOLoss(), LDDPOLoss(), WPOLoss()], ids=str)
def test_smoothed_labels_are_a_mean_over_flipped_ones(loss):
    policy, reference = random_pairs(20, LENGTHS)
    sure, smoothed = (dataclasses.replace(loss, label_smoothing=epsilon) for epsilon in (0.0, 0.3))
    flipped = [logps(part.total.flip(1), [row[::-1] for row in LENGTHS]) for part in (policy, reference)]
    mean = 0.7 * sure(policy, reference) + 0.3 * sure(*flipped)
    torch.testing.assert_close(smoothed(policy, reference), mean)


def test_the_mean_over_all_rewards_leaves_bco_unchanged_by_a_shift_of_all():
    policy, reference = random_pairs()
    loss = BCOPairLoss()
    shifted = policy._replace(total=policy.total + 7)
    got = loss(shifted, reference, loss.sums(shifted, reference))
    torch.testing.assert_close(got, loss(policy, reference, loss.sums(policy, reference)))
