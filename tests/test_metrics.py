"""Metrics are sums and counts: exact over unequal batches and ranks, with ties, rankings and absent responses."""

import math

import pytest
import torch

from dpo_lightning.batch import Logps
from dpo_lightning.metrics import PreferenceMetrics, RewardMetrics, TokenMetrics, pair_accuracy, wilson_interval

NAMES = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]


def observations(count=11, num_responses=3):
    """Losses, rewards, log-probabilities; quarters, so that sums in any order are the same to the last bit."""
    generator = torch.Generator().manual_seed(0)
    loss, rewards, total = (
        torch.randint(-40, 40, shape, generator=generator) / 4
        for shape in ((count,), (count, num_responses), (count, num_responses))
    )
    present = torch.arange(num_responses) < torch.randint(1, num_responses + 1, (count, 1), generator=generator)
    return loss, rewards * present, Logps(total * present, 5 * present.long())


def metric_of(*parts, over=slice(None)):
    metric = PreferenceMetrics()
    loss, rewards, policy = observations()
    for part in parts or (over,):
        metric.update(loss[part], rewards[part], Logps(policy.total[part], policy.length[part]))
    return metric


def means(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_every_metric_by_hand():
    # Three pairs: right, wrong, a tie.
    rewards = torch.tensor([[2.0, -1.0], [0.5, 1.5], [0.25, 0.25]])
    total = torch.tensor([[-3.0, -6.0], [-9.0, -1.0], [-6.0, -5.0]])
    metric = PreferenceMetrics()
    metric.update(torch.tensor([0.5, 1.0, 3.0]), rewards, Logps(total, torch.ones(3, 2, dtype=torch.long)))
    expected = [1.5, 2.75 / 3, 0.75 / 3, 0.5, 2.0 / 3, -6.0, -4.0]
    assert means(metric) == pytest.approx(dict(zip(NAMES, expected, strict=True)))
    assert list(means(metric)) == NAMES


def test_rejected_is_the_mean_of_all_responses_but_the_best():
    rewards = torch.tensor([[4.0, 1.0, 2.0], [1.0, 3.0, 0.0]])
    policy = Logps(torch.tensor([[-2.0, -4.0, -5.0], [-3.0, -7.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    metric = PreferenceMetrics()
    metric.update(torch.zeros(2), rewards, policy)
    got = means(metric)
    assert got["rewards/rejected"] == (1.5 + 3.0) / 2
    assert got["rewards/margins"] == (2.5 - 2.0) / 2
    assert got["logps/rejected"] == (-4.5 - 7.0) / 2
    assert got["rewards/accuracies"] == pytest.approx((2 / 3 + 0.0) / 2)


@pytest.mark.parametrize(
    ("rewards", "present", "expected"),
    [
        ([1.0, 0.0], [1, 1], 1.0),
        ([0.0, 1.0], [1, 1], 0.0),
        ([0.5, 0.5], [1, 1], 0.5),  # neither right nor wrong
        ([2.0, 3.0, 1.0], [1, 1, 1], 2 / 3),  # 0 before 1 is wrong; 0 before 2 and 1 before 2 are right
        ([2.0, 2.0, 1.0], [1, 1, 1], 2.5 / 3),
        ([1.0, 2.0, 3.0], [1, 1, 1], 0.0),
        ([-1.0, -2.0, 0.0], [1, 1, 0], 1.0),  # the absent one's 0 is no reward
    ],
)
def test_accuracy_is_the_share_of_pairs_in_the_right_order(rewards, present, expected):
    accuracy = pair_accuracy(torch.tensor([rewards]), torch.tensor([present], dtype=torch.bool))
    assert accuracy.tolist() == pytest.approx([expected])


def test_an_example_without_a_second_response_counts_for_chosen_alone():
    rewards, length = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[2, 0], [2, 2]])
    metric = PreferenceMetrics()
    metric.update(torch.tensor([0.0, 1.0]), rewards, Logps(torch.tensor([[-4.0, 0.0], [-2.0, -6.0]]), length))
    expected = [0.5, 2.0, 0.0, 1.0, 1.0, -3.0, -6.0]
    assert means(metric) == dict(zip(NAMES, expected, strict=True))


def test_batches_of_unequal_size_give_what_one_batch_gives():
    batches = metric_of(slice(0, 1), slice(1, 8), slice(8, 11))
    assert means(batches) == means(metric_of())
    assert means(batches) != means(metric_of(over=slice(0, 8)))


def test_replicas_over_shares_of_the_data_merge_into_the_whole():
    first, second = metric_of(over=slice(0, 3)), metric_of(over=slice(3, 11))
    first.merge_state(second)  # reduces each state as a synchronisation over ranks does
    assert means(first) == means(metric_of())


def test_reset_forgets():
    metric = metric_of()
    metric.reset()
    metric.update(torch.tensor([2.0]), torch.tensor([[1.0, 0.0]]), Logps(torch.zeros(1, 2), torch.ones(1, 2)))
    assert means(metric)["loss"] == 2.0


def test_metrics_hold_no_graph_and_count_16_bit_values_in_fp32():
    loss = torch.full((257,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    metric = PreferenceMetrics()
    total = loss[:, None].expand(257, 2)
    for _ in range(2):
        metric.update(loss, total, Logps(total, torch.ones(257, 2)))
    assert not metric.sums.requires_grad
    assert metric.sums[0].item() == 514.0  # bf16 has no 257


def test_token_metrics_weigh_tokens_not_batches():
    parts = [
        Logps(torch.tensor([[-6.0], [-1.0]]), torch.tensor([[3], [1]])),
        Logps(torch.tensor([[-9.0]]), torch.tensor([[8]])),
    ]
    metric = TokenMetrics()
    for part in parts:
        metric.update(part)
    got = {name: value.item() for name, value in metric.compute().items()}
    assert got == pytest.approx({"loss": 16 / 12, "perplexity": math.exp(16 / 12)})  # a mean of batch means: 1.4375
    first, second = TokenMetrics(), TokenMetrics()
    first.update(parts[0])
    second.update(parts[1])
    first.merge_state(second)
    assert {name: value.item() for name, value in first.compute().items()} == got


def logit(share):
    return math.log(share / (1 - share))


def test_calibration_by_hand():
    # Confidences .62, .66, .66 in one bin of five, two of them right; .85 in another, wrong; a tie at .5, half right.
    margins = [logit(0.62), logit(0.66), -logit(0.66), -logit(0.85), 0.0]
    metric = RewardMetrics(num_bins=5)
    rewards = torch.tensor([[margin, 0.0] for margin in margins])
    metric.update(torch.zeros(5), rewards, torch.ones(5, 2, dtype=torch.bool))
    found = {name: value.item() for name, value in metric.compute().items()}
    bins = [abs(0.62 + 0.66 + 0.66 - 2), 0.85, 0.0]
    assert found["calibration/error"] == pytest.approx(sum(bins) / 5, abs=1e-6)
    brier = [0.38**2, 0.34**2, 0.66**2, 0.85**2, 0.5**2]
    assert found["calibration/brier"] == pytest.approx(sum(brier) / 5, abs=1e-6)
    assert found["rewards/accuracies"] == pytest.approx((1 + 1 + 0 + 0 + 0.5) / 5)
    assert found["rewards/margins"] == pytest.approx(sum(margins) / 5, abs=1e-6)
    assert found["rewards/mean"] == pytest.approx(sum(margins) / 10, abs=1e-6)


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    metric = RewardMetrics()
    margins = torch.tensor([logit(0.75)] * 3 + [-logit(0.75)])
    metric.update(torch.zeros(4), torch.stack([margins, torch.zeros(4)], 1), torch.ones(4, 2, dtype=torch.bool))
    assert metric.compute()["calibration/error"].item() == pytest.approx(0, abs=1e-6)


def test_reward_metrics_of_parts_are_those_of_the_whole():
    loss, rewards, policy = observations()
    present, whole, parts = policy.length > 0, RewardMetrics(), RewardMetrics()
    whole.update(loss, rewards, present)
    for part in (slice(0, 1), slice(1, 7), slice(7, None), slice(0, 0)):
        parts.update(loss[part], rewards[part], present[part])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value, atol=1e-6, rtol=1e-6)
    assert whole.compute()["rewards/mean"] == rewards[present].mean()
    pairs = sum(count * (count - 1) // 2 for count in present.sum(1).tolist())
    assert whole.counts[-1] == pairs


def test_rewards_that_are_no_numbers_show():
    metric = RewardMetrics()
    metric.update(torch.zeros(1), torch.tensor([[math.nan, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert metric.compute()["calibration/error"].isnan()


@pytest.mark.parametrize(("share", "count", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0)])
def test_wilsons_interval_as_tables_have_it(share, count, low, high):
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-4)
