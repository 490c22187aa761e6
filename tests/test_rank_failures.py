"""Ranks with divided weights that are stopped, killed, or cannot go on lose nothing that was saved."""

import multiprocessing
import os
import random
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import rank_failures
import strategy_runs
import torch
from rank_pool import RankPool

from dpo_lightning.checkpoints import last_checkpoint
from dpo_lightning.errors import UsageError

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")

KILLS, EVERY, STEPS, SLOW = 8, 2, 40, 1.0


def names(folder):
    return sorted(path.name for path in (folder / "ckpts").iterdir())


def uninterrupted(pool, model, folder, **kwargs):
    return pool.run(rank_failures.ended, UsageError, model, str(folder / "whole"), "fsdp2", 2, **kwargs)


def test_a_notice_to_one_rank_stops_both_and_the_rest_is_equal_bit_for_bit(tiny_llama, two_ranks, tmp_path):
    whole = uninterrupted(two_ranks, tiny_llama, tmp_path)
    # What rank 1 notices in step 6 both know at the end of step 7.
    assert two_ranks.run(rank_failures.stopped, tiny_llama, str(tmp_path), 6, 1) == [143, 143]
    path = tmp_path / "ckpts/stopped-step=7.ckpt"
    assert path.is_dir()
    rest = two_ranks.run(
        rank_failures.ended, UsageError, tiny_llama, str(tmp_path), "fsdp2", 2, ckpt_path=str(path), seed=1
    )
    for expected, found in zip(whole, rest, strict=True):
        assert strategy_runs.same(found["weights"], expected["weights"])
        assert found["losses"] == expected["losses"][7:]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tiny_llama, two_ranks, tmp_path, strategy):
    found = two_ranks.run(rank_failures.nonfinite, tiny_llama, str(tmp_path), strategy)
    for rank, (words, rows, as_before) in enumerate(found):
        assert "Optimizer step 3 was not taken" in words
        assert as_before
        saved = torch.load(tmp_path / f"nonfinite-step=3-rank={rank}.pt", weights_only=True)
        assert rows == [row for batch in saved["batches"] for piece in batch["pieces"] for row in piece["row"].tolist()]
    assert "The loss of this rank is finite: look also at what the other ranks say." in found[0][0]
    assert "the loss on rank 1 of 2 nan" in found[1][0]
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_of_one_rank_is_said_by_both_and_the_last_checkpoint_stays(tiny_llama, two_ranks, tmp_path, rank):
    said = two_ranks.run(rank_failures.without_room, tiny_llama, str(tmp_path), rank)
    for words in said:
        assert f"The checkpoint {tmp_path}/ckpts/step=3.ckpt could not be written: File too large." in words
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]
    two_ranks.run(strategy_runs.from_step, 2, tiny_llama, str(tmp_path), "fsdp2", 2, **rank_failures.RUN)


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_said_by_both(tiny_llama, two_ranks, tmp_path):
    (tmp_path / "ckpts").touch()
    said = two_ranks.run(rank_failures.ended, (UsageError, OSError), tiny_llama, str(tmp_path), "fsdp2", 2, save=1)
    assert all("File exists" in words for words in said)


def test_rotation_leaves_the_best_and_the_last_and_damage_is_said(tiny_llama, two_ranks, tmp_path):
    assert two_ranks.run(rank_failures.rotated, tiny_llama, str(tmp_path)) == [10, 10]
    assert names(tmp_path) == ["last.ckpt", "step=10.ckpt"]
    assert (tmp_path / "ckpts/last.ckpt").resolve() == last_checkpoint(tmp_path / "ckpts")
    part = tmp_path / "ckpts/step=10.ckpt/__1_0.distcp"
    whole = part.read_bytes()
    for damaged in (whole[:1000], None):
        part.unlink()
        if damaged is not None:
            part.write_bytes(damaged)
        said = two_ranks.run(
            rank_failures.ended, UsageError, tiny_llama, str(tmp_path), "fsdp2", 2, max_epochs=3,
            ckpt_path=str(tmp_path / "ckpts/step=10.ckpt"),
        )  # fmt: skip
        assert all("step=10.ckpt is damaged" in words and "use an earlier one" in words for words in said)
    with pytest.raises(UsageError, match=r"step=10\.ckpt is damaged"):
        strategy_runs.train(tiny_llama, str(tmp_path), "auto", 1, ckpt_path=str(tmp_path / "ckpts/step=10.ckpt"))
    assert last_checkpoint(tmp_path / "ckpts") is None


def journal(folder):
    path = folder / rank_failures.JOURNAL
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def killed(model, folder, cache, chance, number):
    """Start ranks, kill them at a random moment, and say at which."""
    before, slow = len(journal(folder)), SLOW if number % 2 else 0.0
    event, count = ("writes", chance.randint(1, 3)) if slow else ("step", chance.randint(1, 6))
    pool = RankPool(2, cache, "forkserver")
    try:
        pool.send(rank_failures.goes_on, model, str(folder), slow)
        deadline = time.monotonic() + 120
        while [word for word, _ in journal(folder)[before:]].count(event) < count:
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in pool.processes)
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 1.5 * SLOW if slow else 0.2))
    finally:
        pool.close()
    new = journal(folder)[before:]
    return int(new[0][1]), new[-1], names(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_kills_of_all_ranks_at_random_moments_cost_only_the_steps_since_the_last_checkpoint(
    tiny_llama, token_cache, tmp_path
):
    folder, chance, table = tmp_path / "run", random.Random(0), []
    reached = 0
    for number in range(KILLS):
        began, last, there = killed(tiny_llama, folder, token_cache, chance, number)
        table.append((number + 1, began, reached, " ".join(last), there))
        assert began >= reached - 2 * EVERY
        reached = max(int(step) for _, step in journal(folder))
    pool = RankPool(2, token_cache, "forkserver")
    rest = pool.run(rank_failures.goes_on, tiny_llama, str(folder))
    whole = pool.run(rank_failures.goes_on, tiny_llama, str(tmp_path / "whole"))
    pool.close()
    print("\n", *(f"{line}\n" for line in table))
    assert any(".last.ckpt.unfinished" in line[-1] and "last.ckpt" in line[-1] for line in table)
    assert any("last.ckpt" not in line[-1] for line in table)  # between the names of two
    for expected, found in zip(whole, rest, strict=True):
        assert found["steps"] == expected["steps"] == STEPS
        assert strategy_runs.same(found["weights"], expected["weights"])
    assert names(folder) == ["last.ckpt"]


@pytest.fixture
def forks(monkeypatch):
    """Ranks are forked from a process that has imported everything."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # the server of forks knows no other way to it
    multiprocessing.get_context("forkserver").set_forkserver_preload(["rank_failures"])
    forkserver.ensure_running()
