"""A loss of a user's own, in a file of their own."""

import dataclasses
import math
import sys

import pytest
from all_losses import POLICY, REFERENCE, logps
from jsonargparse import ArgumentError, ArgumentParser

from dpo_lightning.errors import UsageError
from dpo_lightning.losses import PairwiseLoss, PreferenceLoss, implicit_rewards


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
    assert loss.num_sums == 0
    assert loss(logps(POLICY), logps(REFERENCE)).item() == pytest.approx(math.exp(-0.5 * 6.0))
    with pytest.raises(UsageError, match="Exponential compares two responses"):
        loss(logps([[-1.0]]), logps([[-1.0]]))


POSTPONED = """
from __future__ import annotations

from dataclasses import dataclass

import dpo_lightning.losses as losses


@dataclass(frozen=True, kw_only=True)
class Mine(losses.{base}):
    rates: list[float] | None = None

    def rewards(self, policy, reference):
        return policy.total

    def margin_loss(self, margin):
        return margin

    def reward_loss(self, chosen, rejected):
        return chosen
"""


@pytest.mark.parametrize(
    "base", ["PairwiseLoss", "DPOLoss", "FDPOLoss", "SimPOLoss", "APOZeroLoss", "WPOLoss", "AOTLoss"]
)
def test_types_of_a_users_file_are_known_though_it_postpones_annotations(base, tmp_path, monkeypatch):
    # It names nothing that the annotations of our classes name, ClassVar for one.
    (tmp_path / "users_file.py").write_text(POSTPONED.format(base=base))
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=PreferenceLoss)
    try:
        given = {"class_path": "users_file.Mine", "init_args": {"rates": [0.5, 1]}}
        assert parser.instantiate(parser.parse_object({"loss": given})).loss.rates == [0.5, 1.0]
        given["init_args"]["rates"] = ["high"]
        with pytest.raises(ArgumentError, match=r"(?s)rates.*float"):
            parser.parse_object({"loss": given})
    finally:
        sys.modules.pop("users_file", None)
