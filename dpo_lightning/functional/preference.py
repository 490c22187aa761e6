r"""Preference likelihoods: one function a formula.

Rewards and log-ratios are in nats, column 0 the best response. Nothing is reduced: one loss an example, shape
``(B,)``. Where a formula names a paper, equation numbers are those of its arXiv version.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    r"""Reward under which a policy is optimal, up to a constant a prompt.

    .. math:: r(x, y) = \beta \log \frac{\pi(y \mid x)}{\pi_{ref}(y \mid x)}

    Section 4 of DPO (arXiv:2305.18290).

    Args:
        policy_logps: Summed log-probabilities of responses, any shape.
        reference_logps: The same of the reference.
        beta: Strength of the KL constraint.

    Returns:
        Rewards, same shape.
    """
    return beta * (policy_logps - reference_logps)


def bradley_terry_nll(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Negative log-likelihood that the first response beats the second.

    .. math:: -(1 - \epsilon) \log \sigma(m) - \epsilon \log \sigma(-m)

    With :math:`\epsilon = 0` this is Eq. 7 of DPO (arXiv:2305.18290) when ``margin`` comes from implicit rewards;
    with :math:`\epsilon > 0`, conservative DPO (https://ericmitchell.ai/cdpo.pdf).

    Args:
        margin: Reward of the first response minus that of the second, shape ``(B,)``.
        label_smoothing: Probability :math:`\epsilon` that a label is flipped.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_bradley_terry_nll(margin: Tensor, label_smoothing: float) -> Tensor:
    r"""Unbiased estimate of the loss under true labels, from labels flipped with a known probability.

    .. math:: \frac{-(1 - \epsilon) \log \sigma(m) + \epsilon \log \sigma(-m)}{1 - 2 \epsilon}

    Robust DPO (rDPO), arXiv:2403.00409.

    Args:
        margin: Reward of the first response minus that of the second, shape ``(B,)``.
        label_smoothing: Probability :math:`\epsilon < 1/2` that a label is flipped.
    """
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return loss / (1 - 2 * label_smoothing)


def squared_preference_loss(log_ratio: Tensor, tau: float) -> Tensor:
    r"""Squared distance of a log-ratio margin from its target.

    .. math:: \left( h - \frac{1}{2 \tau} \right)^2

    IPO, Eq. 17 of arXiv:2310.12036.

    Args:
        log_ratio: :math:`h`, log-ratio of the first response minus that of the second, shape ``(B,)``.
        tau: Strength of the pull towards the reference.
    """
    return (log_ratio - 1 / (2 * tau)).square()


def hinge_preference_loss(margin: Tensor) -> Tensor:
    r"""Hinge on the reward margin.

    .. math:: \max(0, 1 - m)

    SLiC-HF (arXiv:2305.10425) with rewards normalised by a reference, as in RSO (arXiv:2309.06657).

    Args:
        margin: Reward of the first response minus that of the second, shape ``(B,)``.
    """
    return F.relu(1 - margin)


def exo_pair_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    r"""KL divergence of the model's distribution over a pair from the smoothed label.

    .. math:: \sigma(m) \left[ \log \sigma(m) - \log(1 - \epsilon) \right]
              + \sigma(-m) \left[ \log \sigma(-m) - \log \epsilon \right]

    EXO for preferences, Eq. 16 of arXiv:2402.00856: DPO's divergence is of the label from the model, this one the other
    way round.

    Args:
        margin: Reward of the first response minus that of the second, shape ``(B,)``.
        label_smoothing: Probability :math:`\epsilon > 0` that a label is flipped.
    """
    right = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    return right + (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(label_smoothing))


def discopop_loss(margin: Tensor, tau: float) -> Tensor:
    r"""Logistic loss where the margin is negative, exponential loss where it is positive, blended between.

    .. math:: \left(1 - \sigma(m / \tau)\right) \log(1 + e^{-m}) + \sigma(m / \tau) \, e^{-m}

    Log-ratio modulated loss, DiscoPOP, Eq. 5 of arXiv:2406.08414.

    Args:
        margin: Reward of the first response minus that of the second, shape ``(B,)``.
        tau: Width :math:`0 < \tau < 1` of the blend.
    """
    # One exponential of a sum: at m = -1000 the blend is e^(-1000 / tau), and e^1000 alone is no number.
    exponential = (F.logsigmoid(margin / tau) - margin).exp()
    return (-margin / tau).sigmoid() * F.softplus(-margin) + exponential


def quantile_margins(first: Tensor, second: Tensor, counted: Tensor) -> Tensor:
    r"""Each value of a sample minus the value of the same rank in another.

    .. math:: u_{(i)} - v_{(i)}

    The coupling of optimal transport on the line: AOT, arXiv:2406.05882, draws the first distribution above the second
    at every quantile.

    Args:
        first: Sample :math:`u`, shape ``(B,)``.
        second: Sample :math:`v`, shape ``(B,)``.
        counted: Which examples belong to the samples, bool, shape ``(B,)``.

    Returns:
        Margins at the places of ``first``, 0 where not counted, shape ``(B,)``.
    """
    ranked_first, ranked_second = (
        values.detach().masked_fill(~counted, torch.inf).argsort(stable=True) for values in (first, second)
    )
    partner = torch.empty_like(ranked_second).scatter(0, ranked_first, ranked_second)
    return torch.where(counted, first - second[partner], 0.0)


def plackett_luce_nll(rewards: Tensor, present: Tensor) -> Tensor:
    r"""Negative log-likelihood of a ranking, best first.

    .. math:: -\sum_{k=1}^{K} \left( r_k - \log \sum_{j=k}^{K} e^{r_j} \right)

    Appendix A.3 of DPO (arXiv:2305.18290); at K = 2 it is :func:`bradley_terry_nll`.

    Args:
        rewards: Shape ``(B, K)``, best response first.
        present: Whether a response exists; absent ones stand last, bool, shape ``(B, K)``.
    """
    # The last place in a ranking is certain, so K = 1 has no loss and absent responses bring none.
    num_responses = rewards.shape[-1]
    not_yet_placed = torch.ones(num_responses, num_responses, dtype=torch.bool, device=rewards.device).triu()
    # Written out instead of logcumsumexp, whose fp32 gradient is off by 4e-4 where rewards are in the thousands.
    rivals = (not_yet_placed & present[:, None, :]) | torch.eye(num_responses, dtype=torch.bool, device=rewards.device)
    tails = rewards[:, None, :].masked_fill(~rivals, -torch.inf).logsumexp(-1)
    return torch.where(present, tails - rewards, 0.0).sum(-1)


def best_of_k_nll(rewards: Tensor, present: Tensor) -> Tensor:
    r"""Negative log-likelihood that the first response is the best of all.

    .. math:: -\log \frac{e^{r_1}}{\sum_{k=1}^{K} e^{r_k}}

    Softmax-DPO (S-DPO), arXiv:2406.09215; the first factor of :func:`plackett_luce_nll`.

    Args:
        rewards: Shape ``(B, K)``, best response first.
        present: Whether a response exists, bool, shape ``(B, K)``.
    """
    return rewards.masked_fill(~present, -torch.inf).logsumexp(-1) - rewards[:, 0]
