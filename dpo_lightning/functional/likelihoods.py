r"""What losses make of token log-probabilities before they compare responses.

``owner`` says to which response a token belongs, ``example * K + response``, ascending, shape ``(N,)``; ``length`` is
the number of tokens of each response, shape ``(B, K)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_lightning.functional.logps import sum_by_owner


def mean_logp(total: Tensor, length: Tensor) -> Tensor:
    r"""Mean log-probability of a token, :math:`\frac{1}{|y|} \log \pi(y \mid x)`; 0 where there is none."""
    return total / length.clamp(min=1)


def log_odds(logp: Tensor) -> Tensor:
    r"""Log-odds of an event with a given log-probability.

    .. math:: \log \frac{p}{1 - p} = \log p - \log(1 - e^{\log p})

    Eq. 4 of ORPO (arXiv:2403.07691). Probabilities closer to 1 than their dtype can tell count as its closest.

    Args:
        logp: Log-probabilities, any shape.
    """
    bounded = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return bounded - (-torch.expm1(bounded)).log()


def unlikelihood_nll(chosen: Tensor, rejected: Tensor, alpha: float) -> Tensor:
    r"""Negative log-likelihood of one response, less a share of that of another.

    .. math:: -\log \pi(y_w \mid x) + \alpha \log \pi(y_l \mid x)

    The baseline Unlikelihood of DPO (arXiv:2305.18290, section 6). It has the aim of unlikelihood training (Welleck et
    al. 2020, arXiv:1908.04319), whose :math:`-\log(1 - p)` a token comes to rest at :math:`p = 0`; this falls without
    bound as the second response becomes unlikely.

    Args:
        chosen: Log-probability of the response to raise, any shape.
        rejected: That of the response to lower, same shape.
        alpha: Weight of the response to lower.
    """
    return -chosen + alpha * rejected


def desensitized_logps(token: Tensor, owner: Tensor, length: Tensor, alpha: float) -> Tensor:
    r"""Log-probabilities of responses in which tokens beyond the shortest response's length count less.

    .. math:: \sum_{t \le l_p} \log \pi(y_t \mid x, y_{<t}) + \alpha \sum_{t > l_p} \log \pi(y_t \mid x, y_{<t}),
              \quad l_p = \min(|y_w|, |y_l|)

    LD-DPO, arXiv:2409.06411; at :math:`\alpha = 1` the plain sum.

    Args:
        token: Token log-probabilities, shape ``(N,)``.
        owner: Shape ``(N,)``.
        length: Shape ``(B, K)``, 0 where a response is absent; absent ones shorten no other.
        alpha: What a token beyond counts, in [0, 1].

    Returns:
        Shape ``(B, K)``.
    """
    beginning = length.flatten().cumsum(0) - length.flatten()
    place = torch.arange(len(token), device=token.device) - beginning[owner]
    public = length.masked_fill(length == 0, len(token)).amin(1)
    counted = torch.where(place < public[owner // length.shape[1]], token, alpha * token)
    return sum_by_owner(counted, owner, length.shape)


def alignment_weights(token: Tensor, collision: Tensor, owner: Tensor, length: Tensor) -> Tensor:
    r"""How much like the policy's own samples the responses of an example are, all of them together.

    .. math:: \prod_k \exp \left( \frac{1}{|y_k|} \sum_t
              \left[ \log \pi(y_t \mid x, y_{<t}) - \log \sum_v \pi(v \mid x, y_{<t})^2 \right] \right)

    Weights of WPO with sampled alignment, arXiv:2406.11827: about 1 where responses were sampled from the
    policy, close to 0 where it would not write them.

    Args:
        token: Token log-probabilities, shape ``(N,)``.
        collision: :math:`\log \sum_v \pi(v)^2` at the position of each token, shape ``(N,)``.
        owner: Shape ``(N,)``.
        length: Shape ``(B, K)``.

    Returns:
        Shape ``(B,)``.
    """
    return mean_logp(sum_by_owner(token - collision, owner, length.shape), length).sum(1).exp()
