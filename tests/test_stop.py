"""A notice becomes a checkpoint from which a run goes on as if nothing had been; a rank that dies ends the others."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from notices import Notice
from small_runs import Losses, data, module, rows, trainer, weights, write_rows, write_workplace
from torch.utils.data import DataLoader

from dpo_lightning.callbacks import GracefulStop
from dpo_lightning.data.loader import outlive_notices
from dpo_lightning.references import Synced
from dpo_lightning.resuming import find_earlier

TESTS = Path(__file__).parent


def fit(folder, model, *notices, ckpt_path=None, num_workers=0, **kwargs):
    """Exit code, steps, weights, losses and log lines of a fit of three epochs of four steps."""
    made, losses, logger = module(model, Synced(interval=2)), Losses(), CSVLogger(folder, name="log")
    callbacks = [GracefulStop(), losses, *notices, ModelCheckpoint(folder / "saved", monitor="val/loss")]
    torch.manual_seed(0)
    options = {"max_epochs": 3, "enable_checkpointing": True, **kwargs, "logger": logger}
    run, source, code = trainer(folder, **options, callbacks=callbacks), data(model, num_workers=num_workers), None
    try:
        run.fit(made, source, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    except SystemExit as stopped:
        code = stopped.code
    lines = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    logged = [(line["step"], line["train/loss"], line.get("val/loss", "")) for line in lines]
    return code, run.global_step, weights(made), losses.values, logged


def stops(folder):
    return sorted(path.name for path in Path(folder).rglob("stopped-*"))


@pytest.mark.parametrize(
    ("noticed", "stopped", "options"),
    [
        (2, 2, {}),
        (2, 3, {"val_check_interval": 2}),  # validation follows step 2
        (4, 5, {"max_steps": 11}),  # an epoch ends with step 4
        (3, 3, {"accumulate_grad_batches": 2}),
        pytest.param(6, 6, {"num_workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(noticed, stopped, options, tiny_llama, tmp_path):
    whole = fit(tmp_path / "whole", tiny_llama, **options)
    first = fit(tmp_path, tiny_llama, Notice(noticed), **options)
    assert first[:2] == (143, stopped)
    assert stops(tmp_path) == [f"stopped-step={stopped}.ckpt"]
    rest = fit(tmp_path, tiny_llama, ckpt_path=tmp_path / f"saved/stopped-step={stopped}.ckpt", **options)
    assert rest[:2] == (None, whole[1])
    assert torch.equal(rest[2], whole[2])
    assert first[3] + rest[3] == whole[3]
    assert first[4] + rest[4] == whole[4]
    assert stops(tmp_path) == []


def test_a_notice_in_the_middle_of_a_window_waits_for_its_end(tiny_llama, tmp_path):
    class MidWindow(Notice):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    code, step, _, losses, _ = fit(tmp_path, tiny_llama, MidWindow(1), accumulate_grad_batches=3)
    assert (code, step, len(losses)) == (143, 1, 3)


def test_the_last_step_ends_as_it_would(tiny_llama, tmp_path):
    assert fit(tmp_path, tiny_llama, Notice(12))[:2] == (None, 12)
    assert stops(tmp_path) == []


def test_stopped_again_only_the_newest_checkpoint_stays(tiny_llama, tmp_path):
    fit(tmp_path, tiny_llama, Notice(2))
    first = tmp_path / "saved/stopped-step=2.ckpt"
    assert fit(tmp_path, tiny_llama, Notice(6, "SIGUSR1"), ckpt_path=first)[:2] == (138, 6)
    assert stops(tmp_path) == ["stopped-step=6.ckpt"]


def test_a_run_that_keeps_no_checkpoints_is_found_where_it_was_stopped(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*notices, path=None):
        options = {
            "logger": CSVLogger(tmp_path, name="log", version=""),
            "enable_checkpointing": False,
            "max_epochs": 1,
        }
        found = trainer(tmp_path, **options, callbacks=[GracefulStop(), *notices])
        with contextlib.suppress(SystemExit):
            found.fit(module(tiny_llama), data(tiny_llama), ckpt_path=path, weights_only=True if path else None)
        return found

    stopped = run(Notice(2))
    earlier = find_earlier(stopped)
    assert earlier.path == tmp_path / "log/checkpoints/stopped-step=2.ckpt"
    assert stops(tmp_path) == [earlier.path.name]
    assert run(path=earlier.path).global_step == 4
    assert stops(tmp_path) == []
    assert find_earlier(stopped) is None
    stopped.save_checkpoint(tmp_path / "log/checkpoints/of_another.ckpt")
    assert find_earlier(stopped) is None


def test_signals_mean_afterwards_what_they_meant_before(tiny_llama, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    fit(tmp_path, tiny_llama, Notice(1))
    fit(tmp_path, tiny_llama, max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_lightning_handles_no_signals_meanwhile(tiny_llama, tmp_path):
    seen = []

    class Look(Notice):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(signal.getsignal(signal.SIGTERM).__self__)

    stop = GracefulStop()
    run = trainer(tmp_path, max_steps=1, callbacks=[stop, Look(1)])
    run.fit(module(tiny_llama), data(tiny_llama))
    assert seen == [stop]
    assert "register_signal_handlers" not in vars(run._signal_connector)
    assert "_broadcast_sigterm_tensor" not in vars(run.fit_loop.epoch_loop)


def test_workers_outlive_notices_but_not_their_parents_word():
    loader = DataLoader(range(16), num_workers=1, batch_size=None, worker_init_fn=outlive_notices)
    found = iter(loader)
    first, worker = next(found), found._workers[0]
    for number in ("TERM", "USR1"):
        subprocess.run(["sh", "-c", f"kill -{number} {worker.pid}"], check=True)
    assert [int(item) for item in (first, *found)] == list(range(16))
    found = iter(loader)
    next(found)
    worker = found._workers[0]
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.fixture
def workplace(tmp_path, tiny_llama):
    """A folder with config.yaml for two ranks and eight steps."""
    write_workplace(tmp_path, tiny_llama)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["data"]["init_args"].update(train=str(tmp_path / "pairs.jsonl"), val_fraction=0.0, num_workers=1)
    config["trainer"].update(
        devices=2,
        strategy="ddp",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "saved")}}],
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    write_rows(tmp_path / "pairs.jsonl", rows(32))
    return tmp_path


LIGHTNING = (sys.executable, "-m", "dpo_lightning")
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "dpo_lightning")
NEEDS_GLOO = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs a PyTorch with gloo")


def command_line(folder, callback, *arguments, launcher=LIGHTNING, **init_args):
    """The command with a callback of notices.py, in a group of processes of its own."""
    added = json.dumps({"class_path": f"notices.{callback}", "init_args": init_args})
    paths = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        [*launcher, "fit", "--config", "config.yaml", "--trainer.callbacks+", added, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
@NEEDS_GLOO
def test_one_rank_of_two_noticed_stops_both(workplace):
    ended = command_line(workplace, "Notice", step=3, name="SIGUSR1", rank=1)
    path = workplace / "saved/stopped-step=4.ckpt"  # what rank 1 noticed in step 3 both know at the end of step 4
    assert ended.returncode == 138, ended.stderr
    assert f"SIGUSR1: stopped behind step 4, exit code 138. Saved {path}; to go on, " in ended.stderr + ended.stdout
    assert path.is_file()
    assert "Traceback" not in ended.stderr


@NEEDS_GLOO
@pytest.mark.slow
def test_two_ranks_that_were_stopped_as_a_group_go_on_bit_for_bit(workplace):
    for name, arguments in (("whole", []), ("rest", ["--ckpt_path", "saved/stopped-step=6.ckpt"])):
        if name == "rest":
            ended = command_line(workplace, "Notice", step=5, group=True)
            assert ended.returncode == 143, ended.stderr
        ended = command_line(workplace, "Result", *arguments, path=f"{name}.pt")
        assert ended.returncode == 0, ended.stderr
    whole, rest = (torch.load(workplace / f"{name}.pt", weights_only=True) for name in ("whole", "rest"))
    assert whole["step"] == rest["step"] == 8
    assert all(torch.equal(weight, rest["weights"][name]) for name, weight in whole["weights"].items())
    assert stops(workplace) == []


@NEEDS_GLOO
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", [LIGHTNING, TORCHRUN], ids=["lightning", "torchrun"])
def test_a_rank_that_dies_ends_the_others_with_the_reason(launcher, rank, workplace):
    started = time.monotonic()
    ended = command_line(workplace, "Notice", launcher=launcher, step=3, name="SIGKILL", rank=rank)
    assert time.monotonic() - started < 60
    assert ended.returncode != 0
    said = ended.stdout + ended.stderr
    if launcher is TORCHRUN:
        assert "-9" in said
        assert "SIGKILL" in said
    else:
        assert "remote worker" in said or "terminated with code -9" in said
    assert not list(processes_of(workplace))


def processes_of(folder):
    """Processes that still run in a folder, 60 seconds from now at most."""
    for _ in range(60):
        found = [path for path in Path("/proc").glob("[0-9]*/cwd") if _is(path, folder)]
        if not found:
            return
        time.sleep(1)
    yield from found


def _is(link, folder):
    try:
        return link.readlink() == folder
    except OSError:
        return False
