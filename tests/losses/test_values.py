"""Each loss against `math` alone on log-probabilities."""

import math

import pytest
import torch
from all_losses import LENGTH, MARGIN, POLICY, REFERENCE, logps, sigmoid, softplus

from dpo_lightning.batch import Logps
from dpo_lightning.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
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
    NCAPairLoss,
    NLLLoss,
    ORPOLoss,
    PlackettLuceLoss,
    RDPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SoftmaxDPOLoss,
    SPPOHardLoss,
    TDPO1Loss,
    TDPO2Loss,
    UnlikelihoodLoss,
    WPOLoss,
)

BLEND = sigmoid(0.05 * MARGIN / 0.05)  # of DiscoPOP at its own constants
LOG_ODDS_RATIO = math.log(math.exp(-2) / (1 - math.exp(-2))) - math.log(math.exp(-6) / (1 - math.exp(-6)))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(beta=0.1), softplus(-0.1 * MARGIN)),
        (UnlikelihoodLoss(alpha=0.1), 10 + 0.1 * -12),
        (UnlikelihoodLoss(alpha=0.5), 10 + 0.5 * -12),
        (DPOLoss(beta=0.1, label_smoothing=0.2), 0.8 * softplus(-0.1 * MARGIN) + 0.2 * softplus(0.1 * MARGIN)),
        (
            RobustDPOLoss(beta=0.1, label_smoothing=0.2),
            (0.8 * softplus(-0.1 * MARGIN) - 0.2 * softplus(0.1 * MARGIN)) / 0.6,
        ),
        (LengthNormalizedDPOLoss(beta=5.0), softplus(-5 * (2 / 5 - -4 / 2))),
        (RDPOLoss(beta=0.1, alpha=0.05), softplus(-(0.1 * MARGIN + 0.05 * (5 - 2)))),
        (IPOLoss(tau=0.1), (MARGIN - 5.0) ** 2),
        (IPOLoss(tau=0.1, length_normalized=True), (2 / 5 - -4 / 2 - 5.0) ** 2),
        (HingeLoss(beta=0.1), 1 - 0.1 * MARGIN),
        (HingeLoss(beta=0.2), 0.0),
        (
            EXOPairLoss(beta=0.1, label_smoothing=0.01),
            sigmoid(0.6) * math.log(sigmoid(0.6) / 0.99) + sigmoid(-0.6) * math.log(sigmoid(-0.6) / 0.01),
        ),
        (DiscoPOPLoss(beta=0.05, tau=0.05), (1 - BLEND) * softplus(-0.3) + BLEND * math.exp(-0.3)),
        (FDPOLoss(beta=0.1, divergence="reverse_kl"), softplus(-0.1 * MARGIN)),
        (FDPOLoss(beta=0.1, divergence="forward_kl"), softplus(-0.1 * (-math.exp(-2) - -math.exp(4)))),
        (
            FDPOLoss(beta=0.1, divergence="jensen_shannon"),
            softplus(-0.1 * math.log(math.exp(2) / (1 + math.exp(2)) / (math.exp(-4) / (1 + math.exp(-4))))),
        ),
        (
            FDPOLoss(beta=0.1, divergence="alpha", alpha=0.25),
            softplus(-0.1 * ((1 - math.exp(-0.5)) / 0.25 - (1 - math.exp(1.0)) / 0.25)),
        ),
        (NCAPairLoss(beta=0.1), softplus(-0.2) + 0.5 * softplus(0.2) + 0.5 * softplus(-0.4)),
        (BCOPairLoss(beta=0.1), softplus(-0.2) + softplus(-0.4)),
        (SPPOHardLoss(beta=0.1), (2 - 5.0) ** 2 + (-4 + 5.0) ** 2),
        (APOZeroLoss(beta=0.1), 1 - sigmoid(0.2) + sigmoid(-0.4)),
        (APODownLoss(beta=0.1), sigmoid(0.2) + 1 - sigmoid(0.6)),
        (DPOPositiveLoss(beta=0.1, lambda_=5.0), softplus(-0.1 * MARGIN)),  # the chosen response has become likelier
        (AOTLoss(beta=0.1), softplus(-0.1 * MARGIN)),
        (AOTLoss(beta=0.1, label_smoothing=0.2), 0.8 * softplus(-0.6) + 0.2 * softplus(0.6)),
        (AOTUnpairedLoss(beta=0.1), softplus(-0.1 * MARGIN)),
        (SimPOLoss(beta=2.0, gamma=0.5), softplus(-(2.0 * (-10 / 5 - -12 / 2) - 0.5))),
        (ORPOLoss(lambda_=0.5), 10 / 5 + 0.5 * softplus(-LOG_ODDS_RATIO)),
        (CPOLoss(beta=0.1), softplus(-0.1 * (-10 - -12)) + 10 / 5),
        (CPOLoss(beta=0.1, alpha=0.5, length_normalized=False), softplus(-0.1 * (-10 - -12)) + 0.5 * 10),
        (NLLLoss(), 10 / 5),
        (NLLLoss(length_normalized=False), 10.0),
        (PlackettLuceLoss(beta=0.1), softplus(-0.1 * MARGIN)),
        (SoftmaxDPOLoss(beta=0.1), softplus(-0.1 * MARGIN)),
    ],
    ids=str,
)
def test_loss_by_hand(loss, expected):
    got = loss(logps(POLICY, LENGTH), logps(REFERENCE, LENGTH))
    assert got.shape == (1,)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(beta=0.1), [0.2, -0.4]),
        (RobustDPOLoss(beta=0.5), [1.0, -2.0]),
        (LengthNormalizedDPOLoss(beta=5.0), [5 * 2 / 5, 5 * -4 / 2]),
        (RDPOLoss(beta=0.1, alpha=0.05), [0.2 + 0.05 * 5, -0.4 + 0.05 * 2]),
        (IPOLoss(tau=0.25), [0.5, -1.0]),  # tau times the log-ratio
        (IPOLoss(tau=0.25, length_normalized=True), [0.25 * 2 / 5, 0.25 * -4 / 2]),
        (HingeLoss(beta=0.1), [0.2, -0.4]),
        (FDPOLoss(beta=0.1, divergence="forward_kl"), [-0.1 * math.exp(-2), -0.1 * math.exp(4)]),
        (
            FDPOLoss(beta=0.1, divergence="jensen_shannon"),
            [0.1 * math.log(2 * sigmoid(2)), 0.1 * math.log(2 * sigmoid(-4))],
        ),
        (
            FDPOLoss(beta=0.1, divergence="alpha", alpha=0.25),
            [0.4 * (1 - math.exp(-0.5)), 0.4 * (1 - math.exp(1.0))],
        ),
        (SPPOHardLoss(beta=0.1), [0.2, -0.4]),
        (AOTLoss(beta=0.1), [0.2, -0.4]),
        (SimPOLoss(beta=2.0), [2.0 * -10 / 5, 2.0 * -12 / 2]),
        (ORPOLoss(), [math.log(math.exp(-2) / (1 - math.exp(-2))), math.log(math.exp(-6) / (1 - math.exp(-6)))]),
        (CPOLoss(beta=0.5), [-5.0, -6.0]),
        (NLLLoss(), [-10 / 5, -12 / 2]),
        (PlackettLuceLoss(beta=0.1), [0.2, -0.4]),
    ],
    ids=str,
)
def test_rewards_by_hand(loss, expected):
    rewards = loss.rewards(logps(POLICY, LENGTH), logps(REFERENCE, LENGTH))
    assert rewards.shape == (1, 2)
    assert rewards[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_ranking_of_three_by_hand_with_and_without_an_absent_response():
    policy = logps([[-3.0, -5.0, -4.0], [-3.0, -5.0, 0.0]], [[2, 2, 2], [2, 2, 0]])
    reference = logps([[-4.0, -4.0, -4.0], [-4.0, -4.0, 0.0]], [[2, 2, 2], [2, 2, 0]])
    a, b, c = math.exp(0.5), math.exp(-0.5), math.exp(0.0)
    expected = [-math.log(a / (a + b + c)) - math.log(b / (b + c)), -math.log(a / (a + b))]
    loss = PlackettLuceLoss(beta=0.5)
    assert loss(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)
    assert loss.rewards(policy, reference).tolist() == [[0.5, -0.5, 0.0], [0.5, -0.5, 0.0]]
    expected = [-math.log(a / (a + b + c)), -math.log(a / (a + b))]
    assert SoftmaxDPOLoss(beta=0.5)(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)


def test_dpo_positive_punishes_a_chosen_response_that_became_rarer_than_in_the_reference():
    loss = DPOPositiveLoss(beta=0.1, lambda_=5.0)
    policy, reference = logps([[-14.0, -20.0]]), logps([[-12.0, -8.0]])  # log-ratios -2 and -12
    assert loss(policy, reference).item() == pytest.approx(softplus(-0.1 * (10.0 - 5.0 * 2.0)), rel=1e-12)


@pytest.mark.parametrize(("sums", "mean"), [(None, 0.0), ([0.0, 0.0], 0.0), ([3.0, 4.0], 0.75)])
def test_bco_classifies_around_the_mean_of_all_rewards_so_far(sums, mean):
    policy, reference = logps(POLICY, LENGTH), logps(REFERENCE, LENGTH)
    sums = None if sums is None else torch.tensor(sums, dtype=torch.float64)
    expected = softplus(-(0.2 - mean)) + softplus(-0.4 - mean)
    assert BCOPairLoss(beta=0.1)(policy, reference, sums).item() == pytest.approx(expected, rel=1e-12)


def test_bco_sums_the_rewards_of_present_responses():
    total = torch.tensor([*POLICY, [-7.0, 0.0]], requires_grad=True)
    sums = BCOPairLoss(beta=0.1).sums(
        logps(total, [[5, 2], [3, 0]]), logps([*REFERENCE, [-12.0, 0.0]], [[5, 2], [3, 0]])
    )
    assert not sums.requires_grad
    assert sums.tolist() == pytest.approx([0.2 - 0.4 + 0.5, 3.0])


def test_aot_compares_margins_of_equal_rank_by_hand():
    # Policy margins 3, 1, 2 and reference margins 0, 5, -1, which in order are -1, 0, 5.
    policy = logps([[-1.0, -4.0], [-2.0, -3.0], [-3.0, -5.0]])
    reference = logps([[-2.0, -2.0], [-1.0, -6.0], [-3.0, -2.0]])
    expected = [softplus(-0.1 * (3 - 5)), softplus(-0.1 * (1 - -1)), softplus(-0.1 * (2 - 0))]
    assert AOTLoss(beta=0.1)(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)


def test_unpaired_aot_compares_log_ratios_of_equal_rank_by_hand():
    # Log-ratios of chosen 1, -1, 0 and of rejected -2, 3, -3, which in order are -3, -2, 3.
    policy = logps([[-1.0, -4.0], [-2.0, -3.0], [-3.0, -5.0]])
    reference = logps([[-2.0, -2.0], [-1.0, -6.0], [-3.0, -2.0]])
    expected = [softplus(-0.1 * (1 - 3)), softplus(-0.1 * (-1 - -3)), softplus(-0.1 * (0 - -2))]
    assert AOTUnpairedLoss(beta=0.1)(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)


def tokens(*responses, **others):
    """Log-probabilities of one example from those of the tokens of its responses."""
    length = torch.tensor([[len(response) for response in responses]])
    token = torch.tensor([value for response in responses for value in response], dtype=torch.float64)
    total = torch.tensor([[sum(response) for response in responses]], dtype=torch.float64)
    others = {name: torch.tensor(values, dtype=torch.float64) for name, values in others.items()}
    return Logps(total, length, token, torch.repeat_interleave(length.flatten()), **others)


@pytest.mark.parametrize(
    ("ld_alpha", "chosen", "rejected"), [(1.0, -6.0, -3.0), (0.5, -3.0 + 0.5 * -3.0, -3.0), (0.0, -3.0, -3.0)]
)
def test_ld_dpo_discounts_what_is_longer_than_the_other_response_by_hand(ld_alpha, chosen, rejected):
    policy, reference = tokens([-1.0, -2.0, -3.0], [-2.0, -1.0]), tokens([-2.0, -2.0, -2.0], [-1.0, -1.0])
    log_ratios = chosen - (-4.0 + ld_alpha * -2.0), rejected - -2.0
    loss = LDDPOLoss(beta=0.1, ld_alpha=ld_alpha)
    assert loss.rewards(policy, reference)[0].tolist() == pytest.approx([0.1 * value for value in log_ratios])
    expected = softplus(-0.1 * (log_ratios[0] - log_ratios[1]))
    assert loss(policy, reference).item() == pytest.approx(expected, rel=1e-12)


def test_ld_dpo_discounts_rejected_responses_too():
    policy, reference = tokens([-2.0], [-1.0, -2.0, -3.0]), tokens([-1.0], [-2.0, -2.0, -2.0])
    rewards = LDDPOLoss(beta=1.0, ld_alpha=0.25).rewards(policy, reference)
    assert rewards[0].tolist() == pytest.approx([-1.0, (-1 - 0.25 * 5) - (-2 - 0.25 * 4)])


@pytest.mark.parametrize(("max_weight", "bounded"), [(None, False), (1.0, True), (100.0, False)])
def test_wpo_weights_by_hand(max_weight, bounded):
    policy = tokens([-1.0, -0.5, -0.25], [-3.0, -2.0], collision=[-0.5, -1.5, -1.0, -1.5, -1.0])
    reference = tokens([-1.0, -1.0, -1.0], [-2.0, -2.0])
    # Chosen: (-0.5 + 1.0 + 0.75) / 3, rejected: (-1.5 - 1.0) / 2.
    weight = math.exp(1.25 / 3 + -2.5 / 2)
    expected = weight * softplus(-0.1 * ((-1.75 + 3) - (-5 + 4)))
    loss = WPOLoss(beta=0.1, max_weight=max_weight)
    assert loss(policy, reference).item() == pytest.approx(expected, rel=1e-12)
    likely = policy._replace(collision=policy.collision - 1)
    weight = 1.0 if bounded else math.exp(1.25 / 3 + 1 + -2.5 / 2 + 1)
    assert loss.weights(likely).item() == pytest.approx(weight, rel=1e-12)


def test_tdpo_by_hand():
    policy = tokens([-1.0, -2.0], [-2.0, -1.0, -3.0], kl=[0.1, 0.3, 0.5, 0.25, 0.75])
    reference = tokens([-2.0, -2.0], [-1.0, -1.0, -2.0])
    margin, chosen_kl, rejected_kl = 1 - -2, 0.1 + 0.3, 0.5 + 0.25 + 0.75
    expected = softplus(-(0.5 * margin - (0.5 * rejected_kl - 0.5 * chosen_kl)))
    assert TDPO1Loss(beta=0.5)(policy, reference).item() == pytest.approx(expected, rel=1e-12)
    expected = softplus(-(0.5 * margin - 0.25 * (0.5 * rejected_kl - 0.5 * chosen_kl)))
    assert TDPO2Loss(beta=0.5, alpha=0.25)(policy, reference).item() == pytest.approx(expected, rel=1e-12)
    for loss in (TDPO1Loss(beta=0.5), TDPO2Loss(beta=0.5, alpha=0.25)):
        rewards = loss.rewards(policy, reference)[0].tolist()
        assert rewards == pytest.approx([0.5 * (1 + chosen_kl), 0.5 * (-2 + rejected_kl)])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(), math.log(2)),
        (DPOLoss(label_smoothing=0.3), math.log(2)),
        (RobustDPOLoss(label_smoothing=0.3), math.log(2)),
        (LengthNormalizedDPOLoss(), math.log(2)),
        (LDDPOLoss(), math.log(2)),
        (PlackettLuceLoss(), math.log(2)),
        (SoftmaxDPOLoss(), math.log(2)),
        (FDPOLoss(divergence="reverse_kl"), math.log(2)),
        (FDPOLoss(divergence="jensen_shannon"), math.log(2)),
        (FDPOLoss(divergence="alpha"), math.log(2)),
        (AOTLoss(), math.log(2)),
        (AOTLoss(label_smoothing=0.3), math.log(2)),
        (AOTUnpairedLoss(), math.log(2)),
        (DPOPositiveLoss(), math.log(2)),
        (NCAPairLoss(), 2 * math.log(2)),
        (BCOPairLoss(), 2 * math.log(2)),
        (EXOPairLoss(label_smoothing=0.01), math.log(0.5) - 0.5 * math.log(0.99 * 0.01)),
        (DiscoPOPLoss(), 0.5 * math.log(2) + 0.5),
        (SPPOHardLoss(beta=0.1), 2 * 5.0**2),
        (APOZeroLoss(), 1.0),
        (APODownLoss(), 1.0),
        (IPOLoss(tau=0.1), 25.0),
        (IPOLoss(tau=0.1, length_normalized=True), 25.0),
        (HingeLoss(), 1.0),
    ],
    ids=str,
)
def test_a_policy_that_is_its_reference_has_no_rewards_and_the_loss_of_no_margin(loss, expected):
    policy = logps(POLICY, LENGTH)
    assert loss.rewards(policy, policy).tolist() == [[0.0, 0.0]]
    assert loss(policy, policy).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [TDPO1Loss(), TDPO2Loss(), FDPOLoss(divergence="forward_kl")], ids=str)
def test_other_losses_that_start_at_a_coin_flip(loss):
    policy = logps(POLICY, LENGTH)
    policy = policy._replace(kl=torch.zeros_like(policy.kl))  # as it is where the distributions are the same
    assert loss(policy, policy).item() == pytest.approx(math.log(2))


def test_rankings_of_three_start_at_the_share_of_one_order_or_one_response():
    policy = logps([[-3.0, -5.0, -4.0]])
    assert PlackettLuceLoss()(policy, policy).item() == pytest.approx(math.log(6))  # one of 3! orders
    assert SoftmaxDPOLoss()(policy, policy).item() == pytest.approx(math.log(3))
