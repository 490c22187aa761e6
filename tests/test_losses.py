"""Each loss against `math` alone on log-probabilities, what it refuses, and what all losses have in common."""

import dataclasses
import math

import pytest
import torch

from dpo_lightning.batch import Logps
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import (
    DPOLoss,
    HingeLoss,
    IPOLoss,
    PairwiseLoss,
    PlackettLuceLoss,
    RobustDPOLoss,
    SimPOLoss,
    implicit_rewards,
)

# One pair: log-ratios 2 and -4 nats, responses of 5 and 2 tokens.
POLICY, REFERENCE, LENGTH = [[-10.0, -12.0]], [[-12.0, -8.0]], [[5, 2]]
MARGIN = 6.0

LOSSES = [
    DPOLoss(beta=0.1),
    DPOLoss(beta=0.3, label_smoothing=0.2),
    RobustDPOLoss(beta=0.2, label_smoothing=0.1),
    IPOLoss(tau=0.1),
    IPOLoss(tau=0.2, length_normalized=True),
    HingeLoss(beta=0.1),
    SimPOLoss(beta=2.0, gamma=0.5),
    PlackettLuceLoss(beta=0.1),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def logps(total, length=None, dtype=torch.float64):
    total = torch.as_tensor(total, dtype=dtype)
    return Logps(total, torch.full(total.shape, 4) if length is None else torch.tensor(length))


def softplus(value):
    """Minus the log of the logistic function at minus the value."""
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(beta=0.1), softplus(-0.1 * MARGIN)),
        (DPOLoss(beta=0.1, label_smoothing=0.2), 0.8 * softplus(-0.1 * MARGIN) + 0.2 * softplus(0.1 * MARGIN)),
        (
            RobustDPOLoss(beta=0.1, label_smoothing=0.2),
            (0.8 * softplus(-0.1 * MARGIN) - 0.2 * softplus(0.1 * MARGIN)) / 0.6,
        ),
        (IPOLoss(tau=0.1), (MARGIN - 5.0) ** 2),
        (IPOLoss(tau=0.1, length_normalized=True), (2 / 5 - -4 / 2 - 5.0) ** 2),
        (HingeLoss(beta=0.1), 1 - 0.1 * MARGIN),
        (HingeLoss(beta=0.2), 0.0),
        (SimPOLoss(beta=2.0, gamma=0.5), softplus(-(2.0 * (-10 / 5 - -12 / 2) - 0.5))),
        (PlackettLuceLoss(beta=0.1), softplus(-0.1 * MARGIN)),
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
        (IPOLoss(tau=0.25), [0.5, -1.0]),  # tau times the log-ratio
        (IPOLoss(tau=0.25, length_normalized=True), [0.25 * 2 / 5, 0.25 * -4 / 2]),
        (HingeLoss(beta=0.1), [0.2, -0.4]),
        (SimPOLoss(beta=2.0), [2.0 * -10 / 5, 2.0 * -12 / 2]),
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
    reference = logps([[-4.0, -4.0, -4.0], [-4.0, -4.0, 0.0]])
    a, b, c = math.exp(0.5), math.exp(-0.5), math.exp(0.0)
    expected = [-math.log(a / (a + b + c)) - math.log(b / (b + c)), -math.log(a / (a + b))]
    loss = PlackettLuceLoss(beta=0.5)
    assert loss(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)
    assert loss.rewards(policy, reference).tolist() == [[0.5, -0.5, 0.0], [0.5, -0.5, 0.0]]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(), math.log(2)),
        (DPOLoss(label_smoothing=0.3), math.log(2)),
        (RobustDPOLoss(label_smoothing=0.3), math.log(2)),
        (PlackettLuceLoss(), math.log(2)),
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


def test_a_ranking_of_three_starts_at_log_six():
    policy = logps([[-3.0, -5.0, -4.0]])
    assert PlackettLuceLoss()(policy, policy).item() == pytest.approx(math.log(6))  # one of 3! orders


@pytest.mark.parametrize(
    "loss",
    [DPOLoss(beta=0.3, label_smoothing=0.0), RobustDPOLoss(beta=0.3, label_smoothing=0.0), PlackettLuceLoss(beta=0.3)],
    ids=str,
)
def test_identities_with_dpo(loss):
    torch.manual_seed(0)
    policy, reference = (logps(-50 * torch.rand(20, 2, dtype=torch.float64)) for _ in range(2))
    torch.testing.assert_close(loss(policy, reference), DPOLoss(beta=0.3)(policy, reference))


@every_loss
def test_a_shift_of_both_responses_of_a_prompt_changes_nothing(loss):
    torch.manual_seed(0)
    policy, reference = (logps(-50 * torch.rand(20, 2, dtype=torch.float64)) for _ in range(2))
    shifted = policy._replace(total=policy.total + 10 * torch.randn(20, 1, dtype=torch.float64))
    torch.testing.assert_close(loss(shifted, reference), loss(policy, reference))


@every_loss
def test_gradients_equal_finite_differences(loss):
    torch.manual_seed(0)
    total = (-50 * torch.rand(6, 2, dtype=torch.float64)).requires_grad_()
    length = torch.randint(1, 9, (6, 2))
    reference = logps(-50 * torch.rand(6, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda values: loss(Logps(values, length), reference), total)


@every_loss
def test_descent_raises_chosen_and_lowers_rejected(loss):
    total = torch.tensor(POLICY, requires_grad=True)
    length = torch.tensor(LENGTH)
    (gradient,) = torch.autograd.grad(loss(Logps(total, length), Logps(total.detach() + 1, length)).sum(), total)
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_ipo_pulls_a_margin_beyond_its_target_back():
    total = torch.tensor([[-1.0, -20.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(IPOLoss(tau=0.1)(logps(total), logps([[-10.0, -10.0]])).sum(), total)
    assert gradient.tolist() == [[28.0, -28.0]]  # 2 * (19 - 5), up for chosen: descent lowers it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_loss
def test_sixteen_bit_log_probabilities_are_compared_in_fp32(loss, dtype):
    policy, reference = logps([[-100.0, -130.0]], dtype=dtype), logps([[-99.5, -131.0]], dtype=dtype)
    got = loss(policy, reference)
    assert got.dtype == loss.rewards(policy, reference).dtype == torch.float32
    exact = loss(*(part._replace(total=part.total.double()) for part in (policy, reference)))
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("total", [[[-1e4, 0.0]], [[0.0, -1e4]], [[-1e4, -1e4]]], ids=str)
@every_loss
def test_extreme_log_probabilities_give_finite_losses_and_gradients(loss, total):
    policy = logps(total, dtype=torch.float32)
    policy.total.requires_grad_()
    value = loss(policy, logps([[-1.0, -1.0]], dtype=torch.float32))
    value.sum().backward()
    assert value.isfinite().all()
    assert policy.total.grad.isfinite().all()


@every_loss
def test_an_example_without_a_second_response_has_no_loss_and_no_gradient(loss):
    total = torch.tensor([[-10.0, 0.0], [-10.0, -12.0]], requires_grad=True)
    policy, reference = logps(total, [[5, 0], [5, 2]]), logps([[-7.0, 0.0], [-12.0, -8.0]], [[5, 0], [5, 2]])
    values = loss(policy, reference)
    assert values[0].item() == 0
    values[0].backward()
    assert total.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert values[1].item() == loss(logps(POLICY, LENGTH), logps(REFERENCE, LENGTH)).item() > 0


@pytest.mark.parametrize("loss", LOSSES[:-1], ids=str)
def test_three_responses_are_refused_by_losses_of_pairs_with_a_remedy(loss):
    policy = logps([[-3.0, -5.0, -4.0]])
    message = rf"{type(loss).__name__} compares two.*up to 3 a prompt.*`data.num_responses: 2`, or use PlackettLuceLoss"
    with pytest.raises(UsageError, match=message):
        loss(policy, policy)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DPOLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; for a loss without a reference use SimPOLoss"),
        (DPOLoss, {"beta": math.nan}, r"`beta` must be positive, got nan"),
        (DPOLoss, {"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5; .*swap chosen and"),
        (DPOLoss, {"label_smoothing": -0.1}, r"`label_smoothing` must be in \[0, 0.5\), got -0.1"),
        (RobustDPOLoss, {"beta": -1.0}, r"`beta` must be positive, got -1.0"),
        (RobustDPOLoss, {"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
        (IPOLoss, {"tau": 0.0}, r"`tau` must be positive, got 0.0; 0.1 is usual"),
        (HingeLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; pairs count until"),
        (SimPOLoss, {"beta": -2.0}, r"`beta` must be positive, got -2.0; the paper uses 2.0 to 2.5"),
        (SimPOLoss, {"gamma": -0.1}, r"`gamma` must be zero or more, got -0.1; the paper uses 0.3 to 1.6"),
        (PlackettLuceLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
    ],
)
def test_values_without_meaning_are_refused_at_birth(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"beta": 1e-6}])
def test_the_edges_of_what_is_allowed(arguments):
    assert dataclasses.asdict(SimPOLoss(**arguments)) == {"beta": 2.0, "gamma": 1.0, **arguments}


@every_loss
def test_a_loss_cannot_change(loss):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(loss, dataclasses.fields(loss)[0].name, 1.0)


def test_only_simpo_does_without_a_reference():
    assert [type(loss) for loss in LOSSES if not loss.needs_reference] == [SimPOLoss]
    assert SimPOLoss()(logps(POLICY, LENGTH), None).shape == (1,)


def test_a_loss_of_ones_own_is_a_subclass_with_two_methods():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Exponential(PairwiseLoss):
        beta: float = 0.5

        def rewards(self, policy, reference):
            return implicit_rewards(policy, reference, self.beta)

        def margin_loss(self, margin):
            return (-margin).exp()

    loss = Exponential()
    assert loss.needs_reference
    assert loss(logps(POLICY), logps(REFERENCE)).item() == pytest.approx(math.exp(-0.5 * MARGIN))
    with pytest.raises(UsageError, match="Exponential compares two responses"):
        loss(logps([[-1.0]]), logps([[-1.0]]))
