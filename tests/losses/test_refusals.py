"""What losses refuse, and in which words."""

import dataclasses
import math

import pytest
from all_losses import LOSSES, RANKINGS, logps

from dpo_lightning.errors import UsageError
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

ANY_NUMBER = [*RANKINGS, NLLLoss(), NLLLoss(length_normalized=False)]


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ANY_NUMBER], ids=str)
def test_three_responses_are_refused_by_losses_of_pairs_with_a_remedy(loss):
    policy = logps([[-3.0, -5.0, -4.0]])
    name = "DPOLoss" if isinstance(loss, MixedLoss) else type(loss).__name__
    message = rf"{name} compares two.*up to 3 a prompt.*`data.num_responses: 2`, or use PlackettLuceLoss"
    with pytest.raises(UsageError, match=message):
        loss(policy, policy)


@pytest.mark.parametrize("loss", ANY_NUMBER, ids=str)
def test_other_losses_take_any_number_of_responses(loss):
    policy = logps([[-3.0, -5.0, -4.0]])
    assert loss(policy, policy).shape == (1,)
    assert loss(
        policy._replace(total=policy.total[:, :1], length=policy.length[:, :1]),
        None if not loss.needs_reference else policy._replace(total=policy.total[:, :1]),
    ).shape == (1,)


SMOOTHING = r"`label_smoothing` must be in \[0, 0.5\), got 0.5; .*swap chosen and"


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DPOLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; for a loss without a reference use SimPOLoss"),
        (DPOLoss, {"beta": math.nan}, r"`beta` must be positive, got nan"),
        (DPOLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (DPOLoss, {"label_smoothing": -0.1}, r"`label_smoothing` must be in \[0, 0.5\), got -0.1"),
        (RobustDPOLoss, {"beta": -1.0}, r"`beta` must be positive, got -1.0"),
        (RobustDPOLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (LengthNormalizedDPOLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; Tülu 3 uses 5"),
        (LengthNormalizedDPOLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (RDPOLoss, {"beta": 0.0}, r"`beta` must be positive"),
        (RDPOLoss, {"alpha": -0.1}, r"`alpha` must be zero or more, got -0.1; at 0 it is DPO"),
        (LDDPOLoss, {"ld_alpha": 1.5}, r"`ld_alpha` must be in \[0, 1\], got 1.5; the paper advises 0.5; 1 is DPO"),
        (LDDPOLoss, {"ld_alpha": -0.5}, r"`ld_alpha` must be in \[0, 1\], got -0.5"),
        (LDDPOLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (IPOLoss, {"tau": 0.0}, r"`tau` must be positive, got 0.0; 0.1 is usual"),
        (HingeLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; pairs count until"),
        (EXOPairLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
        (
            EXOPairLoss,
            {"label_smoothing": 0.0},
            r"must be in \(0, 0.5\), got 0.0; the divergence from a certain label is",
        ),
        (EXOPairLoss, {"label_smoothing": 0.5}, r"must be in \(0, 0.5\), got 0.5"),
        (DiscoPOPLoss, {"tau": 0.0}, r"`tau` must be in \(0, 1\), got 0.0"),
        (DiscoPOPLoss, {"tau": 1.0}, r"`tau` must be in \(0, 1\), got 1.0; beyond 1 it explodes; the paper uses 0.05"),
        (
            FDPOLoss,
            {"divergence": "kl"},
            r"`divergence` must be one of reverse_kl, forward_kl, jensen_shannon, alpha, got",
        ),
        (FDPOLoss, {"alpha": 0.0}, r"`alpha` must be in \(0, 1\), got 0.0; for its ends use reverse_kl or forward_kl"),
        (FDPOLoss, {"alpha": 1.0}, r"`alpha` must be in \(0, 1\), got 1.0"),
        (UnlikelihoodLoss, {"alpha": 0.0}, r"`alpha` must be positive, got 0.0; .*for SFT use NLLLoss"),
        (NCAPairLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; the paper uses 0.01"),
        (BCOPairLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; the paper uses 0.01"),
        (SPPOHardLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; the paper uses 0.001"),
        (APOZeroLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
        (APODownLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
        (
            DPOPositiveLoss,
            {"lambda_": -1.0},
            r"`lambda_` must be zero or more, got -1.0; the paper uses 50; at 0 it is",
        ),
        (AOTLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; the paper uses 0.01"),
        (AOTLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (AOTUnpairedLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (SimPOLoss, {"beta": -2.0}, r"`beta` must be positive, got -2.0; the paper uses 2.0 to 2.5"),
        (SimPOLoss, {"gamma": -0.1}, r"`gamma` must be zero or more, got -0.1; the paper uses 0.3 to 1.6"),
        (ORPOLoss, {"lambda_": 0.0}, r"`lambda_` must be positive, got 0.0; the paper uses 0.1; for SFT use NLLLoss"),
        (CPOLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; the paper uses 0.1"),
        (CPOLoss, {"alpha": -1.0}, r"`alpha` must be zero or more, got -1.0; the paper uses 1"),
        (WPOLoss, {"max_weight": 0.0}, r"`max_weight` must be positive or none, got 0.0; the authors' code has 1"),
        (WPOLoss, {"label_smoothing": 0.5}, SMOOTHING),
        (TDPO1Loss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
        (TDPO2Loss, {"alpha": -0.5}, r"`alpha` must be zero or more, got -0.5; the paper uses 0.5; at 0 it is DPO"),
        (PlackettLuceLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
        (SoftmaxDPOLoss, {"beta": 0.0}, r"`beta` must be positive, got 0.0; 0.1 is usual"),
        (MixedLoss, {"losses": []}, r"`losses` must be at least one part, got 0; as in \[\{loss: DPOLoss\}\]"),
        (
            Weighted,
            {"loss": DPOLoss(), "weight": -1.0},
            r"`weight` must be zero or more, got -1.0; a part with weight 0 is",
        ),
    ],
)
def test_values_without_meaning_are_refused_at_birth(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"beta": 1e-6}])
def test_the_edges_of_what_is_allowed(arguments):
    assert dataclasses.asdict(SimPOLoss(**arguments)) == {"beta": 2.0, "gamma": 1.0, **arguments}
