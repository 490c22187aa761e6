"""Losses: frozen dataclasses that choose a formula and its constants.

A loss takes log-probabilities of policy and reference and returns one number an example; it knows no model and no
reduction. A user's own loss is a subclass of :class:`PreferenceLoss` or :class:`PairwiseLoss` in a file of their
own, named by ``class_path`` in YAML. All losses, with formulas and papers, are listed in docs/losses.md.
"""

from dpo_lightning.losses.anchored import (
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    DPOPositiveLoss,
    NCAPairLoss,
    SPPOHardLoss,
)
from dpo_lightning.losses.base import LogRatioLoss, PairLoss, PairwiseLoss, PreferenceLoss, implicit_rewards
from dpo_lightning.losses.lengths import LDDPOLoss, LengthNormalizedDPOLoss, RDPOLoss
from dpo_lightning.losses.mixed import MixedLoss, Weighted
from dpo_lightning.losses.pairwise import (
    DiscoPOPLoss,
    DPOLoss,
    EXOPairLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    RobustDPOLoss,
)
from dpo_lightning.losses.rankings import PlackettLuceLoss, SoftmaxDPOLoss
from dpo_lightning.losses.reference_free import CPOLoss, NLLLoss, ORPOLoss, SimPOLoss, UnlikelihoodLoss
from dpo_lightning.losses.tokens import TDPO1Loss, TDPO2Loss, WPOLoss
from dpo_lightning.losses.transport import AOTLoss, AOTUnpairedLoss

__all__ = [
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "BCOPairLoss",
    "CPOLoss",
    "DPOLoss",
    "DPOPositiveLoss",
    "DiscoPOPLoss",
    "EXOPairLoss",
    "FDPOLoss",
    "HingeLoss",
    "IPOLoss",
    "LDDPOLoss",
    "LengthNormalizedDPOLoss",
    "LogRatioLoss",
    "MixedLoss",
    "NCAPairLoss",
    "NLLLoss",
    "ORPOLoss",
    "PairLoss",
    "PairwiseLoss",
    "PlackettLuceLoss",
    "PreferenceLoss",
    "RDPOLoss",
    "RobustDPOLoss",
    "SPPOHardLoss",
    "SimPOLoss",
    "SoftmaxDPOLoss",
    "TDPO1Loss",
    "TDPO2Loss",
    "UnlikelihoodLoss",
    "WPOLoss",
    "Weighted",
    "implicit_rewards",
]
