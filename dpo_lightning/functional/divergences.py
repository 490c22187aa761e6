r"""Rewards under other divergences than the reverse KL: f-DPO, arXiv:2309.16240, Table 1.

A policy that maximises :math:`E[r] - \beta D_f(\pi \| \pi_{ref})` has the reward :math:`\beta f'(u)` at the ratio
:math:`u = \pi / \pi_{ref}`, up to a constant a prompt. Functions here give :math:`f'` of log-ratios
:math:`h = \log u` of any shape, in nats, and drop constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_FROM = 10.0
"""Exponent from which exponentials go on as their tangent: their slope, at most e^10 = 22026, is a number in fp16."""


def reverse_kl_slope(log_ratio: Tensor) -> Tensor:
    r""":math:`f(u) = u \log u, \; f' = h + 1`, here without the 1: DPO."""
    return log_ratio


def forward_kl_slope(log_ratio: Tensor) -> Tensor:
    r""":math:`f(u) = -\log u, \; f' = -e^{-h}`."""
    return -_then_linear(torch.exp, -log_ratio)


def jensen_shannon_slope(log_ratio: Tensor) -> Tensor:
    r""":math:`f(u) = u \log u - (u + 1) \log \frac{u + 1}{2}, \; f' = \log 2 + h - \log(1 + e^h)`."""
    return math.log(2) + F.logsigmoid(log_ratio)


def alpha_slope(log_ratio: Tensor, alpha: float) -> Tensor:
    r""":math:`f' = (1 - e^{-\alpha h}) / \alpha`: the reverse KL as alpha goes to 0, the forward KL at 1.

    .. math:: f(u) = \frac{u^{1 - \alpha} - (1 - \alpha) u - \alpha}{\alpha (\alpha - 1)}
    """
    return -_then_linear(torch.expm1, -alpha * log_ratio) / alpha


def _then_linear(exponential: Callable[[Tensor], Tensor], exponent: Tensor) -> Tensor:
    """An exponential, beyond ``LINEAR_FROM`` its tangent, so that values and gradients stay finite."""
    beyond = F.relu(exponent - LINEAR_FROM)
    return exponential(exponent.clamp(max=LINEAR_FROM)) + math.exp(LINEAR_FROM) * beyond
