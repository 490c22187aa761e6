"""One of every loss, log-probabilities for them, and the arithmetic of expectations: `math` alone."""

import math

import pytest
import torch

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
    MixedLoss,
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
    Weighted,
    WPOLoss,
)

# One pair: log-ratios 2 and -4 nats, responses of 5 and 2 tokens.
POLICY, REFERENCE, LENGTH = [[-10.0, -12.0]], [[-12.0, -8.0]], [[5, 2]]
MARGIN = 6.0

MPO = MixedLoss(
    losses=[
        Weighted(loss=DPOLoss(beta=0.1), weight=0.8),
        Weighted(loss=BCOPairLoss(beta=0.1), weight=0.2),
        Weighted(loss=NLLLoss(), weight=1.0),
    ]
)
# Losses in which an example without a second response still counts by the likelihood of its one.
SUPERVISED = [NLLLoss(), NLLLoss(length_normalized=False), ORPOLoss(), CPOLoss(), MPO, UnlikelihoodLoss()]
RANKINGS = [PlackettLuceLoss(beta=0.1), SoftmaxDPOLoss(beta=0.1)]
PAIRS = [
    DPOLoss(beta=0.1),
    DPOLoss(beta=0.3, label_smoothing=0.2),
    RobustDPOLoss(beta=0.2, label_smoothing=0.1),
    LengthNormalizedDPOLoss(),
    RDPOLoss(beta=0.1, alpha=0.02),
    LDDPOLoss(beta=0.1, ld_alpha=0.3),
    IPOLoss(tau=0.1),
    IPOLoss(tau=0.2, length_normalized=True),
    HingeLoss(beta=0.1),
    EXOPairLoss(),
    DiscoPOPLoss(),
    FDPOLoss(divergence="reverse_kl"),
    FDPOLoss(divergence="forward_kl"),
    FDPOLoss(divergence="jensen_shannon"),
    FDPOLoss(divergence="alpha", alpha=0.5),
    NCAPairLoss(),
    BCOPairLoss(),
    SPPOHardLoss(),
    APOZeroLoss(),
    APODownLoss(),
    DPOPositiveLoss(),
    AOTLoss(),
    AOTUnpairedLoss(label_smoothing=0.1),
    SimPOLoss(beta=2.0, gamma=0.5),
    WPOLoss(beta=0.1, max_weight=1.0),
    TDPO1Loss(),
    TDPO2Loss(),
]
LOSSES = PAIRS + RANKINGS + SUPERVISED
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def logps(total, length=None, dtype=torch.float64):
    """Log-probabilities with all that a loss may ask for: later tokens weigh more, and all carry gradients of total."""
    total = torch.as_tensor(total, dtype=dtype)
    length = torch.full(total.shape, 4) if length is None else torch.tensor(length)
    owner = torch.repeat_interleave(length.flatten())
    place = torch.cat([torch.arange(1, count + 1) for count in length.flatten().tolist()])
    count = length.flatten()[owner]
    token = total.flatten()[owner] * (2 * place / (count * (count + 1))).to(dtype)
    kl = (0.1 * torch.cos(token.detach()) + 0.2).to(dtype)
    return Logps(total, length, token, owner, collision=(-1 - 0.5 * kl).to(dtype), kl=kl)


def cast(values, dtype):
    """The same numbers in another dtype."""
    return Logps(*(part.to(dtype) if part.is_floating_point() else part for part in values))


def random_pairs(count=20, length=None):
    """Policy and reference log-probabilities of random pairs, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    totals = -50 * torch.rand(2, count, 2, dtype=torch.float64, generator=generator)
    return logps(totals[0], length), logps(totals[1], length)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def softplus(value):
    """Minus the log of the logistic function at minus the value."""
    return math.log1p(math.exp(value))
