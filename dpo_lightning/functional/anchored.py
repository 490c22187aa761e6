r"""Losses that hold each response of a pair to an absolute level, not to its rival alone.

Rewards are :math:`r = \beta h` of log-ratios :math:`h` of policy and reference, in nats; ``chosen`` and ``rejected``
have shape ``(B,)``, and so has every loss.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def nca_pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Noise contrast of each response with the reference.

    .. math:: -\log \sigma(r_w) - \tfrac{1}{2} \log \sigma(-r_w) - \tfrac{1}{2} \log \sigma(-r_l)

    NCA for pairs, arXiv:2402.05369.

    Args:
        chosen: Rewards :math:`r_w`.
        rejected: Rewards :math:`r_l`.
    """
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(chosen: Tensor, rejected: Tensor, shift: Tensor) -> Tensor:
    r"""Binary classification of responses by their rewards, around a shift.

    .. math:: -\log \sigma(r_w - \delta) - \log \sigma(-(r_l - \delta))

    BCO, arXiv:2404.04656, on pairs.

    Args:
        chosen: Rewards :math:`r_w`.
        rejected: Rewards :math:`r_l`.
        shift: :math:`\delta`, the mean of rewards so far, shape ``()``.
    """
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    r"""Squared distance of both log-ratios from what a certain win and a certain defeat are worth.

    .. math:: \left( h_w - \frac{1}{2 \beta} \right)^2 + \left( h_l + \frac{1}{2 \beta} \right)^2

    SPPO, Eq. 4.7 of arXiv:2405.00675 with :math:`\eta = 1 / \beta`, where the chosen response always wins.

    Args:
        chosen: Log-ratios :math:`h_w`.
        rejected: Log-ratios :math:`h_l`.
        beta: Strength of the pull towards the reference.
    """
    return (chosen - 1 / (2 * beta)).square() + (rejected + 1 / (2 * beta)).square()


def apo_zero_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Chosen responses up, rejected ones down, each from the reference.

    .. math:: 1 - \sigma(r_w) + \sigma(r_l)

    APO-zero, Eq. 7 of arXiv:2408.06266.

    Args:
        chosen: Rewards :math:`r_w`.
        rejected: Rewards :math:`r_l`.
    """
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Chosen responses down, rejected ones further down.

    .. math:: \sigma(r_w) + 1 - \sigma(r_w - r_l)

    APO-down, Eq. 8 of arXiv:2408.06266.

    Args:
        chosen: Rewards :math:`r_w`.
        rejected: Rewards :math:`r_l`.
    """
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def positive_margin(chosen: Tensor, rejected: Tensor, penalty: float) -> Tensor:
    r"""Margin of log-ratios, less where the policy makes a chosen response rarer than the reference does.

    .. math:: h_w - h_l - \lambda \max(0, -h_w)

    DPO-Positive, Eq. 3 of arXiv:2402.13228.

    Args:
        chosen: Log-ratios :math:`h_w`, or rewards, which scale all of it.
        rejected: The same of the other response.
        penalty: :math:`\lambda`.
    """
    return chosen - rejected - penalty * F.relu(-chosen)
