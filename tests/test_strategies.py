"""Two processes on one machine, over gloo: the same global batches give the same run as one process."""

import functools

import pytest
import strategy_runs
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from dpo_lightning.errors import UsageError

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")

LR, STEPS = 0.1, 5
# Batches of 4, 4, 4, 4 and 1 pairs, so that one rank has nothing in the last; gradients are clipped to norm 1, so that
# a step is at most LR long. In fp32 ranks and one process differ by the order of sums alone. In bfloat16, which keeps 8
# bits, both what is multiplied and what comes out of it is rounded: a gradient differs by up to 2 * 2^-8 of its length,
# and the log-probability of a response by 2^-8 nats for each of its some 13 tokens.
RUN = {"train_rows": 17, "gradient_clip_val": 1.0}
EXACT = {"numbers": 1e-5, "weights": 1e-5}
ROUNDED = {"numbers": 13 * 2**-8, "weights": LR * STEPS * 2**-7}


@pytest.fixture(scope="module")
def compared(tiny_llama, two_ranks, tmp_path_factory):
    """A function that compares a fit of one process with that of two ranks, and gives what all three have found."""
    lines = []

    @functools.cache
    def alone(arguments):
        folder = str(tmp_path_factory.mktemp("one"))
        return {"folder": folder, **strategy_runs.train(tiny_llama, folder, "auto", 1, **dict(arguments))}

    def compare(strategy, tolerance=EXACT, on_ranks=None, **arguments):
        arguments = RUN | arguments
        one, folder = alone(tuple(arguments.items())), str(tmp_path_factory.mktemp(strategy))
        two = two_ranks.run(strategy_runs.train, tiny_llama, folder, strategy, 2, **arguments | (on_ranks or {}))
        named = [str(value) for name, value in arguments.items() if name not in RUN]
        lines.append([strategy, *named, *map(str, (on_ranks or {}).values()), *differences(one, two[0])])
        for rank in two:
            assert rank["steps"] == one["steps"]
            # Weights that are gathered in inference mode cannot be trained behind it.
            assert rank["inference_mode"] is (strategy != "fsdp2")
            assert rank["offset"] == pytest.approx(one["offset"], abs=tolerance["numbers"])
            for name in ("losses", "norms", "sums"):
                assert rank[name] == pytest.approx(one[name], rel=tolerance["numbers"], abs=tolerance["numbers"])
            assert strategy_runs.largest_difference(rank["weights"], one["weights"]) <= tolerance["weights"]
            assert numbers(rank) == pytest.approx(numbers(one), rel=tolerance["numbers"], abs=tolerance["numbers"])
        for seen in ("rows", "val_rows"):  # each once, validation rows on ranks that have not equally many
            assert sorted(two[0][seen] + two[1][seen]) == sorted(one[seen]) == sorted(set(one[seen]))
        return one, *two, folder

    yield compare
    print("\n", *("  ".join(f"{word:12}" for word in line) + "\n" for line in lines))


def numbers(found):
    """What was logged, but accuracies, which jump where margins are near zero."""
    return {name: value for name, value in found["logged"].items() if "accuracies" not in name}


def differences(one, two):
    """Largest ones of losses, norms, logged numbers and weights, as words."""
    pairs = [*(zip(one[name], two[name], strict=True) for name in ("losses", "norms"))]
    found = [max(abs(first - second) for first, second in pair) for pair in pairs]
    found.append(strategy_runs.largest_difference(numbers(one), numbers(two)))
    return [f"{value:.1e}" for value in (*found, strategy_runs.largest_difference(one["weights"], two["weights"]))]


def case(*arguments, slow=False):
    return pytest.param(*arguments, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(
    ("strategy", "reference", "precision"),
    [
        case("ddp", "FrozenCopy", "32-true"),
        case("ddp", "AdaptersOff", "32-true", slow=True),
        case("ddp", "Cached", "32-true", slow=True),
        case("ddp", "FrozenCopy", "bf16-mixed", slow=True),
        case("ddp", "AdaptersOff", "bf16-mixed", slow=True),
        case("ddp", "Cached", "bf16-mixed"),
        case("fsdp2", "FrozenCopy", "32-true"),
        case("fsdp2", "AdaptersOff", "32-true"),
        case("fsdp2", "Cached", "32-true"),
        case("fsdp2", "FrozenCopy", "bf16-mixed"),
        case("fsdp2", "AdaptersOff", "bf16-mixed", slow=True),
        case("fsdp2", "Cached", "bf16-mixed", slow=True),
    ],
)
def test_two_ranks_equal_one(compared, strategy, reference, precision):
    tolerance = EXACT if precision == "32-true" else ROUNDED
    one, *two, _ = compared(strategy, tolerance, reference=reference, precision=precision)
    if precision == "32-true":
        for rank in two:
            assert rank["logged"] == pytest.approx(one["logged"], rel=1e-5, abs=1e-5)  # with accuracies
            assert rank["reference"] == one["reference"]
            assert len(set(rank["reference"])) == 1  # as before
    if reference == "FrozenCopy" and strategy == "ddp":  # neither broadcast nor reduced
        assert any(name.startswith("reference_policy.") for name in two[0]["ignored"])


def test_weights_move_further_than_the_tolerances(compared, tiny_llama, tmp_path):
    one = strategy_runs.train(tiny_llama, str(tmp_path), "auto", 1, **RUN)
    start = strategy_runs.train(tiny_llama, str(tmp_path), "auto", 1, **{**RUN, "max_steps": 0})
    assert strategy_runs.largest_difference(one["weights"], start["weights"]) > 5 * ROUNDED["weights"]


IN_PIECES = {"data": {"batch_size": 4, "val_batch_size": 4, "micro_batch_tokens": 45}}


@pytest.mark.parametrize(
    ("strategy", "on_ranks", "arguments"),
    [
        # Windows of 8, 8 and 1 pairs.
        case("fsdp2", IN_PIECES, {"accumulate_grad_batches": 2}),
        case("ddp", IN_PIECES, {"accumulate_grad_batches": 2}),
        case("fsdp2", IN_PIECES, {"accumulate_grad_batches": 2, "objective": "sft"}),
        case("ddp", IN_PIECES, {"accumulate_grad_batches": 2, "objective": "sft"}, slow=True),
        # Windows of 8, 8 and 1 rankings, their offset found at the end over training rows of two ranks.
        case("fsdp2", IN_PIECES, {"accumulate_grad_batches": 2, "objective": "reward"}),
        case("ddp", IN_PIECES, {"accumulate_grad_batches": 2, "objective": "reward"}, slow=True),
        case("ddp", {}, {"objective": "reward", "limit_val_batches": 0}),
        case("fsdp2", {}, {"objective": "reward", "limit_val_batches": 0}, slow=True),
        case("fsdp2", {}, {"objective": "reward", "reference": "AdaptersOff"}, slow=True),
        case("fsdp2", {}, {"objective": "bco"}, slow=True),
        case("ddp", {}, {"objective": "bco"}),
        case("fsdp2", {}, {"objective": "tdpo"}),
        case("ddp", {}, {"objective": "tdpo"}, slow=True),
        case("fsdp2", {}, {"reference": "Synced"}),
        case("ddp", {}, {"reference": "Synced"}, slow=True),
        case("ddp", {}, {"objective": "sft", "reference": "AdaptersOff"}, slow=True),
        case("fsdp2", {}, {"objective": "sft", "reference": "AdaptersOff"}, slow=True),
    ],
)
def test_so_it_is_for_other_losses_and_steps(compared, strategy, on_ranks, arguments):
    one, *two, _ = compared(strategy, on_ranks=on_ranks, **arguments)
    assert set(one["pieces"]) == {1}
    assert all((max(rank["pieces"]) > 1) == bool(on_ranks) for rank in two)
    assert (one["offset"] != 0) == (arguments.get("objective") == "reward")
    if strategy == "ddp":
        assert [rank["reductions"] for rank in two] == [one["steps"]] * 2


def test_a_reward_model_in_mixed_precision(compared):
    compared("fsdp2", ROUNDED, objective="reward", precision="bf16-mixed")


def test_ranks_score_their_shares(tiny_llama, two_ranks, tmp_path):
    two_ranks.run(strategy_runs.train, tiny_llama, str(tmp_path), "fsdp2", 2, "Cached", max_steps=1)
    assert sorted(strategy_runs.scored(tmp_path)) == [10, 11]


def test_a_stream_is_divided_without_doubles(tiny_llama, two_ranks, tmp_path):
    stream = {"data": {"stream_buffer": 5}, "max_steps": 6, "max_epochs": -1, "limit_val_batches": 0}
    one = strategy_runs.train(tiny_llama, str(tmp_path), "auto", 1, train_rows=24, **stream)
    for strategy in ("ddp", "fsdp2"):
        first, second = two_ranks.run(
            strategy_runs.train, tiny_llama, str(tmp_path), strategy, 2, train_rows=24, **stream
        )
        assert sorted(first["rows"] + second["rows"]) == sorted(one["rows"]) == list(range(1, 25))
        assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "run"),
    [("ddp", {"precision": "bf16-true"}), ("fsdp2", {"module": {"spec": {"dtype": "bfloat16"}}})],
)
def test_weights_in_16_bits_are_warned_of(tiny_llama, two_ranks, tmp_path, strategy, run):
    run["max_steps"] = 1
    said = two_ranks.run(strategy_runs.warned, tiny_llama, str(tmp_path), strategy, 2, **run)
    assert all("All weights are trained in 16 bits" in words for words in said)


@pytest.mark.parametrize(
    "plugin", [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), HalfPrecision("bf16-true")]
)
def test_precisions_are_refused_where_weights_are_divided(plugin):
    words = f"`trainer.precision: {plugin.precision}` does not go with fsdp2.*; use bf16-mixed"
    with pytest.raises(UsageError, match=words):
        Trainer(accelerator="cpu", devices=1, strategy="fsdp2", plugins=[plugin], logger=False)
