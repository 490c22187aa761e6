"""Ranks that go on from a checkpoint equal ranks that never stopped, bit for bit, and by another strategy nearly so."""

import itertools

import pytest
import strategy_runs
import torch
from rank_pool import RankPool
from strategy_runs import from_step, train

from dpo_lightning.models.adapters import LoRA

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")

# Two epochs of 4, 4, 4, 4 and 2 examples; the checkpoint lies within the second one where there is a step a batch.
RUN = {"train_rows": 18, "max_epochs": 2, "lr": 1e-2, "gradient_clip_val": 1.0, "log_every_n_steps": 2, "save": 3}
SCHEDULE, NOISE = {"module": {"schedule": "linear"}}, {"module": {"spec": {"dropout": True}, "schedule": "linear"}}
RUNS = {
    "Cached, accumulated, with dropout": {"reference": "Cached", "accumulate_grad_batches": 2, **NOISE},
    "Synced, with workers": {"reference": "Synced", "data": {"num_workers": 2}, **SCHEDULE},
    "mixture, dropout in adapters": {
        "reference": "AdaptersOff", "train_rows": strategy_runs.mixture(),
        "module": {"lora": LoRA(rank=2, dropout=0.3)},
    },
    "FrozenCopy, in bfloat16": {"precision": "bf16-mixed", **NOISE},
    "in pieces, accumulated": {"accumulate_grad_batches": 2, "data": {"micro_batch_tokens": 45}, **NOISE},
}  # fmt: skip
BY_DEFAULT = {("fsdp2", "Cached, accumulated, with dropout"), ("fsdp2", "Synced, with workers")}


def marked(strategy, name):
    return pytest.param(strategy, name, marks=() if (strategy, name) in BY_DEFAULT else pytest.mark.slow)


@pytest.mark.parametrize(("strategy", "name"), itertools.starmap(marked, itertools.product(("ddp", "fsdp2"), RUNS)))
def test_resumed_ranks_equal_uninterrupted_ones_bit_for_bit(noisy_llama, two_ranks, tmp_path, strategy, name):
    settings = RUN | RUNS[name]
    step = 3 if "accumulate_grad_batches" in settings else 6
    place = (noisy_llama, str(tmp_path), strategy, 2)
    whole = two_ranks.run(train, *place, **settings)
    resumed = two_ranks.run(from_step, step, *place, **settings | {"save": 0})
    for expected, found in zip(whole, resumed, strict=True):
        assert strategy_runs.same(found["weights"], expected["weights"])
        assert found["steps"] == expected["steps"]
        left = len(found["losses"])
        assert 0 < left < len(expected["losses"])
        assert found["losses"] == expected["losses"][-left:]
        assert found["norms"] == expected["norms"][-left:]
        assert found["rows"] == expected["rows"][-len(found["rows"]) :]
        assert found["logged"] == expected["logged"]
        assert found["reference"][1] == expected["reference"][1]


STRATEGIES = {"one": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
# Momentum is state of the optimizer; unlike AdamW's, these steps do not amplify the rounding of small gradients.
ACROSS = {
    "train_rows": 18, "max_epochs": 2, "gradient_clip_val": 1.0,
    "module": {"optimizer": strategy_runs.with_momentum, "schedule": "linear"},
}  # fmt: skip


def runs_of(pools, name):
    """A function that has a strategy run something, and gives what the first rank found."""
    strategy, devices = STRATEGIES[name] if isinstance(name, str) else name

    def run(function, *args, model, folder, **kwargs):
        place = (*args, model, str(folder), strategy, devices)
        return function(*place, **kwargs) if devices == 1 else pools[devices].run(function, *place, **kwargs)[0]

    return run


@pytest.fixture(scope="module")
def left(tiny_llama, two_ranks, tmp_path_factory):
    """A function that gives a folder of checkpoints by a strategy, and what its run ended with."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            run = runs_of({2: two_ranks}, name)
            found[name] = folder, run(train, model=tiny_llama, folder=folder, save=3, **ACROSS)
        return found[name]

    return of


def across(*names, slow=True):
    return pytest.param(*names, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        across("one", "fsdp2", slow=False),
        across("fsdp2", "one", slow=False),
        across("fsdp2", "ddp"),
        across("ddp", "fsdp2"),
        across("one", "ddp"),
        across("ddp", "one"),
    ],
)
def test_checkpoints_are_resumed_by_other_strategies(tiny_llama, two_ranks, left, tmp_path, before, behind):
    folder, whole = left(before)
    resumed = runs_of({2: two_ranks}, behind)(from_step, 6, model=tiny_llama, folder=tmp_path, ckpts=folder, **ACROSS)
    assert_goes_on(resumed, whole)


def assert_goes_on(resumed, whole):
    assert strategy_runs.largest_difference(resumed["weights"], whole["weights"]) <= 1e-5
    assert resumed["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
    assert resumed["logged"] == pytest.approx(whole["logged"], rel=1e-5, abs=1e-5)
    assert resumed["reference"] == whole["reference"]


@pytest.fixture(scope="module")
def four_ranks(token_cache):
    """Four processes."""
    pool = RankPool(4, token_cache)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_and_four_resume_each_other(tiny_llama, two_ranks, four_ranks, left, tmp_path, strategy):
    pools = {2: two_ranks, 4: four_ranks}
    folder, whole = left("fsdp2")
    four = runs_of(pools, (strategy, 4))
    assert_goes_on(four(from_step, 6, model=tiny_llama, folder=tmp_path / "there", ckpts=folder, **ACROSS), whole)
    again = four(train, model=tiny_llama, folder=tmp_path, save=3, **ACROSS)
    for name in ("fsdp2", "one"):
        resumed = runs_of(pools, name)(from_step, 6, model=tiny_llama, folder=tmp_path, **ACROSS)
        assert_goes_on(resumed, again)
