"""A run that is killed again and again ends as one that never was, and loses only what it had not saved yet."""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
import small_runs
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lightning.checkpoints import last_checkpoint

KILLS, BY_COMMAND = 20, (3, 9, 15)  # the latter of processes that were started by the command itself
EVERY, STEPS = 2, 80  # steps between checkpoints, and of the run
SLOW = 0.3  # seconds for a checkpoint in every second run
PATHS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])

pytestmark = pytest.mark.slow


class Kill(NamedTuple):
    """A line of the table: what a run was killed at, and what that cost.

    Attributes:
        started: How the process came to be.
        began: Step behind which it began.
        amid: What it was doing.
        reached: Last step that it made.
        saved: Step of the last checkpoint that it had written.
        resumed: Step behind which the next process began.
    """

    started: str
    began: int
    amid: str
    reached: int
    saved: int
    resumed: int | None = None

    @property
    def lost(self):
        return self.reached - self.resumed


def write_run(folder, model):
    """A run of 16 epochs of 10 batches, two a step, with dropout, a reference that follows, and a schedule."""
    folder.mkdir()
    small_runs.write_workplace(folder, model)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"]["policy"]["dropout"] = True
    config["model"]["init_args"]["schedule"] = "linear"
    config["model"]["init_args"]["reference"] = {"class_path": "Synced", "init_args": {"alpha": 0.5, "interval": 3}}
    config["data"]["init_args"].update(train="train.jsonl", val="pairs.jsonl", val_fraction=0.0)
    config["trainer"].update(max_epochs=16, accumulate_grad_batches=2)
    config["trainer"]["enable_progress_bar"] = False
    config["trainer"]["plugins"] = [{"class_path": "kill_me.SlowFiles"}]
    saver = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": EVERY}}
    config["trainer"]["callbacks"] = [{"class_path": "kill_me.Journal"}, saver]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    small_runs.write_rows(folder / "train.jsonl", small_runs.rows(40))
    return folder


COMMAND = ["fit", "--config", "config.yaml", "--resume", "true"]


class Forked:
    """A process with everything imported, that runs the command."""

    def __init__(self, folder, slow=0.0, more=()):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kill_me"])
        with pytest.MonkeyPatch.context() as patch:  # the server of forks knows no other way to it
            patch.setenv("PYTHONPATH", PATHS)
            forkserver.ensure_running()
        self.process = context.Process(target=_run, args=(str(folder), [*COMMAND, *more], slow))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def wait(self):
        self.process.join()
        return self.process.exitcode


def _run(folder, arguments, slow):
    import kill_me

    kill_me.main(folder, arguments, slow)


def by_command(folder, slow):
    environment = {**os.environ, "PYTHONPATH": PATHS, "SLOW": str(slow)}
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dpo_lightning", *COMMAND], cwd=folder, env=environment, stdout=output, stderr=output
        )


def journal(folder):
    path = folder / "journal.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(word, int(step)) for word, step in map(str.split, lines)]


def wait_for(folder, process, num_lines, condition):
    """Until the journal behind some lines fulfils a condition."""
    deadline = time.monotonic() + 120
    while not condition(journal(folder)[num_lines:]):
        assert process.poll() is None, (folder / "output.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def killed(folder, chance, number):
    """Start the run, kill it at a random moment, and say at which."""
    slow = SLOW if number % 2 else 0.0
    before = len(journal(folder))
    process = by_command(folder, slow) if number in BY_COMMAND else Forked(folder, slow)
    # Where writing is slow, some time behind the beginning of a write, and else behind one of some steps.
    event, number_of = ("writes", chance.randint(1, 3)) if slow else ("step", chance.randint(0, 6))
    wait_for(folder, process, before, lambda lines: [word for word, _ in lines].count(event) >= number_of)
    time.sleep(chance.uniform(0, 1.3 * SLOW) if slow else chance.uniform(0, 0.15))
    process.kill()
    process.wait()
    lines = journal(folder)
    new = lines[before:]
    began = [step for word, step in new if word == "begins"]
    word, step = new[-1] if new else ("starts", 0)
    amid = {"begins": "begun", "step": f"behind step {step}", "writes": f"writing {step}", "wrote": f"wrote {step}"}
    reached, saved = (max([step for word, step in lines if word == kind], default=0) for kind in ("step", "wrote"))
    started = "command" if number in BY_COMMAND else "forked"
    return Kill(started, began[0] if began else -1, amid.get(word, word), reached, saved)


def finished(folder, more=()):
    """Run to the end, and the step behind which that began."""
    before = len(journal(folder))
    assert Forked(folder, more=more).wait() == 0, (folder / "output.txt").read_text()[-3000:]
    new = journal(folder)[before:]
    assert new[-1] == ("ends", STEPS)
    return new[0][1]


def outcome(folder):
    """Last checkpoint, and the log of the training loss, of which a step that was made twice may have two lines."""
    logs = folder / "lightning_logs"
    assert [run.name for run in logs.iterdir()] == ["version_0"]
    checkpoint = torch.load(last_checkpoint(logs / "version_0" / "checkpoints"), weights_only=True)
    assert checkpoint["global_step"] == STEPS
    events = EventAccumulator(str(logs / "version_0")).Reload().Scalars("train/loss")
    return (
        checkpoint["state_dict"],
        checkpoint["optimizer_states"],
        sorted({(point.step, point.value) for point in events}),
    )


def same(first, second):
    """Whether two outcomes are, bit for bit: weights, optimizer, log."""
    (weights, optimizer, log), (other_weights, other_optimizer, other_log) = first, second
    assert small_runs.same(weights, other_weights) == small_runs.same(_moments(optimizer), _moments(other_optimizer))
    return small_runs.same(weights, other_weights) and log == other_log


def _moments(states):
    found = {}
    for number, values in states[0]["state"].items():
        found |= {f"{number}.{name}": value for name, value in values.items()}
    return found


@pytest.fixture(scope="module")
def uninterrupted(noisy_llama, tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("whole") / "run", noisy_llama)
    assert finished(folder) == 0
    return outcome(folder)


def test_kills_at_random_moments_cost_only_the_steps_since_the_last_checkpoint(noisy_llama, tmp_path, uninterrupted):
    folder, chance, kills = write_run(tmp_path / "run", noisy_llama), random.Random(0), []
    for number in range(KILLS):
        kill = killed(folder, chance, number)
        if kills:
            kills[-1] = kills[-1]._replace(resumed=kill.began)
        kills.append(kill)
    kills[-1] = kills[-1]._replace(resumed=finished(folder))
    print(table(kills))
    assert all(kill.saved <= kill.resumed for kill in kills)
    assert max(kill.lost for kill in kills) <= EVERY
    assert sum("writing" in kill.amid for kill in kills) >= 5
    (weights, optimizer, log), (*_, whole_log) = outcome(folder), uninterrupted
    # Lightning logs a step behind its checkpoint: whoever is killed between the two has no line of it.
    between = {kill.resumed for kill in kills if kill.amid == f"wrote {kill.resumed}"}
    lost = {*whole_log} - {*log}
    assert {step + 1 for step, _ in lost} <= between
    assert same((weights, optimizer, sorted([*log, *lost])), uninterrupted)
    left = [path.name for path in (folder / "lightning_logs" / "version_0" / "checkpoints").iterdir()]
    assert f"epoch=15-step={STEPS}.ckpt" in left
    assert not [name for name in left if not name.endswith(".ckpt")]


def table(kills):
    lines = [
        f"{'kill':>4}  {'started':8} {'began':>5}  {'killed':16} {'reached':>7} {'saved':>5} {'resumed':>7} {'lost':>4}"
    ]
    lines += [
        f"{number:>4}  {kill.started:8} {kill.began:>5}  {kill.amid:16} {kill.reached:>7} {kill.saved:>5} "
        f"{kill.resumed:>7} {kill.lost:>4}"
        for number, kill in enumerate(kills, start=1)
    ]
    return "\n" + "\n".join(lines)


def without_position(checkpoint):
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = []


def without_optimizer(checkpoint):
    checkpoint["optimizer_states"][0]["state"] = {}


def without_seed(checkpoint):
    del checkpoint["seed"]


def with_other_count(checkpoint):
    total = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    total.update({name: count + 100 for name, count in total.items()})


@pytest.fixture(scope="module")
def stopped(noisy_llama, tmp_path_factory):
    """Folder of a run that was killed in the middle."""
    folder = write_run(tmp_path_factory.mktemp("stopped") / "run", noisy_llama)
    process = Forked(folder)
    wait_for(folder, process, 0, lambda lines: ("step", STEPS // 2 + 3) in lines)
    process.kill()
    process.wait()
    return folder


OTHER_SEED = ["--seed_everything", "1"]  # it is the run's first seed that counts


@pytest.mark.parametrize(
    ("change", "more", "equal"),
    [
        (None, OTHER_SEED, True),
        (without_seed, OTHER_SEED, False),
        (with_other_count, [], False),
        (without_position, [], False),
        (without_optimizer, [], False),
    ],
)
def test_all_that_a_checkpoint_holds_is_needed(stopped, tmp_path, uninterrupted, change, more, equal):
    folder = shutil.copytree(stopped, tmp_path / "run")
    path = last_checkpoint(folder / "lightning_logs" / "version_0" / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    if change is not None:
        change(checkpoint)
        torch.save(checkpoint, path)
    assert finished(folder, more) == checkpoint["global_step"]
    assert same(outcome(folder), uninterrupted) == equal
