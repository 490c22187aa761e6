"""What all losses have in common, and what only some of them need."""

import dataclasses
import inspect
import itertools
import math

import pytest
import torch
from all_losses import (
    LENGTH,
    LOSSES,
    PAIRS,
    POLICY,
    RANKINGS,
    REFERENCE,
    SUPERVISED,
    cast,
    every_loss,
    logps,
    random_pairs,
)

import dpo_lightning.losses
from dpo_lightning.batch import Logps
from dpo_lightning.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    BCOPairLoss,
    CPOLoss,
    DiscoPOPLoss,
    IPOLoss,
    LDDPOLoss,
    MixedLoss,
    NLLLoss,
    ORPOLoss,
    PreferenceLoss,
    SimPOLoss,
    TDPO1Loss,
    TDPO2Loss,
    UnlikelihoodLoss,
    WPOLoss,
)


def test_one_of_every_loss_is_tested():
    offered = {cls for _, cls in inspect.getmembers(dpo_lightning.losses, inspect.isclass)}
    concrete = {cls for cls in offered if issubclass(cls, PreferenceLoss) and not inspect.isabstract(cls)}
    assert {type(loss) for loss in LOSSES} == concrete
    assert all(cls.__name__ in dpo_lightning.losses.__all__ for cls in offered)


@every_loss
def test_gradients_equal_finite_differences(loss):
    length = torch.randint(1, 9, (6, 2), generator=torch.Generator().manual_seed(0)).tolist()
    policy, reference = random_pairs(6, length)
    rejected = policy.owner % 2 == 1
    leaves = {
        "total": policy.total,
        "token": policy.token,
        "chosen_kl": policy.kl[~rejected],
        "rejected_kl": policy.kl[rejected],
    }
    # What a loss detaches is held fixed: WPO's weights come of tokens, TDPO2 draws nothing to a rejected response's KL.
    detached = {WPOLoss: "token", TDPO2Loss: "chosen_kl"}.get(type(loss))
    leaves = {name: leaf.clone().requires_grad_(name != detached) for name, leaf in leaves.items()}

    def function(total, token, chosen_kl, rejected_kl):
        kl = torch.zeros_like(token).masked_scatter(rejected, rejected_kl).masked_scatter(~rejected, chosen_kl)
        return loss(policy._replace(total=total, token=token, kl=kl), reference)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# DiscoPOP's hump lies at no margin, where its gradient points the other way; a likelihood leaves the rejected response.
OTHERWISE = {DiscoPOPLoss: (1, -1), NLLLoss: (-1, 0)}


@every_loss
def test_descent_raises_chosen_and_lowers_rejected(loss):
    total = torch.tensor(POLICY, requires_grad=True)
    reference = logps(total.detach() + 1, LENGTH)
    (gradient,) = torch.autograd.grad(loss(logps(total, LENGTH, torch.float32), reference).sum(), total)
    assert tuple(gradient.sign().flatten().tolist()) == OTHERWISE.get(type(loss), (-1, 1))


def test_apo_down_lowers_both_responses_once_they_are_apart():
    total = torch.tensor([[-3.0, -23.0]], requires_grad=True)
    APODownLoss(beta=0.1)(logps(total), logps([[-3.0, -3.0]])).sum().backward()
    slope = math.exp(-2) / (1 + math.exp(-2)) ** 2  # of the logistic function at a reward margin of 2
    assert total.grad[0].tolist() == pytest.approx([0.1 * (1 / 4 - slope), 0.1 * slope])


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
    exact = loss(cast(policy, torch.float64), cast(reference, torch.float64))
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


@every_loss
def test_fp64_stays_fp64(loss):
    policy, reference = random_pairs(3)
    assert loss(policy, reference).dtype == loss.rewards(policy, reference).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@every_loss
def test_extreme_log_probabilities_give_finite_losses_and_gradients(loss, dtype):
    # Every combination of certain and impossible responses, with log-ratios of 0 and of 10,000 nats either way.
    totals = torch.tensor(list(itertools.product([0.0, -1e4], repeat=4)))
    total = totals[:, :2].to(dtype).requires_grad_()
    policy, reference = logps(total, dtype=dtype), logps(totals[:, 2:], dtype=dtype)
    value = loss(policy, reference)
    value.sum().backward()
    assert value.isfinite().all()
    assert loss.rewards(policy, reference).isfinite().all()
    assert total.grad.isfinite().all()


ALONE = [*PAIRS, *RANKINGS]


@pytest.mark.parametrize("loss", ALONE, ids=str)
def test_an_example_without_a_second_response_has_no_loss_and_no_gradient(loss):
    total = torch.tensor([[-10.0, 0.0], [-10.0, -12.0]], requires_grad=True)
    policy, reference = logps(total, [[5, 0], [5, 2]]), logps([[-7.0, 0.0], [-12.0, -8.0]], [[5, 0], [5, 2]])
    values = loss(policy, reference)
    assert values[0].item() == 0
    values[0].backward()
    assert total.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert values[1].item() == loss(logps(POLICY, LENGTH), logps(REFERENCE, LENGTH)).item() > 0
    assert loss.rewards(policy, reference)[0, 1] == 0


@pytest.mark.parametrize("loss", SUPERVISED, ids=str)
def test_the_likelihood_of_a_response_counts_without_a_second_one(loss):
    total = torch.tensor([[-10.0, 0.0]], requires_grad=True)
    value = loss(logps(total, [[5, 0]]), logps([[-7.0, 0.0]], [[5, 0]]))
    per_token = getattr(loss, "length_normalized", not isinstance(loss, UnlikelihoodLoss))
    assert value.item() == pytest.approx(10 / 5 if per_token else 10.0)
    value.backward()
    assert total.grad.tolist() == [[pytest.approx(-1 / 5 if per_token else -1.0), 0.0]]


@every_loss
def test_a_loss_cannot_change(loss):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(loss, dataclasses.fields(loss)[0].name, 1.0)


@every_loss
def test_losses_can_be_compared_and_are_keys(loss):
    assert {loss: 1}[dataclasses.replace(loss)] == 1


def kinds(attribute):
    return {type(loss) for loss in LOSSES if getattr(loss, attribute) != getattr(PreferenceLoss, attribute)}


def test_what_losses_need():
    assert kinds("needs_reference") == {SimPOLoss, ORPOLoss, CPOLoss, NLLLoss, UnlikelihoodLoss}
    assert kinds("needs_collision") == {WPOLoss}
    assert kinds("needs_kl") == {TDPO1Loss, TDPO2Loss}
    assert kinds("needs_tokens") == {LDDPOLoss}
    assert kinds("couples_batch") == {AOTLoss, AOTUnpairedLoss}
    assert kinds("compares_responses") == {NLLLoss}
    assert kinds("num_sums") == {BCOPairLoss, MixedLoss}


@every_loss
def test_sums_have_their_number_and_no_gradient(loss):
    policy, reference = random_pairs(3)
    policy.total.requires_grad_()
    sums = loss.sums(policy, reference)
    assert sums.shape == (loss.num_sums,)
    assert not sums.requires_grad


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.needs_reference], ids=str)
def test_losses_that_do_without_a_reference_are_given_none(loss):
    assert loss(logps(POLICY), None).shape == (1,)
    assert loss.rewards(logps(POLICY), None).shape == (1, 2)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not (loss.needs_kl or loss.needs_collision)], ids=str)
def test_losses_take_no_more_than_they_need(loss):
    policy, reference = logps(POLICY), logps(REFERENCE)
    plain = [Logps(part.total, part.length) for part in (policy, reference)]
    if isinstance(loss, LDDPOLoss):
        plain = [Logps(*part[:4]) for part in (policy, reference)]
    assert loss(*plain).item() == loss(policy, reference).item()
