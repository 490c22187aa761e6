r"""Preference likelihoods: one function a formula.

Rewards and log-ratios are in nats, column 0 the best response. Nothing is reduced: one loss an example, shape
``(B,)``. Where a formula names a paper, equation numbers are those of its arXiv version.
"""

from __future__ import annotations

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
